"""Memory of a model that is quantized while it is loaded: the most at any time, and what stays, against the bytes that its formats store.

    python benchmarks/quantized_memory.py [--model bench-250m] [--formats bfloat16,fp8,fp8_block,int8,w4a16] [--write]

Bars: the peak is at most the quantized model and one layer as the file has it; what stays is within 3 % of the stored bytes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from math import prod
from pathlib import Path

from apportion.bench.make_model import PRESETS, make_model, tensor_shapes
from apportion.core.config import ModelConfig
from apportion.core.number_format import Scheme
from apportion.models.checkpoint import read_spec
from apportion.models.loader import read_model_records

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "benchmarks"), str(ROOT)]
from run_all import RESULTS, machine  # noqa: E402

from tests.unit.quant.test_online import MEASURE  # noqa: E402


def stored_bytes(model: str, folder: Path, quantization: str | None) -> int:
    """Of every tensor of the model; norms are kept in float32."""
    records, total = read_model_records(ModelConfig(model=str(folder), quantization=quantization), read_spec(folder)), 0
    for name, shape in tensor_shapes(PRESETS[model]):
        projection = name.removesuffix(".weight")
        kind = "Embedding" if projection.endswith("embed_tokens") else "Linear"
        total += 4 * prod(shape) if len(shape) == 1 else Scheme.parse(records.of(projection, kind).scheme).weight.stored_bytes(*shape)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bench-250m", choices=sorted(PRESETS))
    parser.add_argument("--formats", default="bfloat16,fp8,fp8_block,int8,w4a16")
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results")
    args = parser.parse_args()
    folder, small = (ROOT / ".cache" / "bench" / name for name in (args.model, "bench-moe"))
    for path in (folder, small):
        if not (path / "model.safetensors").exists():
            make_model(path.name, path)
    layer = sum(2 * prod(shape) for name, shape in tensor_shapes(PRESETS[args.model]) if ".layers.0." in name)
    rows = []
    for name in args.formats.split(","):
        quantization = None if name == "bfloat16" else name
        code = MEASURE.replace("sys.argv[3]", repr(quantization))
        done = subprocess.run([sys.executable, "-c", code, str(folder), str(small)], capture_output=True, text=True, check=True)
        peak, resident, packed = json.loads(done.stdout)
        stored = stored_bytes(args.model, folder, quantization)
        row = {"format": name, "stored_bytes": stored, "packed_bytes": packed, "resident_bytes": resident, "peak_bytes": peak}
        rows.append(row | {"layer_bytes": layer, "resident_off": resident / stored - 1, "peak_met": peak <= packed + layer})
        print(
            f"{name:10} stored {stored / 1e6:7.1f} MB, resident {resident / 1e6:7.1f} ({resident / stored - 1:+.2%}), "
            f"peak {peak / 1e6:7.1f} of {(packed + layer) / 1e6:7.1f} allowed"
        )
    if args.write:
        about = {"machine": machine(), "command": " ".join(["python", *sys.argv]), "model": args.model}
        path = RESULTS / f"quantized_memory-{args.model}-{datetime.date.today().isoformat()}.json"
        path.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
