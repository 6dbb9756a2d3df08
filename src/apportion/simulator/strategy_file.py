"""A question to the simulator as plain data, as it stands in a STRATEGY.yaml: which model, on which cluster, under which strategy.

    model: gpt2-xl                      # a name of the library, its numbers, a config.json, or {cnn: vgg19} / {dlrm: {...}}
    batch: 16
    seq_len: 1024
    cluster: {node: dgx-a100, num_nodes: 2}
    plan: {pp: 2, tp: 4, dp: 2, num_micro_batches: 4, zero: 1}

or, in place of `plan`, the strategy tree itself (`strategy_tree`):

    mesh: {dp: 4, tp: 4}
    strategy:
      - {at: "", map: {}, split: {b: dp}}
      - {at: "layers.*.mlp.up", split: {f: tp}, shard: {optimizer: dp}}
    schedule: {num_micro_batches: 4, order: 1f1b}

Errors are InvalidParameter, naming the field. Knows the words of the file; the parts of the simulator give them meaning.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from apportion.core.errors import InvalidParameter
from apportion.core.model_spec import ModelSpec
from apportion.simulator.cluster import DeviceMesh
from apportion.simulator.coarse import coarse
from apportion.simulator.compiler import compile
from apportion.simulator.cost.calibrate import UNSTATED, Calibration, Parameters, Row
from apportion.simulator.cost.measured import Measured, MeasuredCollectives
from apportion.simulator.cost.model import CostModel, Roofline
from apportion.simulator.fields import is_of, typed
from apportion.simulator.htae import Behaviour
from apportion.simulator.memory import Overheads
from apportion.simulator.models import cnn
from apportion.simulator.models.dlrm import dlrm
from apportion.simulator.models.library import decoder
from apportion.simulator.ops import Model
from apportion.simulator.plan import Plan, Workload, fine
from apportion.simulator.run import NUM_DRAWS, Result, simulate
from apportion.simulator.strategy_tree import ITEMS, StrategyTree
from apportion.simulator.topology import CHANGES, Topology, topology

CNNS: Mapping[str, Callable[..., Model]] = {"vgg19": cnn.vgg19, "resnet50": cnn.resnet50, "inception": cnn.inception}
FIELDS = {
    "name": str, "model": str | Mapping[str, Any], "batch": Any, "seq_len": Any, "dtype": str, "fused_attention": bool, "dropout": bool,
    "cluster": str | Mapping[str, Any], "plan": Any, "mesh": Mapping[str, int], "strategy": list[Any], "schedule": Any, "bucket_mb": float,
    "grad_dtype": str, "prefetch": int, "optimizer_overlap": bool, "optimizer": str, "training": bool, "detail": str, "behaviour": Any,
    "overheads": Any, "calibration": str | Mapping[str, Any],
}  # fmt: skip
ENTRY = {
    "at": str, "map": Mapping[str, int] | None, "split": Mapping[str, str | list[str] | None], "shard": Mapping[str, str | list[str]],
    "store": Mapping[str, Mapping[str, Any] | None], "recompute": bool,
}  # fmt: skip
DETAILS = ("auto", "operators", "stages")
MANY_TASKS = 30_000  # operators of a plan beyond which 'auto' takes stages as wholes


@dataclass(frozen=True)
class Question:
    """One simulation, checked. workload and plan, or model and tree."""

    name: str
    batch: int
    cost_model: CostModel
    behaviour: Behaviour
    overheads: Overheads | None
    detail: str
    step_s: float = 0.0
    workload: Workload | None = None
    plan: Plan | None = None
    tree: StrategyTree | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def answer(self, num_draws: int = NUM_DRAWS) -> Result:
        keywords: dict[str, Any] = {
            "behaviour": self.behaviour, "overheads": self.overheads, "batch": self.batch, "num_draws": num_draws, "name": self.name,
            "outside_s": self.step_s,
        }  # fmt: skip
        cluster = self.cost_model.topology.cluster
        if self.tree is not None:
            return simulate(compile(self.tree.model, self.tree, cluster, **self.options), self.cost_model, **keywords)
        if self.workload is None or self.plan is None:
            raise InvalidParameter("a question needs a workload and a plan, or a strategy tree")
        if self.detail == "operators":
            return simulate(fine(self.workload, self.plan, cluster, **self.options), self.cost_model, **keywords)
        graph, costs = coarse(self.workload, self.plan, self.cost_model, self.behaviour)
        return simulate(graph, self.cost_model, costs=costs, **keywords)


def read_question(data: Mapping[str, Any], *, folder: Path | None = None, name: str = "") -> Question:
    """data: the file's contents. folder: where paths in it start."""
    typed("a strategy file", data, FIELDS, needed=("model", "batch", "cluster"))
    if ("plan" in data) == ("strategy" in data):
        raise InvalidParameter("a strategy file has either 'plan' or 'strategy'")
    links = cluster_of(data["cluster"])
    known, spread = read_calibration(data.get("calibration"), folder)
    cost_model = known.cost_model(links, spread) if known else CostModel(links, (Measured(), Roofline()), MeasuredCollectives())
    behaviour = (
        Behaviour(**typed("behaviour", data.get("behaviour", {}), Behaviour)) if "behaviour" in data or not known else known.behaviour
    )
    common: dict[str, Any] = {
        "name": data.get("name", name), "batch": _whole("batch", data["batch"]), "cost_model": cost_model, "behaviour": behaviour,
        "overheads": Overheads(**typed("overheads", data["overheads"], Overheads)) if "overheads" in data else None,
        "step_s": known.step_s if known else 0.0,
        "options": {k: data[k] for k in ("optimizer", "training") if k in data},
    }  # fmt: skip
    if "strategy" in data:
        return Question(detail="operators", tree=_tree(data, links, folder), **common)
    plan = Plan(**typed("plan", data["plan"], Plan))
    workload = workload_of(data, folder)
    if plan.num_devices > (size := sum(map(len, links.cluster.nodes))):
        raise InvalidParameter(f"the plan needs {plan.num_devices} devices, the cluster has {size}")
    return Question(detail=_detail(data.get("detail", "auto"), workload, plan), workload=workload, plan=plan, **common)


