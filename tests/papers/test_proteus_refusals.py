"""Strategies that cannot be: each is refused in one sentence that names the path, the dim, the axis or the ranks."""

from __future__ import annotations

import pytest

from apportion.core.errors import InvalidParameter
from apportion.simulator import presets
from apportion.simulator.cluster import Cluster
from apportion.simulator.compiler import compile
from apportion.simulator.ops import Model
from apportion.simulator.schedule import Action, merge
from apportion.simulator.strategy_tree import StrategyTree
from tests.papers.proteus import gpt

CLUSTER = Cluster.of(2, 4)


def refused(match: str, annotate, model: Model | None = None) -> None:
    tree = StrategyTree(model or gpt())
    with pytest.raises(InvalidParameter, match=match):
        presets.data_parallel(tree, CLUSTER.mesh(dp=2, tp=2))
        annotate(tree)
        compile(tree.model, tree)


@pytest.mark.parametrize(
    "match, annotate",
    [
        ("'layers.0.mlp.upp' names nothing.*nearest is 'layers.0.mlp.up'", lambda t: t.at("layers.0.mlp.upp")),
        ("'head' has no dim 'k'; it has b, s, m, v", lambda t: t.at("head").split(k="tp")),
        ("dim 's' of 'layers.0.attn.sdpa' .attention. cannot be split", lambda t: t.at("layers.0.attn.sdpa").split(s="tp")),
        ("over axis 'ep', which its mesh", lambda t: t.at("head").split(v="ep")),
        ("'head' splits two dims over one mesh axis", lambda t: t.at("head").split(v="tp", m="tp")),
        ("dim 'b' of 'embed' has extent 4, which cannot be split into 8", lambda t: t.at("").map(CLUSTER.mesh(dp=8))),
        ("dim 'b' of 'embed' has extent 1 here, which cannot be split into 2", lambda t: t.schedule(4)),
        ("batch of 4 at 'embed' cannot be cut into 3", lambda t: t.schedule(3)),
        ("unknown schedule 'zigzag'", lambda t: t.schedule(2, "zigzag")),
        ("max_ongoing has 3 numbers for 1 pipeline ranks", lambda t: t.schedule(2, max_ongoing=[3, 2, 1])),
        ("no memory config for 'weights'", lambda t: t.at("").shard("weights", "dp")),
        ("'head' stores over|sharded over axes", lambda t: t.at("head").shard("weight", "ep")),
        ("already split over", lambda t: t.at("head").split(v="tp").shard("weight", "tp")),
        ("ZeRO has stages 1, 2 and 3, not 4", lambda t: presets.zero(t, 4)),
    ],
)
def test_a_strategy_that_cannot_be_is_refused_by_path(match, annotate):
    refused(match, annotate)


def test_an_operator_without_a_mesh_is_named():
    model = gpt()
    tree = StrategyTree(model)
    tree.at("layers.*").map(CLUSTER.mesh(dp=2))
    with pytest.raises(InvalidParameter, match="no mesh is said for 'embed'"):
        compile(model, tree)


def test_a_schedule_that_deadlocks_names_both_ranks():
    first = [Action("forward", 0, 0), Action("backward", 0, 0), Action("forward", 0, 1)]
    lists = [first, [Action("forward", 1, 1), Action("backward", 1, 0)]]

    def needs(a: Action) -> list[Action]:
        return [Action("forward", 0, a.micro_batch)] if a.stage else [Action("backward", 1, 0)] if a.phase == "backward" else []

    with pytest.raises(InvalidParameter, match=r"rank 0 waits at backward of stage 0.*which rank 1 does not reach"):
        merge(lists, needs)
