"""What one step of a serving engine costs: a mixed batch of prefill chunks and decodes, on one device or a tensor-parallel group.

The operators of a decoder are counted from its ModelSpec (grouped and latent attention, experts that are touched, formats per tensor class)
and priced by the same providers as training; where steps of the very engine were measured, `StepFit` settles what the counts leave open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from apportion.core.errors import InvalidParameter
from apportion.core.model_spec import ModelSpec
from apportion.simulator.cost.measured import Measured, MeasuredCollectives, best_seconds
from apportion.simulator.cost.model import Collectives, Provider, Roofline
from apportion.simulator.cost.table import shipped
from apportion.simulator.cost.work import Work
from apportion.simulator.htae import Cost
from apportion.simulator.ops import ITEMSIZE
from apportion.simulator.topology import Device, Topology

KV_UTILIZATION, BLOCK = 0.9, 16
EXTRAPOLATED = "extrapolated"
WIDEST = 65536
FOLDS, ROUNDS = 8, 4  # of a fit of steps


@dataclass(frozen=True)
class Row:
    """One request in a step: tokens to compute, and tokens whose KV is stored already. samples: whether its last token is read out."""

    tokens: int
    context: int
    samples: bool = True


@dataclass(frozen=True)
class StepCost:
    """seconds, its relative spread, and seconds by source; extrapolated: some part lies outside what was measured."""

    seconds: float
    spread: float
    parts: Mapping[str, float]
    extrapolated: bool


@dataclass
class Decoder:
    """A decoder as served. weight_dtype, kv_dtype: how they are stored. host_s: per step, what the device waits for. tp: its share of each
    layer runs on the first `tp` devices of the topology."""

    spec: ModelSpec
    topology: Topology
    tp: int = 1
    weight_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    host_s: float = 0.0
    providers: Sequence[Provider] = field(default_factory=lambda: (Measured(), Roofline()))
    collectives: Collectives = field(default_factory=MeasuredCollectives)

    def __post_init__(self) -> None:
        devices = [d for node in self.topology.cluster.nodes for d in node]
        if not 1 <= self.tp <= len(devices):
            raise InvalidParameter(f"tensor parallelism of {self.tp} needs as many devices, the cluster has {len(devices)}")
        if self.spec.num_heads % self.tp:
            raise InvalidParameter(f"{self.spec.num_heads} attention heads cannot be cut into {self.tp} equal parts")
        for name in (self.weight_dtype, self.kv_dtype):
            if name not in ITEMSIZE:
                raise InvalidParameter(f"unknown dtype {name!r}; known: {', '.join(ITEMSIZE)}")
        self.group = devices[: self.tp]
        self.device: Device = self.topology.kinds[self.group[0]]
        self.known: dict[Work, Cost] = {}

    # -- memory

    @property
    def kv_bytes_per_token(self) -> float:
        """On one device; a latent cache is held whole by each."""
        spec, size = self.spec, ITEMSIZE[self.kv_dtype]
        if spec.latent is not None:
            return float(spec.num_layers * (spec.latent.kv_lora_rank + spec.latent.qk_rope_dim) * size)
        return 2.0 * spec.num_layers * max(1, spec.num_kv_heads // self.tp) * spec.head_dim * size

    @property
    def weight_bytes(self) -> float:
        """On one device."""
        spec, size = self.spec, ITEMSIZE[self.weight_dtype]
        table = spec.vocab * spec.hidden * 2  # the embedding and the head stay in 16 bits
        return table * (1 if spec.tied else 2) / self.tp + size * sum(self._layer_weights(i) for i in range(spec.num_layers)) / self.tp

    def kv_capacity(self, utilization: float = KV_UTILIZATION, workspace: float = 2e9) -> int:
        """Tokens, in whole blocks. Error: InvalidParameter where not even the weights fit."""
        room = self.device.mem_bytes * utilization - self.weight_bytes - workspace
        if room <= 0:
            raise InvalidParameter(
                f"{self.spec.architecture} takes {self.weight_bytes / 1e9:.1f} GB of weights per device, {self.device.name} has"
                f" {self.device.mem_bytes * utilization / 1e9:.1f}"
            )
        return int(room / self.kv_bytes_per_token) // BLOCK * BLOCK

    def _layer_weights(self, i: int) -> float:
        spec, moe = self.spec, self.spec.moe
        if moe is not None and i in moe.layers:
            mlp = 3.0 * spec.hidden * (moe.num_experts * moe.ffn + moe.shared_ffn) + spec.hidden * moe.num_experts
        else:
            mlp = 3.0 * spec.hidden * spec.ffn
        return mlp + sum(n * k for n, k in self._projections())

    def _projections(self) -> list[tuple[float, float]]:
        """(outputs, inputs) of attention's products, of the whole model."""
        s, latent = self.spec, self.spec.latent
        if latent is None:
            return [((s.num_heads + 2 * s.num_kv_heads) * s.head_dim, s.hidden), (s.hidden, s.num_heads * s.head_dim)]
        query = s.num_heads * (latent.qk_nope_dim + latent.qk_rope_dim)
        down = latent.q_lora_rank + latent.kv_lora_rank + latent.qk_rope_dim
        up = s.num_heads * (latent.qk_nope_dim + latent.v_dim)
        back = (s.hidden, s.num_heads * latent.v_dim)
        return [(down, s.hidden), (query, latent.q_lora_rank or s.hidden), (up, latent.kv_lora_rank), back]

    # -- time

    def step(self, rows: Sequence[Row]) -> StepCost:
        """Of one step. Errors: InvalidParameter for a row without a token; Unsupported for work that no provider knows."""
        if not rows or any(row.tokens < 1 or row.context < 0 for row in rows):
            raise InvalidParameter("a step needs at least one row, each with at least one token")
        parts: dict[str, float] = {}
        variance, beyond = 0.0, False
        for name, times, cost in self._costs(rows):
            seconds = cost.total * times
            parts[name] = parts.get(name, 0.0) + seconds
            variance += (seconds * cost.spread) ** 2
            beyond |= cost.source.startswith(EXTRAPOLATED)
        parts["host"] = self.host_s
        total = sum(parts.values())
        return StepCost(total, math.sqrt(variance) / total if total else 0.0, parts, beyond)

    def _costs(self, rows: Sequence[Row]) -> list[tuple[str, int, Cost]]:
        """(part, how often, cost of one)."""
        spec, tp = self.spec, self.tp
        tokens, sampled = sum(r.tokens for r in rows), sum(r.samples for r in rows)
        found = []
        for n, k in self._projections():  # the one that leads back to the hidden size is cut by its inputs, the others by their outputs
            cuts = (1, tp) if n == spec.hidden else (tp, 1)
            found.append(("projections", spec.num_layers, self._product(tokens, n / cuts[0], k / cuts[1])))
        num_moe = len(spec.moe.layers) if spec.moe is not None else 0
        if spec.num_layers > num_moe:
            found.append(("mlp", spec.num_layers - num_moe, self._product(tokens, 2 * spec.ffn / tp, spec.hidden)))
            found.append(("mlp", spec.num_layers - num_moe, self._product(tokens, spec.hidden, spec.ffn / tp)))
        if spec.moe is not None:
            found.append(("experts", num_moe, self._experts(tokens)))
            if spec.moe.shared_ffn:
                found.append(("mlp", num_moe, self._product(tokens, 2 * spec.moe.shared_ffn / tp, spec.hidden)))
                found.append(("mlp", num_moe, self._product(tokens, spec.hidden, spec.moe.shared_ffn / tp)))
        found += [("attention", spec.num_layers, cost) for cost in self._attention(rows)]
        moved = tokens * spec.hidden * 2 * 8.0 + tokens * 2 * 3.0 * (spec.ffn / tp)  # norms, sums and the activation, in and out
        found.append(("norms", spec.num_layers, self._price(Work("stream", "none", 0.0, moved))))
        pieces = math.ceil(spec.vocab / tp / WIDEST)  # a head wider than any product that was measured, as several beside one another
        found.append(("head", pieces, self._product(max(1, sampled), spec.vocab / tp / pieces, spec.hidden, "bfloat16")))
        if tp > 1:
            reduce = self.collectives.cost(self.topology, "all_reduce", self.group, tokens * spec.hidden * 2)
            found.append(("communication", 2 * spec.num_layers, reduce))
        return found

    def _product(self, m: float, n: float, k: float, dtype: str | None = None) -> Cost:
        """Activations in 16 bits; weights in their own format are read as such and multiplied in it where the device can."""
        stored = dtype or self.weight_dtype
        computed = stored if stored in self.device.flops else "bfloat16" if "bfloat16" in self.device.flops else "float32"
        moved = n * k * ITEMSIZE[stored] + (m * k + m * n) * 2
        return self._price(Work("gemm", computed, 2.0 * m * n * k, moved, max(1, round(m)), max(1, round(n)), max(1, round(k))))

    def _experts(self, tokens: int) -> Cost:
        """Touched weights: E (1 - (1 - k/E)^T), of uniform routing; tensor parallelism cuts every expert."""
        moe, spec = self.spec.moe, self.spec
        if moe is None:
            raise InvalidParameter(f"{spec.architecture} has no experts")
        point = {"hidden": spec.hidden, "ffn": moe.ffn / self.tp, "top_k": moe.top_k, "experts": moe.num_experts, "tokens": tokens}
        for table in shipped():
            if (table.op, table.device, table.dtype) == ("experts", self.device.name, self.weight_dtype):
                reading = table.read(point, lambda at: best_seconds("experts", self.weight_dtype, at, self.device))
                if reading is not None:
                    return Cost(reading.seconds, source=f"{reading.how}: {table.source}", spread=reading.spread)
        flops = 6.0 * tokens * moe.top_k * spec.hidden * point["ffn"]
        moved = 3 * experts_touched(moe.num_experts, moe.top_k, tokens) * spec.hidden * point["ffn"] * ITEMSIZE[self.weight_dtype]
        rows = max(1, round(tokens * moe.top_k / moe.num_experts))
        return self._price(Work("gemm", self.weight_dtype, flops, moved, rows, round(2 * point["ffn"]), spec.hidden, moe.num_experts))

    def _attention(self, rows: Sequence[Row]) -> list[Cost]:
        """Prefill chunks by operations, decodes by the KV they read; from tables where the device has them."""
        spec, tp, size = self.spec, self.tp, ITEMSIZE[self.kv_dtype]
        kv_heads = 1 if spec.latent is not None else max(1, spec.num_kv_heads // tp)
        head_dim = spec.latent.kv_lora_rank + spec.latent.qk_rope_dim if spec.latent is not None else spec.head_dim
        heads, values = spec.num_heads // tp, 1 if spec.latent is not None else 2
        costs, decodes = [], [r for r in rows if r.tokens == 1]
        for r in rows:
            if r.tokens > 1:
                pairs = r.tokens * r.context + r.tokens * (r.tokens + 1) / 2
                moved = (values * (r.context + r.tokens) * kv_heads * size + 4 * r.tokens * heads) * head_dim
                costs.append(self._price(Work("attention", "bfloat16", 4.0 * heads * head_dim * pairs, moved, r.tokens * heads // kv_heads,
                                              r.tokens, head_dim, kv_heads)))  # fmt: skip
        if decodes:
            stored = sum(r.context + 1 for r in decodes)
            point = {
                "sequences": len(decodes) * kv_heads,
                "heads": heads / kv_heads,
                "head_dim": head_dim,
                "context": stored / len(decodes),
            }
            for table in shipped():
                if (table.op, table.device, table.dtype) == ("decode_attention", self.device.name, self.kv_dtype):
                    reading = table.read(point, lambda at: best_seconds("decode_attention", self.kv_dtype, at, self.device))
                    if reading is not None:
                        return [*costs, Cost(reading.seconds, source=f"{reading.how}: {table.source}", spread=reading.spread)]
            moved = values * stored * kv_heads * head_dim * size
            costs.append(self._price(Work("stream", "none", 0.0, moved)))
        return costs

    def _price(self, work: Work) -> Cost:
        if work not in self.known:
            found = next((c for provider in self.providers if (c := provider.cost(work, self.device)) is not None), None)
            if found is None:
                raise InvalidParameter(f"the cost of {work.kind} in {work.dtype} is not known on {self.device.name}")
            self.known[work] = found
        return self.known[work]


def experts_touched(num_experts: int, top_k: int, tokens: int) -> float:
    """Expected number under uniform routing."""
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


@dataclass(frozen=True)
class StepFit:
    """Steps of one engine, fitted: mean seconds = weights . features of a batch, every weight at least zero.

    Features: a step, each token, each row, each sampled row, each pair of a token and what it attends to, rounds of 8 tokens. hull: largest
    of each that was measured; spread: root mean square of the relative left-out errors.
    """

    weights: tuple[float, ...]
    hull: tuple[float, ...]
    spread: float

    @classmethod
    def of(cls, measured: Sequence[tuple[Sequence[Row], float]]) -> StepFit:
        """Error: InvalidParameter for fewer steps than features."""
        if len(measured) < len(features([Row(1, 0)])) + 2:
            raise InvalidParameter(f"{len(measured)} measured steps are too few to fit {len(features([Row(1, 0)]))} features")
        x, y = np.array([features(rows) for rows, _ in measured]), np.array([seconds for _, seconds in measured])
        part, errors = np.arange(len(y)) % FOLDS, np.zeros(len(y))
        for fold in range(FOLDS):
            out = part == fold
            errors[out] = x[out] @ _fitted(x[~out], y[~out]) / y[out] - 1
        return cls(tuple(_fitted(x, y).tolist()), tuple(x.max(0).tolist()), math.sqrt(float(np.mean(errors**2))))

    def step(self, rows: Sequence[Row]) -> StepCost:
        found = features(rows)
        beyond = any(value > 1.25 * limit for value, limit in zip(found, self.hull, strict=True))
        names = ("host", "tokens", "rows", "samples", "attention", "tiles")
        parts = {name: w * f for name, w, f in zip(names, self.weights, found, strict=True)}
        return StepCost(sum(parts.values()), self.spread * (3 if beyond else 1), parts, beyond)


def features(rows: Sequence[Row]) -> list[float]:
    tokens = sum(r.tokens for r in rows)
    pairs = sum(r.tokens * r.context + r.tokens * (r.tokens + 1) / 2 for r in rows)
    return [1.0, float(tokens), float(len(rows)), float(sum(r.samples for r in rows)), pairs, float(math.ceil(tokens / 8))]


def _fitted(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Weights of the mean. Errors count relative to what is predicted: relative to what was measured, slow steps would count for less than
    fast ones, and the fit would fall below the mean by twice the noise's variance."""
    weights = _non_negative(x, y, y)
    for _ in range(ROUNDS):
        weights = _non_negative(x, y, np.maximum(x @ weights, y.min()))
    return weights


def _non_negative(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], unit: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Least squares of (x . weights - y) / unit with weights of at least zero: negative ones are dropped, worst first."""
    rows = x / unit[:, None]
    scale = rows.max(0)
    kept = [i for i in range(x.shape[1]) if scale[i] > 0]
    while True:
        found = np.linalg.lstsq(rows[:, kept] / scale[kept], y / unit, rcond=None)[0]
        if (found >= 0).all() or len(kept) == 1:
            break
        kept.pop(int(found.argmin()))
    weights = np.zeros(x.shape[1])
    weights[kept] = np.maximum(found, 0) / scale[kept]
    return weights
