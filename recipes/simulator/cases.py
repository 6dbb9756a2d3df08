"""What is run for real: small models, strategies over two processes, links. A case is a compiled graph and whether it overlaps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from apportion.simulator import presets
from apportion.simulator.cluster import Cluster
from apportion.simulator.compiler import compile
from apportion.simulator.models.builder import Builder
from apportion.simulator.models.cnn import vgg19
from apportion.simulator.models.library import decoder
from apportion.simulator.models.transformer import transformer
from apportion.simulator.strategy_tree import StrategyTree

CLUSTER = Cluster.of(2, 1, "gpu")  # named so because 'cpu:<n>' is a node's host memory; each 'device' is one process on one core
LINKS = ("loopback", "1gbit", "200mbit")
GPTS = {"gpt-4x256": (4, 256, 4, 8), "gpt-6x384": (6, 384, 6, 8), "gpt-2x128": (2, 128, 4, 16)}  # layers, hidden, heads, batch
MLPS = {"mlp-2x1024": (2, 1024, 256), "mlp-4x2048": (4, 2048, 128), "mlp-3x768": (3, 768, 256)}  # layers, width, batch
CNNS = {"cnn-small": (16, 64), "cnn-wide": (16, 32)}  # batch, image
# Calibration sees these alone; what is predicted is of the other models.
CALIBRATION_MODELS = ("gpt-2x128", "mlp-3x768", "cnn-wide")
SPLITS = {"ddp-25mb": {}, "ddp-1mb": {"bucket": 1.0}, "ddp-no-overlap": {"overlap": False}, "accumulate-4": {"m": 4},
          "zero1": {"zero": 1}, "zero2": {"zero": 2}, "zero3": {"zero": 3}, "ddp-recompute": {"recompute": True}}  # fmt: skip
PIPES = {"pp2-gpipe-1": {"m": 1, "order": "gpipe"}, "pp2-gpipe-2": {"m": 2, "order": "gpipe"}, "pp2-gpipe-4": {"m": 4, "order": "gpipe"},
         "pp2-gpipe-8": {"m": 8, "order": "gpipe"}, "pp2-1f1b-4": {"m": 4, "order": "1f1b"}}  # fmt: skip
TENSOR = {"tp2": {"tp": True}, "tp2-sp": {"tp": True, "sp": True}}
SINGLE = {"single": {}, "single-recompute": {"recompute": True}, "single-accumulate-4": {"m": 4}}
STRATEGIES = {**SINGLE, **SPLITS, **PIPES, **TENSOR}


@dataclass(frozen=True)
class Case:
    model: str
    strategy: str
    link: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.strategy} {self.link}"

    @property
    def num_ranks(self) -> int:
        return 1 if self.strategy in SINGLE else 2

    @property
    def overlap(self) -> bool:
        return bool(STRATEGIES[self.strategy].get("overlap", True))


HELD_OUT = {
    "mlp-2x1024": ("ddp-25mb", "ddp-1mb", "ddp-no-overlap", "accumulate-4", "zero1", "zero2", "zero3", "tp2", "pp2-gpipe-4", "pp2-1f1b-4"),
    "gpt-4x256": (
        "ddp-25mb", "ddp-1mb", "ddp-no-overlap", "accumulate-4", "ddp-recompute", "zero1", "zero3", "tp2", "tp2-sp", "pp2-gpipe-2",
        "pp2-gpipe-8", "pp2-1f1b-4",
    ),
    "cnn-small": ("ddp-25mb", "ddp-no-overlap", "accumulate-4", "ddp-recompute", "zero2", "pp2-1f1b-4"),
    "mlp-4x2048": ("ddp-25mb", "zero1", "tp2", "pp2-1f1b-4"),
    "gpt-6x384": ("ddp-25mb", "zero2", "tp2", "pp2-1f1b-4"),
}  # fmt: skip
LOOPBACK_ONLY = ("mlp-4x2048", "gpt-6x384")


def all_cases() -> list[Case]:
    """Held out: none of these models is calibrated on. Over loopback first, singles before all."""
    found = [Case(model, s, "loopback") for model in HELD_OUT for s in (SINGLE if model == "gpt-4x256" else ("single",))]
    for link in LINKS:
        found += [Case(m, s, link) for m, kinds in HELD_OUT.items() for s in kinds if link == "loopback" or m not in LOOPBACK_ONLY]
    return found


def model_of(name: str):
    if name in GPTS:
        layers, hidden, heads, batch = GPTS[name]
        numbers = {"num_layers": layers, "hidden": hidden, "num_heads": heads, "ffn": 4 * hidden, "vocab": 2048, "gated": False}
        spec, gated = decoder(numbers)
        return transformer(replace(spec, dtype="float32"), batch, 128, gated=gated, name=name)
    if name in MLPS:
        layers, width, batch = MLPS[name]
        b = Builder(name, "float32")
        x, labels = b.input("x", batch, width), b.input("labels", batch, dtype="int32")
        for i in range(layers):
            x = b.op(f"layers.{i}.up", "einsum", "b m, f m -> b f", x, b.weight(f"layers.{i}.up", width, width))
            x = b.op(f"layers.{i}.act", "relu", "b f -> b f", x)
            x = b.op(f"layers.{i}.down", "einsum", "b f, m f -> b m", x, b.weight(f"layers.{i}.down", width, width))
        x = b.op("head", "einsum", "b m, v m -> b v", x, b.weight("head", 128, width))
        b.op("loss", "cross_entropy", "b v, b -> ", x, labels, opaque="v", scale=1 / batch)
        return b.model
    batch, image = CNNS[name]
    return vgg19(batch, image, 100, width=0.25 if name == "cnn-wide" else 0.125)


@cache
def graph_of(model_name: str, strategy: str):
    options = STRATEGIES[strategy]
    model = model_of(model_name)
    tree = StrategyTree(model)
    if strategy in SINGLE:
        tree.at("").map(CLUSTER.mesh(dp=1))
    elif strategy in SPLITS:
        presets.data_parallel(tree, CLUSTER.mesh(dp=2))
        if options.get("zero"):
            presets.zero(tree, options["zero"])
    elif strategy in TENSOR:
        tree.at("").map(CLUSTER.mesh(tp=2))
        if model_name in GPTS:
            presets.tensor_parallel(tree, sequence_parallel=bool(options.get("sp")))
        else:
            tree.at("layers.*.*").split(f="tp")
    else:
        _halves(tree, model_name)
    if options.get("recompute"):
        tree.at("layers.*" if model_name in GPTS or model_name in MLPS else "features.*").recompute()
    tree.bucket_mb = options.get("bucket", 25.0)
    tree.schedule(options.get("m", 1), options.get("order", "1f1b"))
    return compile(model, tree, CLUSTER)


def _halves(tree, model_name: str) -> None:
    """Two pipeline stages: the first and the second half of the operators, cut between layers."""
    first, second = (CLUSTER.mesh(pp=2).select(pp=i) for i in range(2))
    if model_name in GPTS:
        presets.pipeline(tree, CLUSTER.mesh(pp=2), GPTS[model_name][0])
        return
    paths = list(tree.model.ops)
    if model_name in MLPS:
        half = next(i for i, p in enumerate(paths) if p.startswith(f"layers.{MLPS[model_name][0] // 2}."))
    else:
        half = next(i for i, p in enumerate(paths) if i >= len(paths) // 3 and tree.model.ops[p].kind == "max_pool") + 1
    for i, path in enumerate(paths):
        tree.at(path).map(first if i < half else second)
