"""Models of random weights through LLM: decode of one request against its bytes, 256 requests, and the claims of vLLM's post on FP8."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine import Machine, OutOfTime, row
from shapes import LLAMA_8B, MIXTRAL_8X7B

from apportion import LLM, SamplingParams
from apportion.assets import DEFAULT_MODEL
from apportion.models.checkpoint import read_spec

SMALL = {  # with --dry
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 512, "max_position_embeddings": 512, "torch_dtype": "float32",
}  # fmt: skip
PRECISIONS = ("bfloat16", "fp8")
CLAIM_BYTES = 120e9  # of weights and KV together, for every model and precision: the larger model in bf16 leaves little beside 93
CLAIM_REQUESTS = (32, 256)  # whose step is timed, and whose throughput


def decode(machine: Machine) -> dict[str, Any]:
    """One request over Llama-3-8B's shape: time of a token, the share of its bytes' floor, and what of it no kernel ran."""
    rows: list[dict[str, Any]] = []
    try:
        for precision in PRECISIONS:
            with _llm(machine, LLAMA_8B, precision, 4 << 30) as (llm, weight_bytes):
                token_us = _token_us(machine, llm, requests=1, prompt=16, tokens=128)
                busy_us = _busy_us(machine, llm, tokens=machine.shrunk(32, 2))
                gap = max(0.0, 1 - busy_us / token_us)
                rows.append(row(f"8B {precision}, a token of one request", token_us, machine.floor_us(weight_bytes), host_gap=gap))
    except OutOfTime:
        pass
    return {"rows": rows}


def batch(machine: Machine) -> dict[str, Any]:
    """256 requests, 512 tokens in and 128 out, over Llama-3-8B's shape."""
    found: dict[str, Any] = {"rows": []}
    try:
        for precision in PRECISIONS:
            with _llm(machine, LLAMA_8B, precision, 24 << 30) as (llm, _):
                found[f"{precision}_output_tokens_per_s"] = _throughput(machine, llm, 256)
    except OutOfTime:
        pass
    return found


def claims(machine: Machine) -> dict[str, Any]:
    """fp8 against bf16 with the same bytes for weights and KV: time between tokens, and throughput."""
    found: dict[str, Any] = {"rows": [], "bytes": CLAIM_BYTES, "claimed": "time between tokens 2x (dense), 1.6x (Mixtral); throughput 3x"}
    try:
        for name, config in (("8B", LLAMA_8B), ("Mixtral", MIXTRAL_8X7B)):
            measured = {}
            for precision in PRECISIONS:
                with _llm(machine, config, precision, None) as (llm, _):
                    token_us = _token_us(machine, llm, requests=CLAIM_REQUESTS[0], prompt=512, tokens=64)
                    measured[precision] = (token_us, _throughput(machine, llm, CLAIM_REQUESTS[1]))
            (bf16_us, bf16_rate), (fp8_us, fp8_rate) = measured.values()
            found |= {name: measured, f"{name}_itl_ratio": bf16_us / fp8_us, f"{name}_throughput_ratio": fp8_rate / bf16_rate}
    except OutOfTime:
        pass
    return found


@contextmanager
def _llm(machine: Machine, config: dict[str, Any], precision: str, kv_bytes: int | None) -> Iterator[tuple[LLM, float]]:
    """A model of random weights and the bytes that a token reads of them. kv_bytes None: what its weights leave of CLAIM_BYTES."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config | SMALL if machine.dry else config))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEFAULT_MODEL / name, folder)
        spec = read_spec(Path(folder))
        embedding = spec.vocab * spec.hidden * 2  # read by rows; the head is as large and stays in bf16
        bf16 = spec.weight_bytes("bfloat16", 1)
        weight_bytes = bf16 - embedding if precision == "bfloat16" else (bf16 - 2 * embedding) / 2 + embedding
        if kv_bytes is None:
            kv_bytes = int(CLAIM_BYTES - weight_bytes - embedding)
        options: dict[str, Any] = {"device": machine.platform.name, "kernels": "triton", "max_model_len": 2048}
        if machine.dry:
            kv_bytes, options["max_model_len"] = 4 << 20, 128
        if precision == "fp8":
            options["quantization"] = "fp8"
        with LLM(folder, load_format="dummy", kv_cache_memory=kv_bytes, **options) as llm:
            yield llm, weight_bytes
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()


def _run(llm: LLM, requests: int, prompt: int, tokens: int) -> float:
    """Seconds."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [(7 * i + j) % 400 + 5 for j in range(prompt)]} for i in range(requests)]
    begun = time.perf_counter()
    llm.generate(prompts, params)
    return time.perf_counter() - begun


def _token_us(machine: Machine, llm: LLM, requests: int, prompt: int, tokens: int) -> float:
    """Of a decode step: what more tokens of the same requests take. Errors: OutOfTime."""
    requests, prompt, tokens, few = machine.shrunk(requests, 2), machine.shrunk(prompt, 8), machine.shrunk(tokens, 2), machine.shrunk(8, 1)
    if time.monotonic() > machine.deadline:
        raise OutOfTime
    _run(llm, requests, prompt, few)  # compiles and captures
    short = _run(llm, requests, prompt, few)
    return max(1e-9, _run(llm, requests, prompt, few + tokens) - short) / tokens * 1e6


def _busy_us(machine: Machine, llm: LLM, tokens: int) -> float:
    """Microseconds that kernels ran for, a token."""
    on_gpu = machine.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        _run(llm, 1, 16, tokens)
    return sum(event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in profile.key_averages()) / tokens


def _throughput(machine: Machine, llm: LLM, requests: int) -> float:
    """Output tokens a second of requests with 512 tokens in and 128 out. Errors: OutOfTime."""
    if time.monotonic() > machine.deadline:
        raise OutOfTime
    requests, prompt, tokens = machine.shrunk(requests, 2), machine.shrunk(512, 8), machine.shrunk(128, 2)
    _run(llm, requests, machine.shrunk(64, 4), machine.shrunk(4, 1))
    return requests * tokens / _run(llm, requests, prompt, tokens)
