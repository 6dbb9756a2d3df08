"""From calibration to predictions: an exact table of operators, tables of messages per link, and four numbers that whole steps settle."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from functools import cache

from apportion.simulator.execution_graph import COMPUTE
from apportion.simulator.htae import Behaviour, Cost, execute
from apportion.simulator.memory import Overheads, memory_of
from recipes.simulator.cases import CALIBRATION_MODELS, Case, graph_of
from recipes.simulator.host import walked

SIZES = [2**i for i in range(10, 28, 2)]  # bytes of messages and copies that are timed
NOISE = 0.03  # of a measured step
GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


def signature(graph, task):
    """(key, op, part, input shapes, output shapes) of a compute task: what its time depends on."""
    op = graph.ops[task.op]
    shapes = [tuple(high - low for low, high in view.box) for view in task.reads]
    outs = [tuple(high - low for low, high in view.box) for view in task.writes]
    part = {name: (0, high - low) for name, (low, high) in task.part.items()}
    attrs = {k: v for k, v in op.attrs.items() if k in ("stride", "padding", "kernel", "wrt")}
    dims = [[list(map(str, operand.dims)) for operand in side] for side in (op.inputs, op.outputs)] if op.kind in ("einsum", "add") else ""
    return f"{op.kind} {shapes} {outs} {attrs} {_anonymous(dims)}", op, part, shapes, outs


def _anonymous(dims):
    names = {}
    return [[[names.setdefault(n, len(names)) for n in operand] for operand in side] for side in dims] if dims else ""


def signatures(graphs):
    found = {}
    for model, strategy in graphs:
        graph = graph_of(model, strategy)
        for task in graph.tasks:
            if task.kind == COMPUTE:
                key, *rest = signature(graph, task)
                found.setdefault(key, rest)
    return found


@cache
def prepared(model, strategy, overlap):
    """(the graph as the host walks it, the key of each compute task)."""
    graph = walked(graph_of(model, strategy), overlap)
    return graph, [signature(graph, task)[0] if task.kind == COMPUTE else None for task in graph.tasks]


def read(table, kind, size):
    """Seconds of a message or copy of so many bytes: between two timed sizes in logarithms, beyond the last along its slope."""
    grid = sorted((int(key.split()[1]), seconds) for key, seconds in table.items() if key.startswith(f"{kind} "))
    (low, first), (high, last) = next((pair for pair in itertools.pairwise(grid) if pair[1][0] >= size), grid[-2:])
    if size > high:
        return last + (size - high) * (last - first) / (high - low)
    share = max(0.0, math.log(max(size, 1) / low) / math.log(high / low))
    return math.exp(math.log(first) * (1 - share) + math.log(last) * share)


class Predictor:
    """calibration: what `calibrate` wrote. fitted: the numbers that its whole steps settle."""

    def __init__(self, calibration):
        self.operators, self.links, self.steps = calibration["operators"], calibration["links"], calibration["steps"]
        self.fitted = {"operators": (1.0, 15e-6)} | dict.fromkeys(self.links, (1.0, 1.0))
        self.fitted["operators"] = self._scale()
        for link in self.links:
            self.fitted[link] = (self._messages(link), 1.0)
            self.fitted[link] = (self.fitted[link][0], self._gamma(link))

    def _measured(self, strategy, link):
        for model in CALIBRATION_MODELS:
            if times := self.steps.get(f"{model} {strategy} {link}"):
                yield Case(model, strategy, link), statistics.median(times)

    def _misfit(self, cases):
        return sum((math.log(self.seconds(case) / seconds) / NOISE) ** 2 for case, seconds in cases)

    def _scale(self):
        """(factor on operators, seconds per task): priors 1 and 15 us, a tenth and a factor of two wide."""
        seen = [*self._measured("single", "loopback"), *self._measured("ddp-no-overlap", "loopback")]

        def misfit(scale):
            self.fitted["operators"] = scale
            return self._misfit(seen) + (math.log(scale[0]) / 0.1) ** 2 + (math.log(scale[1] / 15e-6) / 0.7) ** 2

        factors, overheads = [0.8 + 0.01 * i for i in range(50)], (5e-6, 10e-6, 15e-6, 20e-6, 30e-6, 45e-6, 60e-6)
        return min(itertools.product(factors, overheads), key=misfit)

    def _messages(self, link):
        """A factor on the times of messages, in steps that overlap nothing."""

        def misfit(factor):
            self.fitted[link] = (factor, 1.0)
            return self._misfit(self._measured("ddp-no-overlap", link)) + (math.log(factor) / 0.1) ** 2

        return min([0.6 + 0.02 * i for i in range(60)], key=misfit)

    def _gamma(self, link):
        """Of the measured slow-downs, the multiple that one overlapped run per model asks for."""

        def misfit(times):
            self.fitted[link] = (self.fitted[link][0], times)
            return self._misfit(self._measured("ddp-1mb", link)) + (times - 1) ** 2

        return min(GAMMAS, key=misfit)

    def costs(self, case, graph, keys, plain=False):
        table, link, costs = self.operators["alone" if case.num_ranks == 1 else "together"], self.links[case.link], []
        factor, overhead = self.fitted["operators"]
        for task, key in zip(graph.tasks, keys, strict=True):
            if key is not None:
                costs.append(Cost(table[key] * factor + overhead, source="measured"))
            elif task.stream == COMPUTE:
                costs.append(
                    Cost(read(link, "copy", task.num_bytes) + (link["issue"] if task.kind == "pack" else overhead), source="measured")
                )
            else:
                costs.append(self._message(case.link, task, plain))
        return costs

    def _message(self, name, task, plain):
        """The wire is counted in seconds of itself, so that links have capacity 1: one each way, a collective takes both."""
        link, factor = self.links[name], self.fitted[name][0]
        least = read(link, task.kind, SIZES[0])
        seconds = read(link, task.kind, task.num_bytes)
        if plain:  # one latency, one bandwidth, whatever the collective
            ends = [(size, read(link, "all_reduce", size)) for size in (SIZES[0], SIZES[7])]
            (_, least), (large, most) = ends
            seconds = least + task.num_bytes * (most - least) / large
        latency = max(least - link["issue"], 1e-6)  # handing it over is the host's
        links = {0: 1.0, 1: 1.0} if task.kind != "p2p" else {int(task.devices[0] != "gpu:0"): 1.0}
        return Cost(latency * factor, max(seconds - least, 1e-9) * factor, 1.0, links, "measured")

    def behaviour(self, case, **changes):
        gamma = {}
        if case.num_ranks > 1:
            link, times = self.links[case.link], self.fitted[case.link][1]
            gamma = dict.fromkeys(("gradient", "feature", "prefetch"), (link["gamma compute"] * times, link["gamma message"] * times))
        return Behaviour(**({"gamma": gamma} | changes))

    def run(self, case, plain=False, waits=False, **changes):
        """(graph, costs, timeline). waits: for every message at once, whatever the case says."""
        graph, keys = prepared(case.model, case.strategy, case.overlap and not waits)
        costs = self.costs(case, graph, keys, plain)
        return graph, costs, execute(graph, costs, [1.0, 1.0], self.behaviour(case, **changes))

    def seconds(self, case, **changes):
        return self.run(case, **changes)[2].seconds

    def all(self, case):
        graph, costs, timeline = self.run(case)
        busy = defaultdict(float)
        for task, cost in zip(graph.tasks, costs, strict=True):
            for device in task.devices:
                busy[device] += cost.total
        memory = memory_of(graph, timeline, Overheads.none())
        return {
            "full": timeline.seconds,
            "whole_op": self.seconds(case, overlap="whole_op"),
            "no_slowdown": self.seconds(case, overlap="none"),
            "no_sharing": self.seconds(case, share=False),
            "no_overlap": self.seconds(case, waits=True),
            "sum_of_operators": max(busy.values()),
            "plain_alpha_beta": self.seconds(case, plain=True),
            "peak_bytes": max(m.peak for m in memory.values()),
        }
