"""A Llama or Qwen3-MoE safetensors folder to GGUF, without a vocabulary: the comparison feeds token ids.

As llama.cpp's own converter does it: q and k rows of a Llama are permuted from rotate-half to interleaved pairs, experts are stacked
to three dimensions, one-dimensional tensors and the router stay float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
EXPERT_NAMES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def convert(folder: Path, path: Path, dtype: str) -> None:
    """Write `path` from folder/model.safetensors (bfloat16). dtype: 'bf16' or 'f16'."""
    config = json.loads((folder / "config.json").read_text())
    is_moe = config["model_type"] == "qwen3_moe"
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "qwen3moe" if is_moe else "llama")
    write_hparams(writer, config, dtype, is_moe)
    tensors = read_bf16(folder / "model.safetensors")
    for name, words in tensors.items():
        if ".experts." in name:
            continue
        if not is_moe and ("q_proj" in name or "k_proj" in name):
            words = permute(words, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        add(writer, gguf_name(name), words, "f32" if words.ndim == 1 or ".mlp.gate." in name else dtype)
    for layer in range(config["num_hidden_layers"] if is_moe else 0):
        for projection, target in EXPERT_NAMES.items():
            experts = [tensors[f"model.layers.{layer}.mlp.experts.{e}.{projection}.weight"] for e in range(config["num_experts"])]
            add(writer, f"blk.{layer}.{target}.weight", np.stack(experts), dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def write_hparams(writer: gguf.GGUFWriter, config: dict, dtype: str, is_moe: bool) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if dtype == "bf16" else gguf.LlamaFileType.MOSTLY_F16)
    if is_moe:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def read_bf16(path: Path) -> dict[str, np.ndarray]:
    """Memory-mapped uint16 words by name: numpy has no bfloat16."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = np.memmap(path, mode="r", offset=8 + size)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return {n: data[slice(*e["data_offsets"])].view(np.uint16).reshape(e["shape"]) for n, e in entries.items()}


def permute(words: np.ndarray, num_heads: int) -> np.ndarray:
    return words.reshape(num_heads, 2, words.shape[0] // num_heads // 2, -1).swapaxes(1, 2).reshape(words.shape)


def gguf_name(name: str) -> str:
    module, _, suffix = name.rpartition(".")
    if module in TOP_NAMES:
        return f"{TOP_NAMES[module]}.{suffix}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest]}.{suffix}"


def add(writer: gguf.GGUFWriter, name: str, words: np.ndarray, dtype: str) -> None:
    if dtype == "bf16":
        writer.add_tensor(name, np.ascontiguousarray(words).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        return
    values = (words.astype(np.uint32) << 16).view(np.float32)
    writer.add_tensor(name, values if dtype == "f32" else values.astype(np.float16))
