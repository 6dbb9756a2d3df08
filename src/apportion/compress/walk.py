"""A model walked layer by layer over calibration tokens: what every projection sees, and what takes its place afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from apportion.attention.backend import AttentionMetadata, ForwardContext
from apportion.compress.statistics import InputStatistics
from apportion.layers.attention import Attention, bind_dense_attention
from apportion.layers.linear import Linear
from apportion.layers.moe import Experts, MixtureOfExperts
from apportion.models.decoder import Decoder, DecoderLayer
from apportion.models.loader import LoadedModel

BATCH_TOKENS = 2048  # of one forward pass


@dataclass(frozen=True, slots=True)
class Projection:
    """One matrix of a layer. load: puts another matrix [N, C] in its place. sees: what its input is called; equal inputs, equal names."""

    name: str
    shape: tuple[int, int]
    sees: str
    pool: str  # all experts' tokens together; '' outside of experts
    load: Callable[[Tensor], None]


def projections(layer: nn.Module) -> Iterator[Projection]:
    """Linears and experts, without routers and what is stored head by head."""
    routers = {id(m) for mixture in layer.modules() if isinstance(mixture, MixtureOfExperts) for m in (mixture.gate, mixture.shared_gate)}
    for module in layer.modules():
        if isinstance(module, Linear) and id(module) not in routers:
            row = 0
            for name, rows in module.projections:
                yield Projection(name, (rows.total, module.columns.total), module.name, "", partial(module.op.load_rows, row=row))
                row += rows.count
        elif isinstance(module, Experts):
            wide, narrow = (module.shard.total, module.hidden), (module.hidden, module.shard.total)
            for e in range(module.num_experts):
                for part in ("gate", "up", "down"):
                    kind = "down" if part == "down" else "in"
                    load = partial(_load_expert, module.op, e, part)
                    sees, pool = f"{module.name}.{e}.{kind}", f"{module.name}.{kind}"
                    yield Projection(f"{module.name}.{e}.{part}_proj", narrow if part == "down" else wide, sees, pool, load)


def _load_expert(op: Any, expert: int, part: str, weight: Tensor) -> None:
    op.load(expert, part, weight)


class Walk:
    """The hidden states of calibration sequences before the layer that comes next. weights: of each token, ones unless given."""

    def __init__(self, loaded: LoadedModel, tokens: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None) -> None:
        model, spec = cast(Decoder, loaded.model), loaded.spec
        self._spec = spec
        self._backends = bind_dense_attention(model, model.site, spec.kv_groups("auto", 32), max(map(len, tokens)))
        each = [[1.0] * len(row) for row in tokens] if weights is None else weights
        self._batches = [_Batch.of(rows, model.embed_tokens.embed) for rows in _batches(list(zip(tokens, each, strict=True)))]

    def observe(self, layer: DecoderLayer, hessian: bool, matrix: Callable[[str], Tensor]) -> Observations:
        """Run the layer over everything, going nowhere. matrix(name): the weights of an expert's gate and up."""
        seen = Observations(hessian, matrix)
        with seen.watching(layer, self._spec):
            for batch in self._batches:
                seen.weights = batch.weights
                self._run(layer, batch, batch.residual.clone())
        return seen

    def advance(self, layer: DecoderLayer) -> None:
        """Go on to behind the layer, as it computes now."""
        for batch in self._batches:
            batch.delta = self._run(layer, batch, batch.residual)

    def _run(self, layer: DecoderLayer, batch: _Batch, residual: Tensor) -> Tensor:
        lens = batch.starts.diff()
        about = AttentionMetadata(len(lens), len(residual), batch.starts, lens, torch.empty(len(lens), 0, dtype=torch.int32))
        metadata = tuple(backend.plan(replace(about)) for backend in self._backends)
        return layer.forward(batch.delta, residual, ForwardContext(batch.positions, metadata)).clone()


@dataclass(slots=True)
class _Batch:
    """Sequences beside each other. residual, delta [T, M], weights [T]; positions int32 [T]; starts int32 [R + 1]: of their rows."""

    residual: Tensor
    weights: Tensor
    positions: Tensor
    starts: Tensor
    delta: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[int], Sequence[float]]], embed: Callable[[Tensor], Tensor]) -> _Batch:
        lens = [len(tokens) for tokens, _ in rows]
        residual = embed(torch.tensor([token for tokens, _ in rows for token in tokens], dtype=torch.int32)).clone()
        weights = torch.tensor([weight for _, each in rows for weight in each], dtype=torch.float32)
        positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lens])
        return cls(residual, weights, positions, torch.tensor([0, *accumulate(lens)], dtype=torch.int32))


