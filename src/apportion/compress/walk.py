"""A model walked layer by layer over calibration tokens: what every projection sees, and what takes its place afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
        self.model = cast(Decoder, loaded.model)
        self.spec = loaded.spec
        groups = self.spec.kv_groups("auto", 32)
        self._backends = bind_dense_attention(self.model, self.model.site, groups, max(map(len, tokens)))
        self._residuals = [self.model.embed_tokens.embed(torch.tensor(row, dtype=torch.int32)).clone() for row in tokens]
        self._deltas: list[Tensor | None] = [None] * len(tokens)
        self._weights = [torch.ones(len(row)) for row in tokens] if weights is None else [torch.tensor(row) for row in weights]

    @property
    def layers(self) -> list[DecoderLayer]:
        return [cast(DecoderLayer, layer) for layer in self.model.layers]

    def observe(self, layer: DecoderLayer, hessian: bool, matrix: Callable[[str], Tensor]) -> Observations:
        """Run the layer over everything, going nowhere. matrix(name): the weights of an expert's gate and up."""
        seen = Observations(hessian, matrix)
        with seen.watching(layer, self.spec):
            for residual, delta, weights in zip(self._residuals, self._deltas, self._weights, strict=True):
                seen.weights = weights
                self._run(layer, delta, residual.clone())
        return seen

    def advance(self, layer: DecoderLayer) -> None:
        """Go on to behind the layer, as it computes now."""
        for i, (residual, delta) in enumerate(zip(self._residuals, self._deltas, strict=True)):
            self._deltas[i] = self._run(layer, delta, residual)

    def _run(self, layer: DecoderLayer, delta: Tensor | None, residual: Tensor) -> Tensor:
        n = len(residual)
        starts, lens = torch.tensor([0, n], dtype=torch.int32), torch.tensor([n], dtype=torch.int32)
        metadata = tuple(b.plan(AttentionMetadata(1, n, starts, lens, torch.empty(1, 0, dtype=torch.int32))) for b in self._backends)
        return layer.forward(delta, residual, ForwardContext(torch.arange(n, dtype=torch.int32), metadata)).clone()


class Observations:
    """Statistics by the name of an input (Projection.sees, Projection.pool), and the largest key and value of the layer."""

    def __init__(self, hessian: bool, matrix: Callable[[str], Tensor]) -> None:
        self.inputs: dict[str, InputStatistics] = {}
        self.largest_kv = [0.0, 0.0]
        self.weights = torch.ones(0)
        self._hessian, self._matrix = hessian, matrix

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