def cluster_of(data: str | Mapping[str, Any]) -> Topology:
    """'dgx-a100', or {node, num_nodes, used_devices, fabric} and whatever is to be another way in the node."""
    if not isinstance(data, Mapping):
        return topology(data)
    words = get_type_hints(topology) | CHANGES
    del words["changes"]
    return topology(**typed("a cluster", data, words, needed=("node",)))


def workload_of(data: Mapping[str, Any], folder: Path | None = None) -> Workload:
    """Of the fields model, batch, seq_len, dtype, fused_attention, dropout. The model must be a decoder."""
    if "seq_len" not in data:
        raise InvalidParameter("a strategy file of a decoder needs the field 'seq_len'")
    spec, gated = _decoder(data["model"], folder)
    if "dtype" in data:
        from dataclasses import replace

        spec = replace(spec, dtype=data["dtype"])
    flags = {k: data[k] for k in ("fused_attention", "dropout") if k in data}
    return Workload(spec, _whole("batch", data["batch"]), _whole("seq_len", data["seq_len"]), gated=gated, **flags)


def read_calibration(data: Mapping[str, Any] | str | None, folder: Path | None = None) -> tuple[Parameters | None, float]:
    """The parameters that `apportion simulate calibrate --out` wrote, or the path of its file; and the spread of what they predict."""
    if data is None:
        return None, 0.0
    if isinstance(data, str):
        data = _json(folder, data)
    spread = data.get("spread", 0.1)
    if not is_of(spread, float):
        raise InvalidParameter(f"spread of a calibration must be a number, got {spread!r}")
    return Parameters(**typed("a calibration", data.get("parameters", data), Parameters)), float(spread)


def read_rows(data: Mapping[str, Any], folder: Path | None = None, *, timed: bool = True) -> tuple[Calibration, list[Row]]:
    """A file of measured steps: fields of one family, `rows` with {plan, seconds, name and what differs}, `unknown`, and `predict`.

    timed: every row must have its seconds; False: they are still to be measured.
    """
    shared = ("model", "batch", "seq_len", "dtype", "fused_attention", "dropout", "cluster")
    facts = {name: FIELDS[name] for name in shared}
    typed(
        "a file of measured rows", data, facts | {"rows": list[Any], "unknown": Mapping[str, Any], "predict": list[Any]}, needed=("rows",)
    )
    found: list[list[Row]] = []
    for field_name in ("rows", "predict"):
        found.append([])
        for i, entry in enumerate(data.get(field_name, [])):
            where = f"entry {i + 1} of {field_name!r}"
            typed(where, entry, facts | {"name": str, "plan": Any, "seconds": float})
            if missing := {"plan", "model", "batch", "cluster"} - {*entry, *data} or (
                timed and field_name == "rows" and {"seconds"} - {*entry}
            ):
                raise InvalidParameter(f"{where} needs the field {sorted(missing)[0]!r}")
            whole = {**{k: data[k] for k in shared if k in data}, **entry}
            if isinstance(data.get("cluster"), Mapping) and isinstance(entry.get("cluster"), Mapping):
                whole["cluster"] = {**data["cluster"], **entry["cluster"]}
            links, plan = cluster_of(whole["cluster"]), Plan(**typed("plan", entry["plan"], Plan))
            if plan.num_devices > sum(map(len, links.cluster.nodes)):
                raise InvalidParameter(f"{where} needs {plan.num_devices} devices, its cluster has {sum(map(len, links.cluster.nodes))}")
            name = str(entry.get("name", f"pp{plan.pp} tp{plan.tp} dp{plan.dp}"))
            found[-1].append(Row(name, workload_of(whole, folder), plan, links, float(entry.get("seconds", 0.0))))
    unknown = data.get("unknown", {} if any("num_micro_batches" in entry["plan"] for entry in data["rows"]) else UNSTATED)
    weights = {name: values if isinstance(values, Mapping) else dict.fromkeys(values, 1.0) for name, values in unknown.items()}
    return Calibration(found[0], weights), found[1]


