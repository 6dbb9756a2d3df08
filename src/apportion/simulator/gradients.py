"""Gradients of weights on their way from the operators that make them to the update: summed where they arise, reduced in buckets.

A gradient that is stored whole is reduced once a step, after the last micro-batch. One that is stored in shards (ZeRO-2 and 3,
arXiv:1910.02054) is reduced after every micro-batch, as its whole is never kept; the shards are added while the next micro-batch computes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from apportion.simulator.execution_graph import ExecutionGraph
from apportion.simulator.layout import Layout, reduce_step
from apportion.simulator.lowering import Buckets, Lowering, Message, Value, union
from apportion.simulator.ops import gradient


@dataclass
class WeightGradients:
    """expected: terms of each gradient in one micro-batch. target: where a gradient is stored; in_shards: whether no device keeps it whole.

    done: weight -> its reduced sums, one for each group of devices that makes some.
    """

    low: Lowering
    buckets: Buckets
    expected: Mapping[str, int]
    num_micro_batches: int
    target: Callable[[str], Layout]
    in_shards: Callable[[str], bool]
    done: dict[str, list[Value]] = field(default_factory=dict)
    _terms: dict[tuple[str, int | None], dict[str, Value]] = field(default_factory=lambda: defaultdict(dict))
    _arrived: dict[tuple[str, int | None], int] = field(default_factory=lambda: defaultdict(int))
    _reduced: dict[str, list[Value]] = field(default_factory=dict)  # of the latest micro-batch, still to be added to `done`

    def add(self, tensor: str, source: str, value: Value, micro_batch: int) -> None:
        """One more term, from the operator `source`; with the last one the gradient is reduced."""
        early = self.in_shards(tensor)
        key = (tensor, micro_batch if early else None)
        terms = self._terms[key]
        terms[source] = self._accumulate(tensor, terms[source], value) if source in terms else value
        self._arrived[key] += 1
        if self._arrived[key] == self.expected[tensor] * (1 if early else self.num_micro_batches):
            if tensor in self._reduced:
                self._add_up(tensor)
            self._reduce(tensor, merged(self.low, tensor, list(self._terms.pop(key).values())))

    def end_backward(self, stage: int) -> None:
        """The backward pass of a stage and micro-batch has been written: what is in its buckets goes."""
        self.buckets.flush(stage)

    def finish(self) -> None:
        """Send and add what is left."""
        self.buckets.flush()
        for tensor in list(self._reduced):
            self._add_up(tensor)

    def _accumulate(self, tensor: str, total: Value, value: Value) -> Value:
        """In place, unless the first term is memory that others read."""
        return self.low.add(f"{gradient(tensor)}.accumulate", total, value, "partial", is_own(self.low.graph, total))

    def _reduce(self, tensor: str, values: list[Value]) -> None:
        target = self.target(tensor)
        if len(values) > 1 and (one := union(values)) is not None and one.layout.devices == target.devices:
            values = [one]
        reduced = []
        for value in values:
            if value.layout.num_terms > 1:
                messages: list[Message] = []
                value = self.low.take(value, reduce_step(value.layout, target), "grad", messages)
                self.buckets.put(messages)
            reduced.append(value)
        if tensor in self.done:
            self._reduced[tensor] = reduced
        else:
            self.done[tensor] = reduced

    def _add_up(self, tensor: str) -> None:
        """The last micro-batch's sums to those before."""
        pairs = zip(self.done[tensor], self._reduced.pop(tensor), strict=True)
        name = f"{gradient(tensor)}.accumulate"
        self.done[tensor] = [self.low.add(name, total, new, "grad", is_own(self.low.graph, total)) for total, new in pairs]


def is_own(graph: ExecutionGraph, value: Value) -> bool:
    """Whether the memory is the gradient's alone, so that it may be added to in place."""
    return all(graph.buffers[view.buffer].kind in ("partial", "grad") for view in value.views.values())


def merged(low: Lowering, tensor: str, values: list[Value]) -> list[Value]:
    """Values of one layout become one, added where they are: one reduction then serves all."""
    found: dict[Layout, Value] = {}
    for value in values:
        same = found.get(value.layout)
        found[value.layout] = low.add(f"{gradient(tensor)}.merge", same, value, "partial", False) if same else value
    return list(found.values())
