"""Fits what no data sheet says (efficiencies, overheads, real link speeds) to a few measured steps, and says how far to trust it.

Maximum a posteriori by Gauss-Newton in the logarithms of the parameters: each has a prior (typical value, factor of doubt), so that three
measurements are enough for six numbers and what they do not touch stays typical. What is unknown and countable (the micro-batch that a
published table does not state, whether gradients were overlapped) is scanned, each candidate with its own prior.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from apportion.core.errors import InvalidParameter
from apportion.simulator.coarse import coarse, two_layers
from apportion.simulator.cost.collective import Nccl
from apportion.simulator.cost.model import CostModel, Roofline
from apportion.simulator.cost.table import shipped
from apportion.simulator.execution_graph import ExecutionGraph
from apportion.simulator.htae import Behaviour, execute
from apportion.simulator.plan import Plan, Workload
from apportion.simulator.topology import Device, Topology

Vector = npt.NDArray[np.float64]
NOISE = 0.03  # of a measured step, and of the model where it is right
MAX_ROUNDS = 8
DIFFERENCE = 1e-3
STEADY = 4  # rounds of `pp` micro-batches beyond which a pipeline's time is extrapolated from its first two
WHOLE = 1 << 30  # a micro-batch larger than any share of a replica: no accumulation
# What tables of measured plans leave unsaid. Frameworks accumulate sample by sample or not at all; whatever lies between is rarer.
UNSTATED: Mapping[str, Mapping[Any, float]] = {"micro_batch": {1: 1.0, 2: 0.15, 4: 0.15, WHOLE: 1.0}}
ATTENTION_OF_MATMUL = 0.65  # attention reaches this share of what products reach


@dataclass(frozen=True)
class Parameters:
    """matmul, memory: shares of the device's peak and bandwidth. overhead_s: per operator. nvlink, net: real over nominal speed of links.

    step_s: per step, outside the model (data, optimizer's host work). gamma: slow-down while gradients are reduced.
    """

    matmul: float = 0.40
    memory: float = 0.70
    overhead_s: float = 20e-6
    nvlink: float = 0.7
    net: float = 1.0
    step_s: float = 0.04
    gamma: float = 0.2

    def cost_model(self, topology: Topology, spread: float = 0.05) -> CostModel:
        links = {"nvlink": self.nvlink, "pcie": self.nvlink, "socket": self.nvlink, "net": self.net}
        roofline = Roofline(
            matmul=self.matmul, attention=self.matmul * ATTENTION_OF_MATMUL, memory=self.memory, overhead_s=self.overhead_s,
            spread=spread, source="calibrated",
        )  # fmt: skip
        return CostModel(topology.scaled(links), (roofline,), Nccl())

    @property
    def behaviour(self) -> Behaviour:
        return Behaviour(gamma={"gradient": (self.gamma, self.gamma)})


# Factors of doubt: one standard deviation of the logarithm.
DOUBT = Parameters(matmul=0.8, memory=0.2, overhead_s=0.9, nvlink=0.6, net=1.0, step_s=1.0, gamma=0.5)
NAMES = tuple(Parameters.__dataclass_fields__)
LARGE = 4e10  # operations of a product that shows what a device reaches
DOUBT_MEASURED = 0.1


def prior(kind: Device, dtype: str) -> tuple[Parameters, Parameters]:
    """(typical values, doubt) before any step is measured: where products of the very device were, what large ones reach is typical."""
    typical = Parameters()
    reached = []
    for table in shipped():
        if (table.op, table.device, table.dtype) == ("gemm", kind.name, dtype):
            names = [*table.keys, *dict(table.axes)]
            for key, times in table.rows.items():
                for place, seconds in zip(itertools.product(*(grid for _, grid in table.axes)), times, strict=True):
                    at = dict(zip(names, (*key, *place), strict=True))
                    if seconds is not None and (flops := 2 * at["m"] * at["n"] * at["k"]) >= LARGE:
                        reached.append(flops / seconds / kind.flops[dtype])
    if not reached:
        return typical, DOUBT
    return replace(typical, matmul=float(np.median(reached))), replace(DOUBT, matmul=DOUBT_MEASURED)


@dataclass(frozen=True)
class Row:
    """A measured step."""

    name: str
    workload: Workload
    plan: Plan
    topology: Topology
    seconds: float


@dataclass(frozen=True)
class Fit:
    """parameters; choice: what was scanned. left_out: name -> relative error of a row predicted from the others."""

    parameters: Parameters
    choice: Mapping[str, Any]
    misfit: float
    left_out: Mapping[str, float] = field(default_factory=dict)

    @property
    def spread(self) -> float:
        """Of a prediction: the root mean square of the left-out errors, and no less than the noise."""
        errors = list(self.left_out.values())
        return max(NOISE, math.sqrt(sum(e * e for e in errors) / len(errors))) if errors else 3 * NOISE


class Calibration:
    """Rows of one workload family. unknown: plan field -> candidate -> how likely; 'micro_batch' counts samples of a replica, others are
    Plan's."""

    def __init__(self, rows: Sequence[Row], unknown: Mapping[str, Mapping[Any, float]] | None = None) -> None:
        if not rows:
            raise InvalidParameter("calibration needs at least one measured row")
        self.rows = list(rows)
        self.unknown = dict(unknown or {})
        self.layers: dict[str, ExecutionGraph] = {}
        kind = next(iter(rows[0].topology.kinds.values()))
        self.typical, self.doubt = prior(kind, rows[0].workload.spec.dtype)

    def fit(self, left_out: bool = True) -> Fit:
        """The most probable parameters and choice. left_out: fit again without each row (the choice stays), to see how it would have been
        predicted. Error: InvalidParameter for a row without a measured time."""
        if bad := [row.name for row in self.rows if not row.seconds > 0]:
            raise InvalidParameter(f"row {bad[0]!r} has no positive measured time")
        best = self._fit(self.rows)
        if not left_out or len(self.rows) < 2:
            return best
        errors = {}
        for row in self.rows:
            without = self._maximum([r for r in self.rows if r is not row], best.choice)
            errors[row.name] = self.predict(without, row) / row.seconds - 1
        return replace(best, left_out=errors)

    def predict(self, fit: Fit, row: Row) -> float:
        return self._seconds(fit.parameters, row, fit.choice)

    def design(self, count: int) -> list[Row]:
        """The rows whose measurement would say most about the parameters, before any is measured: their times are not looked at.

        Greedy D-optimal design: each next row adds most to the determinant of the information, beside the priors and the rows before it.
        What is scanned counts as parameters that take each candidate.
        """
        if not 1 <= count <= len(self.rows):
            raise InvalidParameter(f"{count} rows are to be chosen out of {len(self.rows)}")
        typical = np.log([getattr(self.typical, name) for name in NAMES])
        slopes = [self._slopes(self.rows, choice, typical)[1] for choice in self._choices()]
        information = [np.diag([getattr(self.doubt, name) ** -2.0 for name in NAMES]) for _ in slopes]
        chosen: list[int] = []
        for _ in range(count):
            rest = [i for i in range(len(self.rows)) if i not in chosen]
            pairs = list(zip(information, slopes, strict=True))
            worth = {i: sum(np.linalg.slogdet(a + np.outer(s[i], s[i]) / NOISE**2)[1] for a, s in pairs) for i in rest}
            chosen.append(max(worth, key=lambda i: worth[i]))
            information = [a + np.outer(s[chosen[-1]], s[chosen[-1]]) / NOISE**2 for a, s in zip(information, slopes, strict=True)]
        return [self.rows[i] for i in chosen]

    def _choices(self) -> list[dict[str, Any]]:
        return [dict(zip(self.unknown, values, strict=True)) for values in itertools.product(*self.unknown.values())]

    def _fit(self, rows: Sequence[Row]) -> Fit:
        return min((self._maximum(rows, choice) for choice in self._choices()), key=lambda fit: fit.misfit)

    def _unlikely(self, choice: Mapping[str, Any]) -> float:
        """What the choice's prior adds to a misfit."""
        return -2 * sum(math.log(self.unknown[name][value] / max(self.unknown[name].values())) for name, value in choice.items())

    def plan(self, row: Row, choice: Mapping[str, Any]) -> Plan:
        """The row's plan with what was scanned filled in; a micro-batch larger than a replica's share is that share."""
        changes = dict(choice)
        if "micro_batch" in changes:
            share = row.workload.batch // row.plan.dp
            changes["num_micro_batches"] = max(1, share // min(share, changes.pop("micro_batch")))
        return replace(row.plan, **changes)

    def _seconds(self, parameters: Parameters, row: Row, choice: Mapping[str, Any]) -> float:
        plan = self.plan(row, choice)
        key = repr((row.workload, replace(plan, pp=1, chunks=1), plan.micro_batch(row.workload.batch)))
        if key not in self.layers:
            self.layers[key] = two_layers(row.workload, plan, row.topology.cluster)
        model, behaviour = parameters.cost_model(row.topology), parameters.behaviour

        def run(count: int) -> float:
            """Seconds with so many micro-batches of the same size."""
            batch = row.workload.batch * count // plan.num_micro_batches
            shorter = replace(plan, num_micro_batches=count)
            graph, costs = coarse(replace(row.workload, batch=batch), shorter, model, behaviour, self.layers[key])
            return execute(graph, costs, model.topology.capacity, behaviour).seconds

        if plan.pp == 1 or plan.num_micro_batches <= STEADY * plan.pp:
            return run(plan.num_micro_batches) + parameters.step_s
        one, two = run(plan.pp), run(2 * plan.pp)  # from there on every further round takes the same time
        return two + (plan.num_micro_batches / plan.pp - 2) * (two - one) + parameters.step_s

    def _predicted(self, rows: Sequence[Row], choice: Mapping[str, Any], x: Vector) -> Vector:
        parameters = Parameters(**dict(zip(NAMES, np.exp(x).tolist(), strict=True)))
        return np.log([self._seconds(parameters, row, choice) for row in rows])

    def _slopes(self, rows: Sequence[Row], choice: Mapping[str, Any], x: Vector, p: Vector | None = None) -> tuple[Vector, Vector]:
        """Logarithms of the predicted seconds, and their derivatives by the logarithms of the parameters [rows, parameters]."""
        p = self._predicted(rows, choice, x) if p is None else p
        columns = [(self._predicted(rows, choice, x + DIFFERENCE * unit) - p) / DIFFERENCE for unit in np.eye(len(x))]
        return p, np.stack(columns, 1)

    def _maximum(self, rows: Sequence[Row], choice: Mapping[str, Any]) -> Fit:
        typical = np.log([getattr(self.typical, name) for name in NAMES])
        doubt = np.array([getattr(self.doubt, name) for name in NAMES])
        measured = np.log([row.seconds for row in rows])

        def misfit(x: Vector, p: Vector) -> float:
            return float((((measured - p) / NOISE) ** 2).sum() + (((x - typical) / doubt) ** 2).sum())

        def predicted(x: Vector) -> Vector:
            return self._predicted(rows, choice, x)

        x, p = typical.copy(), predicted(typical)
        best = misfit(x, p)
        for _ in range(MAX_ROUNDS):
            _, slopes = self._slopes(rows, choice, x, p)
            curvature = slopes.T @ slopes / NOISE**2 + np.diag(doubt**-2.0)
            step = np.linalg.solve(curvature, slopes.T @ (measured - p) / NOISE**2 - (x - typical) / doubt**2)
            tried = ((x + scale * step) for scale in (1.0, 0.5, 0.25, 0.1))
            found = next(((y, q, m) for y in tried if (m := misfit(y, q := predicted(y))) < best), None)
            if found is None:
                break
            gain, (x, p, best) = best - found[2], found
            if gain < 0.05:
                break
        return Fit(Parameters(**dict(zip(NAMES, np.exp(x).tolist(), strict=True))), choice, best + self._unlikely(choice))


def mean_error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Mean of the absolute relative errors."""
    return sum(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)) / len(measured)


def kendall_tau(predicted: Sequence[float], measured: Sequence[float], apart: float = 0.03) -> float:
    """Pairs in the same order minus pairs in the other, over all that are measured more than `apart` (relative) from each other."""
    pairs = [(i, j) for i, j in itertools.combinations(range(len(measured)), 2) if abs(math.log(measured[i] / measured[j])) > apart]
    if not pairs:
        return 1.0
    return sum(math.copysign(1.0, (measured[i] - measured[j]) * (predicted[i] - predicted[j])) for i, j in pairs) / len(pairs)
