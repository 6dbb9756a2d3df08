"""`apportion inspect`: what is stored in a checkpoint and what it is computed in."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder or hub id")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--tensors", action="store_true", help="every tensor, not only every projection")


def run(args: argparse.Namespace) -> int:
    found = describe(args.checkpoint)
    if args.json:
        print(json.dumps(found))
        return 0
    method = found["method"] or "nobody"
    print(f"{found['architecture']}, {found['bytes'] / 1e6:.1f} MB in {found['num_tensors']} tensors; quantized by {method}")
    rows = [("tensor", "dtype", "shape", "bytes")] if args.tensors else [("projection", "stored as", "shape", "bits", "scheme", "scale")]
    for row in found["tensors"] if args.tensors else found["projections"]:
        rows.append(tuple(str(row[key]) for key in row))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def describe(model: str) -> dict[str, Any]:
    """Plain data. Errors: CheckpointError, Unsupported, as loading has them."""
    from apportion.core.config import ModelConfig
    from apportion.kernels.reference.ops import ReferenceOps
    from apportion.layers.weights import JointSource
    from apportion.models.checkpoint import Checkpoint, read_json, read_spec, resolve_folder
    from apportion.models.loader import build_model, match_sources, read_model_records, weight_layers
    from apportion.parallel.groups import ParallelGroup
    from apportion.quant.checkpoint import SECTIONS

    folder = resolve_folder(model)
    config, spec = read_json(folder / "config.json"), read_spec(folder)
    records = read_model_records(ModelConfig(model=str(folder)), spec)
    built = build_model(spec, ReferenceOps(), ParallelGroup(), records)
    checkpoint = Checkpoint(folder, built.aliases)
    match_sources(weight_layers(built), checkpoint, spec)  # whatever would stop loading stops here, too
    section: Any = next((config[key] for key in SECTIONS if config.get(key)), {})
    parts: dict[str, list[str]] = defaultdict(list)
    for name in checkpoint.tensors:
        parts[name.rpartition(".")[0]].append(name)
    projections = []
    for layer in weight_layers(built):
        for source in layer.sources(checkpoint.tensors.keys()):
            names = list(source.shapes) if isinstance(source, JointSource) else [source.name]
            stem = names[0].rpartition(".")[0]
            stored = {name: checkpoint.tensors[name][1] for name in names}
            main = max(stored.values(), key=lambda t: t.nbytes)
            if len(main.shape) < 2 or any(row["projection"] == stem for row in projections[-4:]):
                continue
            scheme = records.of(stem, "Embedding" if stem.endswith("embed_tokens") else "Linear").scheme
            scale = ", ".join(f"{t.dtype} {list(t.shape)}" for name, t in stored.items() if "scale" in name.rpartition(".")[2])
            weights = max(1, _weights_of(main, scheme))
            bits = 8 * sum(t.nbytes for t in stored.values()) / weights
            row = {"projection": stem, "stored": main.dtype, "shape": list(main.shape), "bits": round(bits, 2)}
            projections.append(row | {"scheme": scheme, "scale": scale})
    tensors = [{"tensor": name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes} for name, (_, t) in checkpoint.tensors.items()]
    return {
        "architecture": spec.architecture, "method": section.get("quant_method"), "num_tensors": len(tensors),
        "bytes": sum(row["bytes"] for row in tensors), "projections": projections, "tensors": tensors,
    }  # fmt: skip


def _weights_of(stored: Any, scheme: str) -> int:
    """Numbers in a stored matrix: several to a word where it is packed."""
    from math import prod

    from apportion.core.number_format import Scheme

    per_word = 32 / Scheme.parse(scheme).weight.bits if stored.dtype == "I32" else 1
    return int(prod(stored.shape) * per_word)
