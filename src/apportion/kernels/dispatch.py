"""Chooses the operators of a device, once, and says why.

A backend is a package kernels/<name> with a function `implementations()`; an implementation is named '<backend>' or
'<backend>-<isa>'. Nothing is imported before the first use.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from apportion import kernels
from apportion.core.errors import Unsupported
from apportion.kernels.ops import Ops
from apportion.platforms.platform import ComputeShare

logger = logging.getLogger(__name__)

ALL_OPS = (
    "linear", "experts", "paged_attention", "latent_attention", "rms_norm", "add_rms_norm", "silu_mul", "rotate", "route", "sample",
    "logprobs", "apply_bitmask",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Capability:
    """device: platform name. isa: instruction set. ops: those it has; one that lacks any cannot be selected, only tested.

    rounds_activations: the elements of weights under which a linear rounds its input to bfloat16 (float16 weights: to float16), unless the
    scheme says to what; attention rounds queries and probabilities likewise over caches of these formats. quantized: linears and experts
    take schemes with scales too (core/number_format).
    float8_error: of a product of float8 by float8, over the sum of its terms' magnitudes, beyond that of float32 sums.
    batch_invariant: the promise at the top of kernels/ops. limits: what else a caller should know, in words.
    """

    device: str
    isa: str = "any"
    ops: tuple[str, ...] = ALL_OPS
    weight_dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    kv_dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    batch_invariant: bool = False
    rounds_activations: tuple[str, ...] = ()
    quantized: bool = True
    float8_error: float = 0.0
    limits: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Implementation:
    """One set of operators. Every package kernels/<backend> offers `implementations() -> list[Implementation]`.

    rank: larger is preferred. unavailable: why it cannot run on this machine, empty where it can. make(share) -> Ops, with threads of its
    own on the cores of the share (None: as many as it likes); an Ops serves one lane, and every model on it.
    """

    name: str
    rank: int
    capability: Capability
    make: Callable[[ComputeShare | None], Any]
    unavailable: str = ""

    @property
    def backend(self) -> str:
        return self.name.partition("-")[0]


class Device(Protocol):
    """The part of a platform that a choice of kernels depends on."""

    name: str


@cache
def implementations() -> tuple[Implementation, ...]:
    """Every implementation that this build knows, best first, runnable here or not."""
    found: list[Implementation] = []
    for module in pkgutil.iter_modules(kernels.__path__):
        offered = getattr(importlib.import_module(f"{kernels.__name__}.{module.name}"), "implementations", None) if module.ispkg else None
        found += offered() if offered else []
    return tuple(sorted(found, key=lambda i: -i.rank))


def choose(device: str, prefer: str = "auto") -> tuple[Implementation, str]:
    """The implementation to use on `device` and the reason in words.

    prefer: 'auto', a backend ('cpu', 'reference') or one implementation ('cpu-avx2'). Errors: Unsupported, naming what is missing.
    """
    names = {i.backend for i in implementations()} | {i.name for i in implementations()}
    if prefer != "auto" and prefer not in names:
        raise Unsupported(f"unknown kernels {prefer!r}; this build has: auto, {', '.join(sorted(names))}")
    rejected = []
    for candidate in implementations():
        if prefer not in ("auto", candidate.backend, candidate.name):
            continue
        reason = _obstacle(candidate, device)
        if not reason:
            why = f"the fastest of {len(implementations())} known" if prefer == "auto" else f"pinned by {prefer!r}"
            return candidate, "; ".join([why, *rejected])
        rejected.append(f"{candidate.name} cannot run: {reason}")
    raise Unsupported(f"no kernels for device {device!r} with kernels={prefer!r}: {'; '.join(rejected)}")


def select_ops(platform: Device, share: ComputeShare | None = None, prefer: str = "auto") -> Ops:
    """The operators of `platform`, with their threads on the cores of `share`."""
    chosen, why = choose(platform.name, prefer)
    logger.info("kernels: %s (%s)", chosen.name, why)
    ops: Ops = chosen.make(share)
    return ops


def _obstacle(candidate: Implementation, device: str) -> str:
    if candidate.capability.device != device:
        return f"it is for device {candidate.capability.device!r}"
    missing = [op for op in ALL_OPS if op not in candidate.capability.ops]
    return candidate.unavailable or (f"it lacks {', '.join(missing)}" if missing else "")
