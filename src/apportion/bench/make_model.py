"""Random-weight checkpoints of fixed shapes, for benchmarks: config.json, model.safetensors, tokenizer.

Written tensor by tensor, so memory stays at one tensor. Weights are normal with a scale that keeps activations near one at every
depth; the same preset and seed give the same bytes on every machine. Knows nothing of engines: transformers loads the folder too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from apportion.core.errors import InvalidParameter

VOCAB = 32000
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")

_SHARED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCAB,
}

PRESETS: dict[str, dict[str, Any]] = {
    "bench-250m": _SHARED
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "mlp_bias": False,
    },
    "bench-moe": _SHARED
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 384,
        "norm_topk_prob": True,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "use_sliding_window": False,
    },
}


def make_model(preset: str, folder: Path, seed: int = 0) -> int:
    """Write the checkpoint of `preset` into `folder` (made if absent); returns its number of parameters. Errors: InvalidParameter."""
    if preset not in PRESETS:
        raise InvalidParameter(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    config = PRESETS[preset]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}, indent=2) + "\n")
    write_tokenizer(folder)
    tensors = list(tensor_shapes(config))
    # A name that only a whole file bears: an interrupted run leaves no half checkpoint behind.
    partial = folder / "model.safetensors.partial"
    with partial.open("wb") as file:
        _write_safetensors(file, tensors, config, seed)
    partial.rename(folder / "model.safetensors")
    return sum(math.prod(shape) for _, shape in tensors)


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama or Qwen3-MoE checkpoint, in file order."""
    hidden, head_dim, vocab = config["hidden_size"], config["head_dim"], config["vocab_size"]
    q_dim, kv_dim = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        for name, rows in (("q_proj", q_dim), ("k_proj", kv_dim), ("v_proj", kv_dim)):
            yield f"{prefix}.self_attn.{name}.weight", (rows, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, q_dim)
        if "num_experts" in config:
            yield f"{prefix}.self_attn.q_norm.weight", (head_dim,)
            yield f"{prefix}.self_attn.k_norm.weight", (head_dim,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        if "num_experts" in config:
            yield f"{prefix}.mlp.gate.weight", (config["num_experts"], hidden)
            for expert in range(config["num_experts"]):
                yield from _mlp_shapes(f"{prefix}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
        else:
            yield from _mlp_shapes(f"{prefix}.mlp", hidden, config["intermediate_size"])
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def _mlp_shapes(prefix: str, hidden: int, ffn: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (ffn, hidden)
    yield f"{prefix}.up_proj.weight", (ffn, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, ffn)


def _write_safetensors(file: BinaryIO, tensors: list[tuple[str, tuple[int, ...]]], config: dict[str, Any], seed: int) -> None:
    """The safetensors layout by hand (8-byte header length, JSON, data): the library's writer wants every tensor in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        nbytes = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    generator = torch.Generator().manual_seed(seed)
    for name, shape in tensors:
        file.write(_weight(name, shape, config["num_hidden_layers"], generator).view(torch.uint8).numpy().tobytes())


def _weight(name: str, shape: tuple[int, ...], num_layers: int, generator: torch.Generator) -> torch.Tensor:
    """Norms are ones. Matrices are normal, 1 / sqrt(inputs); what adds to the residual stream is further divided by sqrt(2 * layers)."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = 1.0 if "embed_tokens" in name else shape[1] ** -0.5
    if "o_proj" in name or "down_proj" in name:
        scale *= (2 * num_layers) ** -0.5
    return torch.randn(shape, generator=generator).mul_(scale).to(torch.bfloat16).flatten()


def write_tokenizer(folder: Path, vocab_size: int = VOCAB) -> None:
    """A byte-level BPE of exactly `vocab_size` tokens without training: all bytes, pairs of ASCII, then triples of it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [c for c in alphabet if c.isascii()] + ["Ġ"]  # Ġ is the byte-level spelling of a space
    pairs = [(a, b) for a in printable for b in printable]
    triples = [(a + b, c) for a, b in pairs for c in printable]
    merges = (pairs + triples)[: vocab_size - len(SPECIAL_TOKENS) - len(alphabet)]
    tokens = [*SPECIAL_TOKENS, *alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
