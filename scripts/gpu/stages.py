"""The stages: each measures one thing and returns plain data with its floor beside it. Peer rows come from kernels/tables."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import copies, geomean, microseconds

from apportion.assets import DEFAULT_MODEL
from apportion.core.kv_spec import KVGroupSpec, kv_format
from apportion.kernels.dispatch import select_ops
from apportion.kernels.interval_table import Choice, Intervals, IntervalTable, device_slug
from apportion.kernels.ops import AttentionSpec, ExpertsSpec
from apportion.kernels.triton.linear import SPLITS, choose_splits, flat
from apportion.platforms.platform import select_platform

ROOT = Path(__file__).resolve().parents[2]
LINEAR_SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192))  # (N, C)
LINEAR_ROWS = (1, 2, 4, 8, 16, 32, 64)
ATTENTION = ((1, 1024), (1, 4096), (1, 16384), (4, 4096), (16, 1024), (16, 4096), (32, 4096), (64, 2048), (128, 1024))  # (R, context)
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def device(_: dict[str, Any]) -> dict[str, Any]:
    """What the GPU is, and two ceilings: a large copy (bytes read and written) and a large product on random data."""
    import triton

    facts = torch.cuda.get_device_properties(0)
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_us = microseconds([partial(target.copy_, source)])
    target = source = None  # 8 GiB
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_us = microseconds([partial(torch.matmul, a, b)])
    return {
        "name": facts.name,
        "memory_bytes": facts.total_memory,
        "multiprocessors": facts.multi_processor_count,
        "l2_bytes": facts.L2_cache_size,
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "bytes_per_s": 2 * (1 << 32) / copy_us * 1e6,
        "flop_per_s": 2 * 8192**3 / product_us * 1e6,
    }


def conformance(_: dict[str, Any]) -> dict[str, Any]:
    """tests/conformance on the GPU."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "triton", "-p", "no:cacheprovider", "tests/conformance"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = run.stdout.strip().splitlines() or [run.stderr[-500:]]
    return {"passed": run.returncode == 0, "summary": lines[-1], "tail": [] if run.returncode == 0 else lines[-40:]}


def linear(known: dict[str, Any]) -> dict[str, Any]:
    """bf16 products of few tokens: every tile and split of the flat kernel against the library, weights rotated past the cache."""
    l2, bandwidth = known["device"]["l2_bytes"], known["device"]["bytes_per_s"]
    multiprocessors, rows, ops = known["device"]["multiprocessors"], [], select_ops(select_platform("auto"))
    for n, c in LINEAR_SHAPES:
        weights = [torch.randn(n, c, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * n * c, l2))]
        for t in LINEAR_ROWS:
            x = torch.randn(t, c, device="cuda", dtype=torch.bfloat16)
            out = torch.empty(t, n, device="cuda", dtype=torch.bfloat16)
            library = microseconds([partial(F.linear, x, w) for w in weights])
            best: dict[str, Any] = {"us": float("inf")}
            for index, tile in enumerate(ops.tiles.flat):
                for splits in sorted({1, choose_splits(n, c, multiprocessors, tile), *(s for s in SPLITS if n <= 4096)}):
                    us = microseconds([partial(flat, x, w, None, out, splits, tile) for w in weights])
                    if us < best["us"]:
                        best = {"us": us, "tile": index, "splits": splits}
            floor = 2 * (n * c + t * (n + c)) / bandwidth * 1e6
            rows.append({"n": n, "c": c, "t": t, "flat": best, "library_us": library, "floor_us": floor, "speedup": library / best["us"]})
        del weights
    measured: dict[tuple[str, int, int], list[tuple[int, float, float, Choice]]] = {}
    for row in rows:
        choice = Choice("flat", row["flat"]["tile"], row["flat"]["splits"])
        measured.setdefault(("bfloat16", row["n"], row["c"]), []).append((row["t"], row["library_us"], row["flat"]["us"], choice))
    versions = {name: known["device"][name] for name in ("torch", "triton")}
    table = IntervalTable(device_slug(known["device"]["name"]), versions, {key: Intervals.of(points) for key, points in measured.items()})
    flat_rows = [row["speedup"] for row in rows if 2 <= row["t"] <= 16]
    return {"rows": rows, "geomean_2_to_16": geomean(flat_rows), "worst_2_to_16": min(flat_rows), "table": table.as_dict()}


