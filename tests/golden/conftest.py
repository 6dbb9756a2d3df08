"""Checkpoints made by transformers, and a driver that shows the logits of every row, which an engine keeps to itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apportion.attention.backend import AttentionMetadata, ForwardContext
from apportion.core.config import ModelConfig
from apportion.core.errors import Unsupported
from apportion.kernels.dispatch import choose, select_ops
from apportion.layers.attention import bind_paged_attention
from apportion.models.checkpoint import read_spec
from apportion.models.loader import load_model
from apportion.parallel.groups import ParallelGroup
from apportion.platforms.platform import select_platform

BLOCK_SIZE = 32


class Driver:
    """Requests with a fixed run of blocks each, stepped together. dtype is float32 throughout."""

    def __init__(self, folder: Path, kernels: str, max_len: int = 256, max_requests: int = 20, group: ParallelGroup | None = None) -> None:
        self.kernels = kernels
        spec = read_spec(folder)
        ops = select_ops(select_platform("cpu"), prefer=kernels)
        self.loaded = load_model(ModelConfig(model=str(folder), dtype="float32"), spec, ops, group)
        self.model = self.loaded.model
        groups = spec.kv_groups("float32", BLOCK_SIZE, group.size if group else 1)
        per_request = -(-max_len // BLOCK_SIZE)
        sizes = [max_requests * per_request * group.block_bytes for group in groups]
        self.arena = torch.zeros(sum(sizes), dtype=torch.uint8)
        self.tables = []
        for group, size, start in zip(groups, sizes, [sum(sizes[:i]) for i in range(len(sizes))], strict=True):
            entries = torch.arange(start, start + size, group.block_bytes) // 256
            self.tables.append(entries.int().view(max_requests, per_request).flip(1).contiguous())  # blocks need not be in order
        self.backends = bind_paged_attention(self.model, self.model.site, groups, self.arena, max_len)

    def step(self, tokens: list[list[int]], computed: list[int]) -> torch.Tensor:
        """The next tokens of each request, after `computed` ones -> logits of all rows."""
        counts = torch.tensor([len(row) for row in tokens])
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
        seq_lens = (counts + torch.tensor(computed)).int()
        positions = torch.cat([torch.arange(c, c + len(row)) for row, c in zip(tokens, computed, strict=True)]).int()
        metadata = tuple(
            backend.plan(AttentionMetadata(len(tokens), len(positions), starts, seq_lens, table[: len(tokens)].contiguous()))
            for backend, table in zip(self.backends, self.tables, strict=True)
        )
        flat = torch.tensor([token for row in tokens for token in row], dtype=torch.int32)
        hidden = self.model.forward(flat, ForwardContext(positions, metadata))
        return self.model.compute_logits(hidden)


@pytest.fixture(scope="session", params=["reference", "cpu"])
def kernels(request) -> str:
    """Every set of kernels that this machine can run."""
    try:
        choose("cpu", request.param)
    except Unsupported as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture(scope="module")  # inference mode must end before other tests of the process, which may train
def make_driver():
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield Driver


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights with which every part matters: biases and norms too, and logits far enough apart for greedy tokens to be certain."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.data = (parameter.data + 0.2 * values).to(parameter.dtype)
        else:
            parameter.data = (values * parameter.shape[-1] ** -0.5 * 1.5).to(parameter.dtype)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """A function (config class, fields, dtype, shard size, seed, experts fused) -> (folder, transformers' model of it in float32)."""
    transformers = pytest.importorskip("transformers")

    def make(name: str, fields: dict, dtype: str = "float32", shard_size: str = "5GB", seed: int = 0, fused: bool = False):
        config = getattr(transformers, name)(**fields)
        model = transformers.AutoModelForCausalLM.from_config(config)
        randomize(model, seed)
        folder = tmp_path_factory.mktemp(name)
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size, save_original_format=not fused)
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        return folder, reference.eval()

    return make