def _batches(rows: Sequence[tuple[Sequence[int], Sequence[float]]]) -> Iterator[list[tuple[Sequence[int], Sequence[float]]]]:
    batch: list[tuple[Sequence[int], Sequence[float]]] = []
    for row in rows:
        if batch and sum(len(tokens) for tokens, _ in batch) + len(row[0]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    yield batch


class Observations:
    """Statistics by the name of an input (Projection.sees, Projection.pool), and the largest key and value of the layer."""

    def __init__(self, hessian: bool, matrix: Callable[[str], Tensor]) -> None:
        self.inputs: dict[str, InputStatistics] = {}
        self.largest_kv = [0.0, 0.0]
        self.weights = torch.ones(0)
        self._hessian, self._matrix = hessian, matrix

    def num_tokens(self, name: str) -> int:
        return self.inputs[name].num_tokens if name in self.inputs else 0

    def hessian(self, name: str, pool: str) -> Tensor | None:
        """The mean Hessian [C, C] of an input, None for what was never computed."""
        return self.inputs[name].mean_hessian(self.inputs.get(pool)) if name in self.inputs else None

    def add(self, name: str, x: Tensor, weights: Tensor | None = None) -> None:
        if name not in self.inputs:
            self.inputs[name] = InputStatistics(x.shape[1], self._hessian)
        self.inputs[name].add(x, self.weights if weights is None else weights)

    @contextmanager
    def watching(self, layer: nn.Module, spec: Any) -> Iterator[None]:
        """Wrap the operators of a layer; layers call them directly, past hooks."""
        undo: list[Callable[[], None]] = []
        for module in layer.modules():
            if isinstance(module, (Linear, Experts)):
                op, watched = module.op, _LinearWatch if isinstance(module, Linear) else _ExpertsWatch
                undo.append(partial(setattr, module, "op", op))
                module.op = cast(Any, watched(op, module.name, self))
            elif isinstance(module, Attention):
                undo.append(partial(setattr, module, "_run", module._run))
                module._run = partial(self._attend, module._run, spec)
        try:
            yield
        finally:
            for put_back in undo:
                put_back()

    def _attend(self, run: Callable[..., Tensor], spec: Any, layer: int, qkv: Tensor, *rest: Any) -> Tensor:
        """Keys are taken as they are stored: after their norm and rotation, which dense attention does in place."""
        out = run(layer, qkv, *rest)
        if spec.latent is not None:
            width = spec.latent.kv_lora_rank + spec.latent.qk_rope_dim
            k = v = qkv[:, -width:]
        else:
            k, v = qkv[:, spec.num_heads * spec.head_dim :].chunk(2, 1)
        self.largest_kv = [max(a, float(x.abs().max())) for a, x in zip(self.largest_kv, (k, v), strict=True)]
        return out


class _LinearWatch:
    def __init__(self, op: Any, name: str, seen: Observations) -> None:
        self._op, self._name, self._seen = op, name, seen

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        self._seen.add(self._name, x)
        return cast(Tensor, self._op(x, out))


class _ExpertsWatch:
    """What each expert's gate and up see, and its down, with the router's choice."""

    def __init__(self, op: Any, name: str, seen: Observations) -> None:
        self._op, self._name, self._seen = op, name, seen
        self._matrices: dict[str, Tensor] = {}

    def _matrix(self, name: str) -> Tensor:
        if name not in self._matrices:
            self._matrices[name] = self._seen._matrix(name)
        return self._matrices[name]

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        name, seen = self._name, self._seen
        for e in range(self._op.spec.num_experts):
            rows = (expert_ids == e).any(1)
            chosen, weights = x[rows], seen.weights[rows]
            gate, up = (self._matrix(f"{name}.{e}.{part}_proj") for part in ("gate", "up"))
            middle = torch.nn.functional.silu(chosen @ gate.T) * (chosen @ up.T)
            for kind, values in (("in", chosen), ("down", middle)):
                seen.add(f"{name}.{e}.{kind}", values, weights)
                seen.add(f"{name}.{kind}", values, weights)
        return cast(Tensor, self._op(x, expert_ids, expert_weights))
