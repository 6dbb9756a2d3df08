"""GGUF files, written by the package gguf: the numbers are those that its own dequantization gives, in every type and architecture."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from apportion.core.errors import CheckpointError, InvalidParameter, Unsupported
from tests.unit.models.conftest import dense_logits
from tests.unit.quant.test_checkpoints import TOKENS, load, loaded_weights

gguf = pytest.importorskip("gguf", reason="needs the package gguf")

WIDTH, FFN, VOCAB, EXPERTS = 256, 512, 64, 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "intermediate_size": FFN, "num_attention_heads": 8, "num_hidden_layers": 1,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "dtype": "float32",
    "tie_word_embeddings": False,
}  # fmt: skip
MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": FFN,
    "norm_topk_prob": True, "head_dim": 32,
}  # fmt: skip
ATTENTION = {"attn_q": ("q_proj", 256), "attn_k": ("k_proj", 64), "attn_v": ("v_proj", 64), "attn_output": ("o_proj", 256)}
FEED_FORWARD = {"gate": (FFN, WIDTH), "up": (FFN, WIDTH), "down": (WIDTH, FFN)}


def encoded(values: np.ndarray, kind: str, rng) -> np.ndarray:
    """Bytes of a type. The package writes no K types, so their blocks are drawn: any bytes mean something, given sane scales."""
    quantization = gguf.GGMLQuantizationType[kind]
    if not kind.endswith("K"):
        return gguf.quants.quantize(values, quantization)
    size = gguf.GGML_QUANT_SIZES[quantization][1]
    blocks = rng.integers(0, 256, (*values.shape[:-1], values.shape[-1] // 256, size), dtype=np.uint8)
    scale = rng.uniform(1e-5, 1e-4, (*blocks.shape[:-1], 2)).astype(np.float16)
    if kind == "Q4_K":
        blocks[..., :4] = scale.view(np.uint8)
    else:
        blocks[..., 208:] = scale[..., :1].view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as the converter of llama.cpp writes them for the architecture llama."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(folder, kind: str, mixture: bool = False, interleaved: bool = True) -> dict[str, torch.Tensor]:
    """A model of one layer; returns the numbers it means, by the checkpoint's names."""
    architecture = "qwen3moe" if mixture else "llama"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | (MIXTURE if mixture else {})))
    rng, meant = np.random.default_rng(5), {}
    writer = gguf.GGUFWriter(folder / "model.gguf", architecture)
    writer.add_head_count(8)
    writer.add_head_count_kv(2)

    def plain(name, key, values):
        writer.add_tensor(name, values.astype(np.float32))
        meant[key] = torch.from_numpy(values.astype(np.float32))

    def matrix(name, keys, shape, heads=0):
        values = rng.normal(0, 0.2, (len(keys), *shape) if len(keys) > 1 else shape).astype(np.float32)
        quantization = gguf.GGMLQuantizationType[kind]
        stored = encoded(permuted(values, heads) if heads else values, kind, rng)
        writer.add_tensor(name, stored, raw_dtype=quantization)
        dense = gguf.quants.dequantize(stored, quantization)
        for key, part in zip(keys, dense if len(keys) > 1 else [dense], strict=True):
            if heads:
                part = part.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(shape)
            meant[key] = torch.from_numpy(np.ascontiguousarray(part))

    matrix("token_embd.weight", ["model.embed_tokens.weight"], (VOCAB, WIDTH))
    matrix("output.weight", ["lm_head.weight"], (VOCAB, WIDTH))
    plain("output_norm.weight", "model.norm.weight", np.ones(WIDTH))
    plain("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight", rng.normal(1, 0.1, WIDTH))
    plain("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight", rng.normal(1, 0.1, WIDTH))
    for part, (name, rows) in ATTENTION.items():
        heads = {"attn_q": 8, "attn_k": 2}.get(part, 0) if not mixture else 0
        shape = (rows, WIDTH)
        matrix(f"blk.0.{part}.weight", [f"model.layers.0.self_attn.{name}.weight"], shape, heads)
    if mixture:
        for part in ("q_norm", "k_norm"):
            plain(f"blk.0.attn_{part}.weight", f"model.layers.0.self_attn.{part}.weight", np.ones(32))
        plain("blk.0.ffn_gate_inp.weight", "model.layers.0.mlp.gate.weight", rng.normal(0, 1, (EXPERTS, WIDTH)))
    for part, shape in FEED_FORWARD.items():
        if mixture:
            names = [f"model.layers.0.mlp.experts.{e}.{part}_proj.weight" for e in range(EXPERTS)]
            matrix(f"blk.0.ffn_{part}_exps.weight", names, shape)
        else:
            matrix(f"blk.0.ffn_{part}.weight", [f"model.layers.0.mlp.{part}_proj.weight"], shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("mixture", [False, True], ids=["llama", "qwen3moe"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "Q6_K", "F16", "BF16"])
def test_numbers_and_logits_are_those_of_the_file(tmp_path, kind, mixture):
    from safetensors.torch import save_file

    meant = write(tmp_path / "q", kind, mixture)
    loaded = load(tmp_path / "q")
    exact = kind not in ("F16", "BF16")  # those go into the model's float32
    for name, found in loaded_weights(loaded.model).items():
        if f"{name}.weight" in meant:
            torch.testing.assert_close(found, meant[f"{name}.weight"], rtol=1e-6 if exact else 0, atol=1e-7 if exact else 0, msg=name)
    (tmp_path / "f").mkdir()
    (tmp_path / "f/config.json").write_bytes((tmp_path / "q/config.json").read_bytes())
    save_file({key: tensor.contiguous() for key, tensor in meant.items()}, tmp_path / "f/model.safetensors")
    plain = load(tmp_path / "f")
    tokens = [token % VOCAB for token in TOKENS]
    torch.testing.assert_close(dense_logits(loaded.model, tokens), dense_logits(plain.model, tokens), rtol=1e-4, atol=1e-4)
    if exact:
        assert loaded.manifest["nbytes"] < 0.45 * plain.manifest["nbytes"]


def test_what_is_not_understood_is_named(tmp_path):
    write(tmp_path / "q", "Q5_0")
    with pytest.raises(Unsupported, match=r"tensor token_embd.weight of .*model.gguf is Q5_0; known: F32, F16, BF16, Q8_0"):
        load(tmp_path / "q")
    write(tmp_path / "p", "Q8_0")
    with pytest.raises(InvalidParameter, match="quantization 'fp8' contradicts the checkpoint, a GGUF file"):
        load(tmp_path / "p", quantization="fp8")
    whole = (tmp_path / "p/model.gguf").read_bytes()
    (tmp_path / "p/model.gguf").write_bytes(whole[:-4000])
    with pytest.raises(CheckpointError, match=r"model.gguf is (truncated|no valid GGUF file)"):
        load(tmp_path / "p")
    (tmp_path / "p/model.gguf").write_bytes(b"GGML" + whole[4:])
    with pytest.raises(CheckpointError, match="is no valid GGUF file"):
        load(tmp_path / "p")
