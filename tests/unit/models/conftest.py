"""A tiny checkpoint written by hand, and ways to run a model without an engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from apportion.attention.backend import AttentionMetadata, ForwardContext
from apportion.core.config import ModelConfig
from apportion.kernels.reference.ops import ReferenceOps
from apportion.layers.attention import bind_dense_attention
from apportion.models.checkpoint import read_spec
from apportion.models.loader import load_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 48, "intermediate_size": 70, "num_attention_heads": 6, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "attention_bias": True,
    "mlp_bias": True, "dtype": "float32",
}  # fmt: skip


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama with biases."""
    hidden, ffn, heads, kv = (config[n] for n in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"))
    q, k = hidden, hidden // heads * kv
    matrices = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (k, hidden), "self_attn.v_proj": (k, hidden), "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    for layer in range(config["num_hidden_layers"]):
        for name, shape in matrices.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
    return shapes


class TinyCheckpoint:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = dict(CONFIG)
        generator = torch.Generator().manual_seed(3)
        self.tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes_of(self.config).items()}

    def write(self, shards: int = 1) -> Path:
        from safetensors.torch import save_file

        (self.folder / "config.json").write_text(json.dumps(self.config))
        if shards == 1:
            save_file(self.tensors, self.folder / "model.safetensors")
            return self.folder
        weight_map = {}
        for shard in range(shards):
            part = dict(list(self.tensors.items())[shard::shards])
            name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            save_file(part, self.folder / name)
            weight_map |= dict.fromkeys(part, name)
        (self.folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return self.folder


@pytest.fixture
def tiny(tmp_path):
    return TinyCheckpoint(tmp_path)


@pytest.fixture(scope="session")
def load():
    """A function folder -> LoadedModel on the reference operators."""

    def load_folder(folder: Path, **changes):
        return load_model(ModelConfig(model=str(folder), **changes), read_spec(folder), ReferenceOps())

    return load_folder


def dense_logits(model, token_ids: list[int]) -> torch.Tensor:
    """Logits of every row, without a cache."""
    site, count = model.site, len(token_ids)
    backends = bind_dense_attention(model, site, site.spec.kv_groups("float32", 32, site.group.size), count)
    bounds = torch.tensor([0, count], dtype=torch.int32)
    nothing = torch.empty(1, 0, dtype=torch.int32)
    with torch.inference_mode():
        metadata = tuple(backend.plan(AttentionMetadata(1, count, bounds, bounds[1:], nothing)) for backend in backends)
        context = ForwardContext(torch.arange(count, dtype=torch.int32), metadata)
        return model.compute_logits(model.forward(torch.tensor(token_ids, dtype=torch.int32), context)).clone()


def mapped_share(nbytes: int) -> int:
    """PSS of this process's mapping of an arena of that size: pages that n processes map count 1 / n."""
    size, share = 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Size:"):
            size = int(line.split()[1]) * 1024
        elif line.startswith("Pss:") and nbytes <= size < nbytes + 4096:
            share += int(line.split()[1]) * 1024
    return share


@pytest.fixture(scope="session")
def shared_pages():
    return mapped_share


@pytest.fixture(scope="session")
def logits_of():
    return dense_logits


@pytest.fixture(scope="session")
def make_shapes():
    return shapes_of
