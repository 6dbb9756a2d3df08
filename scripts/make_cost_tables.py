"""Makes the measured tables that the simulator ships (src/apportion/kernels/tables) from published measurements.

    python scripts/make_cost_tables.py ../shared/data        # needs pyarrow

A table keeps a grid of what was measured; the rows that it leaves out are then read from the table, and their errors are its spread.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apportion.simulator.cost.measured import best_seconds
from apportion.simulator.cost.table import FORMAT, table_of
from apportion.simulator.topology import device

TABLES = Path(__file__).parents[1] / "src" / "apportion" / "kernels" / "tables"
H200 = "NVIDIA AIConfigurator, H200 SXM, vLLM 0.24.0"
H200_NCCL = "NVIDIA AIConfigurator, H200 SXM, NCCL 2.29.2"
AIC = {
    "origin": "github.com/ai-dynamo/aiconfigurator, commit 095f58a51c4ca8e61b66ec108d86f223f8d559ce",
    "licence": "Apache-2.0",
}
VIDUR = {"origin": "github.com/microsoft/vidur, commit 7d47513363ec447a741ac5e47241580b47724fbf", "licence": "MIT"}
FP8 = "float8_e4m3fn"

Row = tuple[Mapping[str, float], float]  # a point, microseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    TABLES.mkdir(exist_ok=True)
    h200, vidur = data / "perf-h200-vllm-0.24", data / "perf-vidur"
    gemms(h200)
    attention(h200)
    experts(h200)
    collectives(h200, vidur)
    operators(vidur)


def gemms(folder: Path) -> None:
    m = [1, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768]
    nk = [64, 128, 256, 512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 65536]
    rows = parquet(folder / "gemm/gemm_perf.parquet")
    for name, dtype in (("bfloat16", "bfloat16"), ("fp8", FP8)):
        points = [({k: r[k] for k in "mnk"}, r["latency"] * 1e3) for r in rows if r["gemm_dtype"] == name]
        write("h200-sxm", "gemm", dtype, (), {"m": m, "n": nk, "k": nk}, points, H200, AIC)


def attention(folder: Path) -> None:
    for kind, name, length, extra in (
        ("prefill_attention", "context", "isl", {"s": [16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]}),
        ("decode_attention", "generation", "step", {"context": [2, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]}),
    ):
        rows = parquet(folder / f"attention/{name}_attention_perf.parquet")
        for stored, dtype in (("bfloat16", "bfloat16"), ("fp8", FP8)):
            points = []
            for r in rows:
                if r["kv_cache_dtype"] == stored and r["window_size"] == 0 and r["head_dim"] in (64, 128):
                    kv = r["num_key_value_heads"]
                    tokens = r[length] if length == "isl" else r[length] + 1
                    point = {"sequences": r["batch_size"] * kv, "heads": r["num_heads"] / kv, "head_dim": r["head_dim"]}
                    points.append(({**point, next(iter(extra)): tokens}, r["latency"] * 1e3))
            if kind == "prefill_attention" and stored == "fp8":
                continue  # the products run in bfloat16 whatever the cache holds
            axes = {**extra, "sequences": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048], "heads": [1, 2, 4, 8, 16]}
            write("h200-sxm", kind, dtype, ("head_dim",), axes, points, H200, AIC)


def experts(folder: Path) -> None:
    rows = parquet(folder / "moe/moe_perf.parquet")
    for name, dtype in (("bfloat16", "bfloat16"), ("fp8", FP8)):
        points = []
        for r in rows:
            if r["moe_dtype"] == name and r["moe_tp_size"] == r["moe_ep_size"] == 1 and r["distribution"] == "power_law_1.2":
                keys = {"hidden": r["hidden_size"], "ffn": r["inter_size"], "top_k": r["topk"], "experts": r["num_experts"]}
                points.append(({**keys, "tokens": r["num_tokens"]}, r["latency"] * 1e3))
        tokens = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
        write("h200-sxm", "experts", dtype, ("hidden", "ffn", "top_k", "experts"), {"tokens": tokens}, points, H200, AIC, near=True)


def collectives(h200: Path, vidur: Path) -> None:
    rows = parquet(h200 / "comm/nccl/nccl_perf.parquet")
    sizes = [2**i for i in range(9, 31)]
    names = {"all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter", "alltoall": "all_to_all"}
    for theirs, ours in names.items():
        # their message_size counts elements of two bytes
        points = [
            ({"nodes": 1, "ranks": r["num_gpus"], "bytes": 2 * r["message_size"]}, r["latency"] * 1e3)
            for r in rows if r["op_name"] == theirs and r["nccl_dtype"] == "half"
        ]  # fmt: skip
        write("h200-sxm", ours, "any", ("nodes", "ranks"), {"bytes": sizes}, points, H200_NCCL, AIC)
    for name, kind, file in (("a100-sxm-80", "all_reduce", "a100_dgx/all_reduce"), ("a100-sxm-80", "p2p", "a100_dgx/send_recv"),
                             ("h100-sxm", "all_reduce", "h100_dgx/all_reduce")):  # fmt: skip
        found = defaultdict(list)
        for r in read_csv(vidur / f"network/{file}.csv"):
            ranks, per_node = int(r["num_workers"]), int(r["devices_per_node"])
            op = file.split("/")[1]
            found[ranks // per_node, ranks, int(r["size"])].append(float(r[f"time_stats.{op}.median"]) * 1e3)
        points = [({"nodes": a, "ranks": b, "bytes": c}, statistics.median(times)) for (a, b, c), times in found.items()]
        grid = nearest_of([c for _, _, c in found], [2048 * 2 ** (i / 2) for i in range(32)])
        write(name, kind, "any", ("nodes", "ranks"), {"bytes": grid}, points, f"Vidur, {name.split('-')[0].upper()} DGX, {kind}", VIDUR)


def operators(vidur: Path) -> None:
    for name, path in (("h100-sxm", "h100/meta-llama/Llama-2-7b-hf"), ("a100-sxm-80", "a100/meta-llama/Meta-Llama-3-8B")):
        products: dict[tuple[int, int, int], list[float]] = defaultdict(list)
        for r in read_csv(vidur / f"compute/{path}/mlp.csv"):
            t, tp = int(r["num_tokens"]), int(r["num_tensor_parallel_workers"])
            h, ffn, heads, kv = int(r["n_embd"]), int(r["n_expanded_embd"]), int(r["n_head"]), int(r["n_kv_head"])
            d = h // heads
            for op, n, k in (("attn_pre_proj", d * (heads + 2 * kv) // tp, h), ("attn_post_proj", h, h // tp),
                             ("mlp_up_proj", 2 * ffn // tp, h), ("mlp_down_proj", h, ffn // tp)):  # fmt: skip
                products[t, n, k].append(float(r[f"time_stats.{op}.median"]) * 1e3)
        points = [({"m": m, "n": n, "k": k}, statistics.median(times)) for (m, n, k), times in products.items() if min(times) > 0]
        grid = nearest_of([m for m, _, _ in products], [1, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096])
        source = f"Vidur, {name.split('-')[0].upper()}, {path.split('/')[-1]}"
        write(name, "gemm", "bfloat16", ("n", "k"), {"m": grid}, points, source, VIDUR, near=True)


def write(
    name: str, op: str, dtype: str, keys: Sequence[str], axes: Mapping[str, Sequence[float]], points: Sequence[Row], source: str,
    origin: Mapping[str, str], near: bool = False,
) -> None:  # fmt: skip
    """The table, and what it says of the points it does not hold."""
    kind = device(name)
    grid: dict[tuple[float, ...], dict[tuple[float, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    for point, micros in points:
        grid[tuple(point[k] for k in keys)][tuple(point[a] for a in axes)].append(micros)
    used = {a: [v for v in values if any(at[i] == v for row in grid.values() for at in row)] for i, (a, values) in enumerate(axes.items())}
    rows = []
    for key in sorted(grid):
        values = [short(statistics.median(grid[key][at])) if at in grid[key] else None for at in product(list(used.values()))]
        if any(values):
            rows.append([list(key), values])
    data: dict[str, Any] = {
        "format": FORMAT, "op": op, "device": name, "dtype": dtype, "source": source, **origin, "unit": "microseconds",
        "made_by": "scripts/make_cost_tables.py", "near": near, "spread": 0.0, "keys": list(keys),
        "axes": [[a, values] for a, values in used.items()], "rows": rows,
    }  # fmt: skip
    table = table_of(data)
    best: Callable[[Mapping[str, float]], float] = lambda at: best_seconds(op, dtype, at, kind)  # noqa: E731
    errors = []
    for point, micros in points:
        reading = table.read(point, best)
        if reading is not None and reading.how == "interpolated":
            errors.append(math.log(reading.seconds / (micros * 1e-6)))
    errors = sorted(map(abs, errors or every_second(data, best)))
    spread = math.sqrt(sum(e * e for e in errors) / len(errors)) if errors else 0.05
    data["spread"] = round(spread, 3)
    data["left_out"] = {"points": len(errors), "mean_error": round(sum(errors) / max(1, len(errors)), 3),
                        "p95_error": round(errors[int(0.95 * len(errors))], 3) if errors else 0.0}  # fmt: skip
    text = json.dumps(data, separators=(",", ":")).replace('"rows":[', '"rows":[\n').replace("]],[[", "]],\n[[")
    file = TABLES / f"{name}_{op}_{dtype}.json"
    file.write_text(text + "\n", encoding="utf-8")
    print(f"{file.name}: {len(text) / 1e3:.0f} kB, {sum(len(r[1]) for r in rows)} times, left out: {data['left_out']}")


def every_second(data: Mapping[str, Any], best: Callable[[Mapping[str, float]], float]) -> list[float]:
    """Errors of a table of one axis without every second of its times, read there."""
    (axis, grid), size = data["axes"][0], len(data["axes"][0][1])
    kept, errors = list(range(0, size, 2)), []
    for key, values in data["rows"]:
        if any(values[i] is None for i in kept):
            continue
        table = table_of({**data, "axes": [[axis, [grid[i] for i in kept]]], "rows": [[key, [values[i] for i in kept]]]})
        for i in range(1, size - 1, 2):
            if values[i] is not None:
                reading = table.read({**dict(zip(data["keys"], key, strict=True)), axis: grid[i]}, best)
                errors.append(math.log(reading.seconds / (values[i] * 1e-6)))
    return errors


def product(axes: Sequence[Sequence[float]]) -> Iterable[tuple[float, ...]]:
    if not axes:
        return [()]
    return [(first, *rest) for first in axes[0] for rest in product(axes[1:])]


def short(value: float) -> float:
    """Three digits."""
    rounded = float(f"{value:.3g}")
    return int(rounded) if rounded == int(rounded) else rounded


def nearest_of(values: Sequence[float], wanted: Sequence[float]) -> list[float]:
    """Of the values that are there, those next to the wanted ones, within a quarter."""
    found = {min(values, key=lambda v: abs(math.log(max(v, 1) / w))) for w in wanted}
    return sorted(v for v in found if min(abs(math.log(max(v, 1) / w)) for w in wanted) < 0.15)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def parquet(path: Path) -> list[dict[str, Any]]:
    from pyarrow.parquet import read_table

    return read_table(path).to_pylist()  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
