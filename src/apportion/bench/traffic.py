"""Bytes of memory one decode step must read: the weights that take part and the KV of the context. Read off a checkpoint's headers."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.core.errors import CheckpointError

_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class Traffic:
    """What steps of one model read. Parameters, not bytes: every engine stores them in its own dtype.

    dense_params: matrices that every step reads whole (a tied embedding is one, as the output projection; an untied one is not: a
    token reads one row of it). expert_params: of all routed experts together. kv_values: numbers of K and V per token of context.
    """

    num_params: int
    dense_params: int
    expert_params: int
    num_experts: int
    top_k: int
    kv_values: int

    def weight_params(self, batch: int) -> float:
        """Parameters read by a step of `batch` tokens; experts as expected when each token picks top_k of them evenly."""
        if not self.num_experts:
            return self.dense_params
        touched = 1 - (1 - self.top_k / self.num_experts) ** batch
        return self.dense_params + self.expert_params * touched

    def step_bytes(self, batch: int, context_len: float, weight_bytes: float = 2, kv_bytes: float = 2) -> float:
        """weight_bytes, kv_bytes: of one stored number."""
        return self.weight_params(batch) * weight_bytes + batch * context_len * self.kv_values * kv_bytes


def read_traffic(folder: Path) -> Traffic:
    """From config.json and the safetensors headers of `folder` (grouped-query attention models). Errors: CheckpointError."""
    config = json.loads((folder / "config.json").read_text())
    shapes = _shapes(folder)
    if not shapes:
        raise CheckpointError(f"{folder} holds no .safetensors file")
    tied = config.get("tie_word_embeddings", False)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    experts = sum(size for name, size in sizes.items() if _EXPERT.search(name))
    embedding = 0 if tied else sum(size for name, size in sizes.items() if "embed_tokens" in name)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return Traffic(
        num_params=sum(sizes.values()),
        dense_params=sum(sizes.values()) - experts - embedding,
        expert_params=experts,
        num_experts=config.get("num_experts", config.get("num_local_experts", 0)) if experts else 0,
        top_k=config.get("num_experts_per_tok", 0),
        kv_values=2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head_dim,
    )


def _shapes(folder: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return shapes