def _decoder(model: Any, folder: Path | None) -> tuple[ModelSpec, bool]:
    if isinstance(model, str) and model.endswith(".json"):
        config = _json(folder, model)
        return ModelSpec.from_hf(config), str(config.get("hidden_act", "gelu")) == "silu"
    return decoder(model)


def _json(folder: Path | None, name: str) -> dict[str, Any]:
    path = (folder or Path()) / name
    if not path.is_file():
        raise InvalidParameter(f"there is no file {str(path)!r}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidParameter(f"{str(path)!r} is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidParameter(f"{str(path)!r} holds {type(data).__name__}, not an object")
    return data


def _model(data: Mapping[str, Any], folder: Path | None) -> Model:
    model, batch = data["model"], _whole("batch", data["batch"])
    if isinstance(model, Mapping) and "cnn" in model:
        if model["cnn"] not in CNNS:
            raise InvalidParameter(f"unknown network {model['cnn']!r}; known: {', '.join(CNNS)}")
        build = CNNS[model["cnn"]]
        return build(batch, **_arguments({k: v for k, v in model.items() if k != "cnn"}, build))
    if isinstance(model, Mapping) and "dlrm" in model:
        return dlrm(batch, **_arguments(model["dlrm"] or {}, dlrm))
    return workload_of(data, folder).model()


def _tree(data: Mapping[str, Any], links: Topology, folder: Path | None) -> StrategyTree:
    tree = StrategyTree(_model(data, folder))
    mesh = links.cluster.mesh(**data.get("mesh", {"dp": 1}))
    for entry in data["strategy"]:
        typed("an entry of 'strategy'", entry, ENTRY, needed=("at",))
        there = tree.at(entry["at"])
        if "map" in entry:
            there.map(mesh.select(**(entry["map"] or {})))
        there.split(**entry.get("split", {}))
        for item, axes in entry.get("shard", {}).items():
            there.shard(item, axes)
        for item, cuts in entry.get("store", {}).items():
            there.store(item, **_storage(item, dict(cuts or {}), mesh))
        if entry.get("recompute"):
            there.recompute()
    for name in ("bucket_mb", "grad_dtype", "prefetch", "optimizer_overlap"):
        if name in data:
            setattr(tree, name, data[name])
    tree.schedule(**typed("schedule", data.get("schedule", {}), tree.schedule))
    return tree


def _storage(item: str, cuts: dict[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """Keywords for `Selection.store`. map: coordinates of a slice of the mesh, or the name of one device ('cpu:0': host memory)."""
    if item not in ITEMS:
        raise InvalidParameter(f"no memory config for {item!r}; known: {', '.join(ITEMS)}")
    where = cuts.pop("map", None)
    typed(f"store of {item!r}", cuts, dict.fromkeys(cuts, str | list[str] | None))
    if isinstance(where, str):
        return cuts | {"mesh": DeviceMesh.of((where,), device=1)}
    return cuts if where is None else cuts | {"mesh": mesh.select(**typed(f"map of {item!r}", where, dict.fromkeys(where, int)))}


def _detail(detail: str, workload: Workload, plan: Plan) -> str:
    if detail not in DETAILS:
        raise InvalidParameter(f"unknown detail {detail!r}; known: {', '.join(DETAILS)}")
    if detail != "auto":
        return detail
    each = 45 if plan.tp > 1 else 30  # tasks of a layer, forward, backward and update
    many = each * workload.spec.num_layers * plan.dp * plan.tp * plan.num_micro_batches
    return "stages" if many > MANY_TASKS and plan.zero < 3 else "operators"


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidParameter(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def _arguments(data: Mapping[str, Any], build: Callable[..., Model]) -> dict[str, Any]:
    """Keywords of a model's builder. Its first one, the batch, is the file's."""
    hints = get_type_hints(build)
    return typed("model", data, {name: hints[name] for name in tuple(inspect.signature(build).parameters)[1:]})
