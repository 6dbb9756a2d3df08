"""What is measured. Plain data, without torch."""

LINEAR_SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192))  # (N, C)
LINEAR_ROWS = (1, 2, 4, 8, 16, 32, 64)
FEW_ROWS = (1, 4, 16, 64)
LARGE_ROWS = (16, 64, 256, 1024, 4096)
ATTENTION = ((1, 1024), (1, 4096), (1, 16384), (4, 4096), (16, 1024), (16, 4096), (32, 4096), (64, 2048), (128, 1024))  # (R, context)
MIXTRAL = (8, 4096, 14336)  # experts, hidden, ffn
MIXTRAL_TOKENS = (1, 16, 64, 256)
# (scheme, the peer's name for it or none, shapes)
QUANTIZED = (
    ("e4m3_tensor@e4m3_static", "fp8", ((4096, 4096), (8192, 8192))),
    ("e4m3_b128x128@e4m3_g128", "fp8_block", ((4096, 4096), (8192, 8192))),
    ("int8_channel@int8_token", "", ((4096, 4096),)),
    ("int4_g128", "", ((4096, 4096),)),
)
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MIXTRAL_8X7B = LLAMA_8B | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
    "rope_theta": 1000000.0,
}  # fmt: skip
