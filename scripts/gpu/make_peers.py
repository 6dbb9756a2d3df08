"""Makes scripts/gpu/peers.json: what the stages compare with, cut from published measurements of vLLM 0.24.0 on an H200.

python scripts/gpu/make_peers.py ../shared/data/perf-h200-vllm-0.24        # needs pyarrow
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from shapes import ATTENTION, LARGE_ROWS, LINEAR_ROWS, LINEAR_SHAPES, MIXTRAL, MIXTRAL_TOKENS

TARGET = Path(__file__).with_name("peers.json")
SOURCE = {
    "origin": "github.com/ai-dynamo/aiconfigurator, commit 095f58a51c4ca8e61b66ec108d86f223f8d559ce, h200_sxm, vLLM 0.24.0",
    "licence": "Apache-2.0",
    "device": "NVIDIA H200",
    "how": {  # as the collector of that repository builds the layers
        "bfloat16": "torch.nn.functional.linear, six weights in turn, in a CUDA graph",
        "fp8": "one scale for the weight and one static for inputs; their rounding is inside; six weights in turn, in a CUDA graph",
        "fp8_block": "128x128 blocks, inputs in groups of 128; their rounding is inside; one weight, kept by the cache, no graph",
        "decode_attention": "FlashAttention 3, 32 query heads over 8 of 128 channels",
        "experts": "least and most over the distributions of tokens: balanced, and two power laws; fp8_block for fp8",
    },
}


def main(folder: Path) -> None:
    from pyarrow import parquet

    def rows(path: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = parquet.read_table(folder / path).to_pylist()
        return found

    linear: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows("gemm/gemm_perf.parquet"):
        if (row["n"], row["k"]) in LINEAR_SHAPES and row["m"] in (*LINEAR_ROWS, *LARGE_ROWS):
            linear[row["gemm_dtype"]][f"{row['n']}x{row['k']}"][str(row["m"])] = microseconds(row)
    attention: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows("attention/generation_attention_perf.parquet"):
        shape = (row["num_heads"], row["num_key_value_heads"], row["head_dim"], row["window_size"])
        point = (row["batch_size"], row["step"] + 1)
        if shape == (32, 8, 128, 0) and point in ATTENTION:
            attention[row["kv_cache_dtype"]]["x".join(map(str, point))] = microseconds(row)
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows("moe/moe_perf.parquet"):
        shape = (row["num_experts"], row["hidden_size"], row["inter_size"], row["topk"], row["moe_tp_size"], row["moe_ep_size"])
        if shape == (*MIXTRAL, 2, 1, 1) and row["num_tokens"] in MIXTRAL_TOKENS and row["moe_dtype"] in ("bfloat16", "fp8_block"):
            times[row["moe_dtype"], row["num_tokens"]].append(microseconds(row))
    experts: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for (dtype, tokens), found in sorted(times.items()):
        experts[dtype][str(tokens)] = [min(found), max(found)]
    peers = {"source": SOURCE, "linear": linear, "decode_attention": attention, "experts": experts}
    TARGET.write_text(json.dumps(peers, indent=1, sort_keys=True) + "\n")


def microseconds(row: dict[str, Any]) -> float:
    return round(row["latency"] * 1e3, 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
