"""From calibration to predictions: an exact table of operators, tables of messages per link, and four numbers that whole steps settle."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from functools import cache

from apportion.simulator.execution_graph import COMPUTE
from apportion.simulator.htae import Behaviour, Cost, execute
from apportion.simulator.memory import Overheads, memory_of
from recipes.simulator.cases import CALIBRATION_MODELS, Case, graph_of

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
            if task.op is not None:
                key, *rest = signature(graph, task)
                found.setdefault(key, rest)
    return found


@cache
def prepared(model, strategy):
    """(the graph as a host issues it, the key of each compute task)."""
    graph = issued(graph_of(model, strategy))
    return graph, [signature(graph, task)[0] if task.op is not None else None for task in graph.tasks]


def issued(graph):
    """The graph with what a host adds: a communication starts no sooner than its members have walked up to it."""
    last, tasks = {}, []
    for task in graph.tasks:
        after = task.after
        if task.kind != COMPUTE and task.stream != COMPUTE:
            after = tuple(sorted({*after, *(last[d] for d in task.devices if d in last)}))
        else:
            for device in task.devices:
                last[device] = task.id
        tasks.append(replace(task, after=after))
    return replace(graph, tasks=tasks)


class Predictor:
    """calibration: what `calibrate` wrote. fitted: the numbers that its whole steps settle."""

    def __init__(self, calibration):
        self.operators, self.links, self.steps = calibration["operators"], calibration["links"], calibration["steps"]
        self.fitted = {"alone": (1.0, 0.0), "together": (1.0, 0.0)} | dict.fromkeys(self.links, (1.0, 1.0))
        self.fitted["alone"] = self._scale("alone", "single", ["loopback"])
        self.fitted["together"] = self._scale("together", "ddp-no-overlap", ["loopback"])
        for link in self.links:
            self.fitted[link] = (self._messages(link), 1.0)
            self.fitted[link] = (self.fitted[link][0], self._gamma(link))

    def _measured(self, strategy, links):
        for link in links:
            for model in CALIBRATION_MODELS:
                times = self.steps.get(f"{model} {strategy} {link}")
                if times:
                    yield Case(model, strategy, link), min(times)

    def _scale(self, mode, strategy, links):
        """(factor on operators, seconds per task): priors 1 and 15 us, a tenth and a factor of two wide."""
        best = None
        for factor in [0.7 + 0.01 * i for i in range(80)]:
            for overhead in (5e-6, 10e-6, 15e-6, 20e-6, 30e-6, 45e-6, 60e-6):
                self.fitted[mode] = (factor, overhead)
                misfit = sum((math.log(self.seconds(case) / t) / 0.02) ** 2 for case, t in self._measured(strategy, links))
                misfit += (math.log(factor) / 0.1) ** 2 + (math.log(overhead / 15e-6) / 0.7) ** 2
                if best is None or misfit < best[0]:
                    best = misfit, factor, overhead
        return best[1:]

    def _messages(self, link):
        def misfit(factor):
            self.fitted[link] = (factor, 1.0)
            return (
                sum((math.log(self.seconds(c) / t) / 0.02) ** 2 for c, t in self._measured("ddp-no-overlap", [link]))
                + (math.log(factor) / 0.1) ** 2
            )

        return min([0.6 + 0.02 * i for i in range(60)], key=misfit)

    def _gamma(self, link):
        """Of the measured slow-downs, the multiple that one overlapped run per model asks for."""

        def misfit(times):
            self.fitted[link] = (self.fitted[link][0], times)
            return sum((math.log(self.seconds(c) / t) / 0.02) ** 2 for c, t in self._measured("ddp-1mb", [link])) + (times - 1) ** 2

        return min(GAMMAS, key=misfit)

    def costs(self, case, graph, plain=False):
        mode = "alone" if case.num_ranks == 1 else "together"
        factor, overhead = self.fitted[mode]
        table, costs = self.operators[mode], []
        for task, key in zip(graph.tasks, prepared(case.model, case.strategy)[1], strict=True):
            if key is not None:
                costs.append(Cost(table[key] * factor + overhead, source="measured"))
            elif task.stream == COMPUTE:
                costs.append(Cost(task.num_bytes / 5e9 + overhead, source="copy"))
            else:
                seconds, latency = self._message(case.link, task.kind, max(1024, task.num_bytes), plain)
                seconds, latency = seconds * self.fitted[case.link][0], latency * self.fitted[case.link][0]
                costs.append(
                    Cost(latency, seconds - latency, 1.0, {0 if task.kind != "p2p" or task.devices[0] == "gpu:0" else 1: 1.0}, "measured")
                )
        return costs

    def _message(self, link, kind, size, plain):
        """(seconds, of which latency); the wire is counted in seconds of itself, so that links have capacity 1."""
        grid = sorted((int(k.split()[1]), v) for k, v in self.links[link].items() if k.split()[0] == kind)
        if plain:  # one latency, one bandwidth, whatever the collective
            (a, ta), (b, tb) = (
                sorted((int(k.split()[1]), v) for k, v in self.links[link].items() if k.split()[0] == "all_reduce")[i] for i in (0, -1)
            )
            return ta + (size - a) * (tb - ta) / (b - a), ta
        below = [g for g in grid if g[0] <= size] or grid[:1]
        above = [g for g in grid if g[0] >= size]
        if not above:  # beyond the table: the slope of its end
            (a, ta), (b, tb) = grid[-2:]
            return tb + (size - b) * (tb - ta) / (b - a), grid[0][1]
        (a, ta), (b, tb) = below[-1], above[0]
        share = 0.0 if a == b else math.log(size / a) / math.log(b / a)
        return max(math.exp(math.log(ta) * (1 - share) + math.log(tb) * share), grid[0][1]), 0.9 * grid[0][1]

    def behaviour(self, case, **changes):
        options = {"gamma": {}, "blocking": () if case.overlap else ("gradient", "feature", "prefetch")}
        if case.num_ranks > 1:
            link, times = self.links[case.link], self.fitted[case.link][1]
            pair = (link["gamma compute"] * times, link["gamma message"] * times)
            options["gamma"] = dict.fromkeys(("gradient", "feature", "prefetch"), pair)
        return Behaviour(**(options | changes))

    def seconds(self, case, plain=False, **changes):
        graph, _ = prepared(case.model, case.strategy)
        return execute(graph, self.costs(case, graph, plain), [1.0, 1.0], self.behaviour(case, **changes)).seconds

    def all(self, case):
        graph, _ = prepared(case.model, case.strategy)
        costs = self.costs(case, graph)
        timeline = execute(graph, costs, [1.0, 1.0], self.behaviour(case))
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
            "no_overlap": self.seconds(case, blocking=("gradient", "feature", "prefetch")),
            "sum_of_operators": max(busy.values()),
            "plain_alpha_beta": self.seconds(case, plain=True),
            "peak_bytes": max(m.peak for m in memory.values()),
        }
