"""Where a decode step's time goes, operator by operator: `apportion bench latency --breakdown`, and as a trace for Perfetto.

The model runs as in the engine, over operators that note when they were called. Nothing is recorded and replayed, so that every call is
seen: what the step takes beside its operators ("host") is more than in the engine, whose steps replay.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from apportion.core.config import ModelConfig
from apportion.core.kv_spec import UNIT_BYTES
from apportion.core.sampling_params import SamplingParams
from apportion.core.schedule import CachedRequest, NewRequest, SchedulerOutput
from apportion.engine.model_runner import ModelRunner
from apportion.kernels.ops import Ops
from apportion.layers.attention import bind_paged_attention
from apportion.models.checkpoint import read_spec
from apportion.models.loader import load_model
from apportion.platforms.platform import select_platform

BLOCK_SIZE = 32
KINDS = {
    "rms_norm": "norm", "add_rms_norm": "norm", "silu_mul": "activation", "rotate": "attention", "route": "moe", "sample": "sampling",
    "logprobs": "sampling", "apply_bitmask": "sampling", "linear": "linear", "experts": "moe", "paged_attention": "attention",
    "latent_attention": "attention",
}  # fmt: skip


@dataclass(slots=True)
class Notes:
    """Calls as (name, kind, start, seconds); the outermost of nested ones."""

    calls: list[tuple[str, str, float, float]] = field(default_factory=list)
    depth: int = 0

    def timed(self, name: str, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self.depth:
                return function(*args, **options)
            self.depth, start = 1, time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.calls.append((name, kind, start, time.perf_counter() - start))
                self.depth = 0

        return call


class _Timed:
    """An object of an Ops, its calls noted: __call__ and the methods named."""

    def __init__(self, target: Any, notes: Notes, name: str, kind: str, methods: tuple[str, ...]) -> None:
        self._target = target
        if callable(target):
            self._call = notes.timed(name, kind, target)
        for method in methods:
            setattr(self, method, notes.timed(f"{name}.{method}", kind, getattr(target, method)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._call(*args, **options)


class TimedOps:
    """An Ops whose calls are noted. It cannot be recorded: a replay would pass it by."""

    def __init__(self, ops: Ops, notes: Notes) -> None:
        self._ops, self._notes = ops, notes
        for name in KINDS:
            if name not in ("linear", "experts", "paged_attention", "latent_attention"):
                setattr(self, name, notes.timed(name, KINDS[name], getattr(ops, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def recording(self) -> None:
        return None

    def linear(self, spec: Any) -> Any:
        name = f"linear {spec.out_features}x{spec.in_features}"
        return _Timed(self._ops.linear(spec), self._notes, name, "linear", ("rows",))

    def experts(self, spec: Any) -> Any:
        return _Timed(self._ops.experts(spec), self._notes, f"experts {spec.num_experts}x{spec.ffn}", "moe", ())

    def paged_attention(self, spec: Any, arena: Any) -> Any:
        return _Timed(self._ops.paged_attention(spec, arena), self._notes, "attention", "attention", ("plan", "write", "run"))

    def latent_attention(self, spec: Any, arena: Any) -> Any:
        return _Timed(self._ops.latent_attention(spec, arena), self._notes, "attention", "attention", ("plan", "write", "run"))


@dataclass(frozen=True, slots=True)
class Breakdown:
    """ms: kind -> milliseconds of a decode step, 'host' what is left of `step_ms`. trace: events of one step, for ui.perfetto.dev."""

    step_ms: float
    ms: dict[str, float]
    trace: dict[str, Any]


def measure_breakdown(model: Path, ops: Ops, *, batch_size: int, context_len: int, num_steps: int = 20, dtype: str = "auto") -> Breakdown:
    """Decode steps of batch_size requests over context_len tokens each; the median step's parts."""
    notes = Notes()
    timed: Any = TimedOps(ops, notes)
    spec = read_spec(model)
    config = ModelConfig(model=str(model), dtype=dtype)
    loaded = load_model(config, spec, timed)
    groups = spec.kv_groups("auto", BLOCK_SIZE)
    blocks_each = -(-(context_len + num_steps + 2) // BLOCK_SIZE)
    arena = select_platform("cpu").create_arena(sum(batch_size * blocks_each * group.block_bytes for group in groups), shared=False)
    backends = bind_paged_attention(loaded.model, loaded.model.site, groups, arena.tensor, context_len + num_steps + 2)
    runner = ModelRunner(loaded.model, backends, timed)
    torch.set_grad_enabled(False)
    runner.execute(_prefill(batch_size, context_len, blocks_each, groups, spec.vocab))
    steps = []
    for number in range(num_steps):
        notes.calls.clear()
        known = [CachedRequest(str(i), context_len + number) for i in range(batch_size)]
        start = time.perf_counter()
        runner.execute(SchedulerOutput(number + 1, "m", {str(i): 1 for i in range(batch_size)}, [], known))
        steps.append((time.perf_counter() - start, start, list(notes.calls)))
    arena.close()
    seconds, start, calls = sorted(steps[1:], key=lambda step: step[0])[(num_steps - 1) // 2]
    ms: dict[str, float] = defaultdict(float)
    for _, kind, _, took in calls:
        ms[kind] += took * 1e3
    ms["host"] = seconds * 1e3 - sum(ms.values())
    return Breakdown(seconds * 1e3, dict(ms), _trace(calls, start, seconds))


def _prefill(batch_size: int, context_len: int, blocks_each: int, groups: Any, vocab: int) -> SchedulerOutput:
    """Every request in full; the groups' blocks follow one another in the arena, a request's are its own."""
    params = SamplingParams(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)
    tokens = torch.randint(min(3, vocab - 1), vocab, (batch_size, context_len), generator=torch.Generator().manual_seed(0)).tolist()
    starts, base = [], 0
    for group in groups:
        starts.append(base)
        base += batch_size * blocks_each * group.block_bytes
    requests = []
    for i, row in enumerate(tokens):
        tables = tuple(
            [(start + (i * blocks_each + b) * group.block_bytes) // UNIT_BYTES for b in range(blocks_each)]
            for start, group in zip(starts, groups, strict=True)
        )
        requests.append(NewRequest(str(i), row, context_len, 0, params, tables))
    return SchedulerOutput(0, "m", {str(i): context_len for i in range(batch_size)}, requests)


def _trace(calls: list[tuple[str, str, float, float]], start: float, seconds: float) -> dict[str, Any]:
    """The trace event format, microseconds: the step on one line, its operators below."""
    events: list[dict[str, Any]] = [{"ph": "X", "name": "decode step", "cat": "step", "pid": 0, "tid": 0, "ts": 0.0, "dur": seconds * 1e6}]
    for name, kind, at, took in calls:
        events.append({"ph": "X", "name": name, "cat": kind, "pid": 0, "tid": 1, "ts": (at - start) * 1e6, "dur": took * 1e6})
    return {"traceEvents": events, "displayTimeUnit": "ms"}