def attention(known: dict[str, Any]) -> dict[str, Any]:
    """Decode of 32 query heads over 8 kv heads of 128 channels in bf16: online and unified maximum, every tile, against the peer's rows."""
    ops, bandwidth, rows = select_ops(select_platform("auto")), known["device"]["bytes_per_s"], []
    group = KVGroupSpec((0,), 8, 128, 128, kv_format("bfloat16"), 32)
    for requests, context in ATTENTION:
        blocks, sets = context // 32, copies(requests * context * 4096, known["device"]["l2_bytes"])
        arena = torch.empty(sets * requests * blocks * group.block_bytes, dtype=torch.uint8, device="cuda")
        arena.view(torch.bfloat16).normal_()
        order = torch.randperm(sets * requests * blocks).view(sets, requests, blocks).int() * (group.block_bytes // 256)
        attentions = [ops.paged_attention(AttentionSpec(32, group, 128**-0.5, 128), arena) for _ in range(sets)]
        lens, starts = torch.full((requests,), context).int(), torch.arange(requests + 1).int()
        handles = [op.plan(starts, lens, table, requests, requests) for op, table in zip(attentions, order, strict=True)]
        qkv, out = (torch.randn(requests, width, device="cuda", dtype=torch.bfloat16) for width in (6144, 4096))
        found: dict[str, Any] = {"requests": requests, "context": context, "floor_us": requests * context * 4096 / bandwidth * 1e6}
        for kind, phi in (("online", None), ("unified", torch.full((32,), 8.0))):
            best = {"us": float("inf")}
            for index, tile in enumerate(ops.tiles.decode):
                for op in attentions:
                    op.unify(0, phi)
                    op.decode_tile = tile
                us = microseconds([partial(op.run, 0, qkv, out, handle) for op, handle in zip(attentions, handles, strict=True)])
                if us < best["us"]:
                    best = {"us": us, "tile": index}
            found[kind] = best
        found["recomputed"] = int(sum(int(op.recomputed) for op in attentions))
        found["peer_us"] = peer("decode_attention", {"head_dim": 128, "context": context, "sequences": requests * 8, "heads": 4})
        found["speedup"] = found["peer_us"] / min(found["online"]["us"], found["unified"]["us"]) if found["peer_us"] else None
        rows.append(found)
    return {"rows": rows, "geomean": geomean([row["speedup"] for row in rows if row["speedup"]])}


def experts(known: dict[str, Any]) -> dict[str, Any]:
    """A layer of Mixtral's shape in bf16: 8 experts of 4096 x 14336, two to a token."""
    ops, bandwidth, rows = select_ops(select_platform("auto")), known["device"]["bytes_per_s"], []
    op = ops.experts(ExpertsSpec(8, 4096, 14336, (("bfloat16",) * 3,)))
    op.bind(torch.empty(op.nbytes, dtype=torch.uint8, device="cuda"))
    for expert in range(8):
        for projection, shape in (("gate", (14336, 4096)), ("up", (14336, 4096)), ("down", (4096, 14336))):
            op.load(expert, projection, torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02)
    for t in (1, 4, 16, 64, 256):
        x = torch.randn(t, 4096, device="cuda", dtype=torch.bfloat16)
        ids = torch.rand(t, 8, device="cuda").argsort(1)[:, :2].int()
        weights = torch.rand(t, 2, device="cuda")
        best = {"us": float("inf")}
        for index, tile in enumerate(ops.tiles.experts):
            op.tile = tile
            us = microseconds([partial(op, x, ids, weights)])
            best = min(best, {"us": us, "tile": index}, key=lambda entry: entry["us"])
        floor = ids.unique().numel() * 3 * 4096 * 14336 * 2 / bandwidth * 1e6
        rows.append({"t": t, **best, "floor_us": floor})
    return {"rows": rows}


def engine(known: dict[str, Any]) -> dict[str, Any]:
    """A model of Llama-3-8B's shape, random weights, through LLM: decode of one request, then 256 of 512 tokens in and 128 out."""
    from apportion import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_8B))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEFAULT_MODEL / name, folder)
        started = time.perf_counter()
        with LLM(folder, load_format="dummy", device="cuda", max_model_len=2048, kv_cache_memory=24 << 30) as llm:
            loaded_s = time.perf_counter() - started

            def run(requests: int, prompt: int, output: int) -> float:
                params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
                prompts = [{"prompt_token_ids": [(7 * i + j) % 4000 + 5 for j in range(prompt)]} for i in range(requests)]
                begun = time.perf_counter()
                llm.generate(prompts, params)
                return time.perf_counter() - begun

            run(1, 16, 8)
            token_s = (run(1, 16, 136) - run(1, 16, 8)) / 128
            run(256, 64, 4)
            batch_s = run(256, 512, 128)
    weight_bytes = 2 * (8.03e9 - 128256 * 4096)  # the embedding is read by rows
    floor_s = weight_bytes / known["device"]["bytes_per_s"]
    return {
        "load_s": loaded_s,
        "decode_ms": token_s * 1e3,
        "floor_ms": floor_s * 1e3,
        "share_of_floor": floor_s / token_s,
        "batch_256_s": batch_s,
        "output_tokens_per_s": 256 * 128 / batch_s,
    }


def peer(op: str, point: dict[str, float]) -> float | None:
    """Microseconds of NVIDIA's measurement of vLLM on an H200 at exactly this point, None where it has none."""
    table = json.loads(files("apportion.kernels").joinpath(f"tables/h200-sxm_{op}_bfloat16.json").read_text())
    key = [point[name] for name in table["keys"]]
    for row_key, values in table["rows"]:
        if row_key != key:
            continue
        place = 0
        for name, grid in table["axes"]:
            if point[name] not in grid:
                return None
            place = place * len(grid) + grid.index(point[name])
        return values[place]
    return None


# name -> (what it measures, seconds it takes on an H200 as far as can be told without one)
STAGES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], int]] = {
    "device": (device, 10),
    "conformance": (conformance, 120),
    "linear": (linear, 100),
    "attention": (attention, 60),
    "experts": (experts, 30),
    "engine": (engine, 120),
}
