"""The measurements of `make bench` beside the peers: each function measures one promise and returns rows of figures with their bars."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from apportion.bench.bandwidth import measure_bandwidth
from apportion.bench.kernels import attention_decode_rate, make_ops, sampling_row_s
from apportion.bench.latency import measure_latency, random_prompts, time_batch
from apportion.bench.make_model import VOCAB, make_model
from apportion.bench.traffic import read_traffic
from apportion.core.config import ModelConfig, SchedulerConfig
from apportion.core.kv_spec import KVGroupSpec, kv_format
from apportion.core.request import Request
from apportion.core.sampling_params import SamplingParams
from apportion.core.schedule import ModelRunnerOutput
from apportion.engine.scheduler import Scheduler
from apportion.kernels.cpu.extension import load
from apportion.kvcache.arena import Arena, choose_slab_bytes
from apportion.kvcache.kv_cache_manager import KVCacheManager
from apportion.llm import LLM
from apportion.models.checkpoint import read_spec
from apportion.models.loader import load_model

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".cache" / "bench" / "bench-250m"


@dataclass(frozen=True)
class Row:
    """One figure. met: None where there is no bar."""

    what: str
    value: float
    unit: str
    bar: float | None = None
    met: bool | None = None
    note: str = ""


def at_most(what: str, value: float, bar: float, unit: str, note: str = "") -> Row:
    return Row(what, value, unit, bar, value <= bar, note)


def at_least(what: str, value: float, bar: float, unit: str, note: str = "") -> Row:
    return Row(what, value, unit, bar, value >= bar, note)


def open_llm(threads: int, **engine: object) -> LLM:
    if not (MODEL / "model.safetensors").exists():
        make_model("bench-250m", MODEL)
    defaults = {"max_model_len": 4096, "kv_cache_memory": 512 << 20, "enable_prefix_caching": False}
    return LLM(MODEL, num_threads=threads, **(defaults | engine))


def step_floor(threads: int) -> list[Row]:
    """A decode step at batch 1 against the time that reading its bytes takes; bandwidth measured before and after."""
    before = measure_bandwidth(threads)
    with open_llm(threads) as llm:
        result = measure_latency(llm, vocab=VOCAB, batch_size=1, input_len=128, output_len=128, num_iters_warmup=1, num_iters=5)
    bandwidth = max(before, measure_bandwidth(threads), key=lambda b: b.best)
    floor_ms = 1000 * bandwidth.floor_s(read_traffic(MODEL).step_bytes(1, 192))
    pages = f"ordinary pages {bandwidth.ordinary_pages / 1e9:.1f}, huge pages {bandwidth.huge_pages / 1e9:.1f}"
    return [
        Row("read bandwidth", bandwidth.best / 1e9, "GB/s", note=pages),
        at_most("decode step, batch 1", result["step_ms"], floor_ms / 0.85, "ms", f"floor {floor_ms:.2f} ms, bar floor / 0.85"),
    ]


def attention(threads: int) -> list[Row]:
    """Attention of a decode step over 8,192 tokens of context."""
    before = measure_bandwidth(threads)
    rate = attention_decode_rate(make_ops(threads))
    bandwidth = max(before.best, measure_bandwidth(threads).best)
    note = f"{rate / 1e9:.1f} of {bandwidth / 1e9:.1f} GB/s"
    return [at_least("attention decode, context 8192, of read bandwidth", 100 * rate / bandwidth, 80, "%", note)]


def prefix(threads: int) -> list[Row]:
    """Time to first token with half of 1,024 prompt tokens cached, against the uncached share of a cold prompt + 10 %."""
    with open_llm(threads, enable_prefix_caching=True) as llm:
        cold, hits, share = [], [], 0.0
        for i in range(6):
            first, second, tail = (random_prompts(1, 512, VOCAB, 1000 + 10 * i + j)[0] for j in range(3))
            cold.append(time_batch(llm, [first + second], 1).prefill_s)
            start = time.monotonic()
            (output,) = llm.generate([{"prompt_token_ids": first + tail}], SamplingParams(temperature=0.0, max_tokens=1, detokenize=False))
            hits.append(output.metrics.first_token_time - start)
            share = 1 - output.num_cached_tokens / 1024
        cold_ms, hit_ms = (1000 * statistics.median(times[1:]) for times in (cold, hits))
    return [at_most("prefix hit, time to first token", hit_ms, cold_ms * share * 1.1, "ms", f"cold {cold_ms:.1f} ms, {share:.0%} uncached")]


def overhead(threads: int) -> list[Row]:
    """What of a decode step at batch 16 is spent outside the kernels' thread team (Python, scheduling, sampling's bookkeeping)."""
    module = load()
    with open_llm(threads) as llm:
        time_batch(llm, random_prompts(16, 128, VOCAB, 1), 8)
        shares, step_ms = [], []
        for seed in range(2, 7):
            in_kernels, num_steps = module.ThreadTeam.run_seconds(), 63
            start = time.monotonic()
            timing = time_batch(llm, random_prompts(16, 4, VOCAB, seed), num_steps + 1)
            elapsed = time.monotonic() - start
            shares.append(1 - (module.ThreadTeam.run_seconds() - in_kernels) / elapsed)
            step_ms.append(1000 * timing.decode_s / num_steps)
    step = statistics.median(step_ms)
    return [at_most("outside kernels, step at batch 16", 100 * statistics.median(shares), 5, "%", f"step {step:.2f} ms")]


def scheduler(threads: int) -> list[Row]:
    """schedule() and update() of a decode step with 256 running requests."""
    kv_group = KVGroupSpec(tuple(range(16)), 4, 64, 64, kv_format("bfloat16"), 32)
    num_bytes = 256 * 16 * kv_group.block_bytes
    arena = Arena(num_bytes, choose_slab_bytes([kv_group.block_bytes], num_bytes))
    config = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=8192)
    scheduler = Scheduler("m", config, KVCacheManager(arena, "m", [kv_group], enable_prefix_caching=True, max_chunk=8192), 512)
    for i in range(256):
        scheduler.add(Request(str(i), "m", random_prompts(1, 128, VOCAB, i)[0], SamplingParams(max_tokens=300, ignore_eos=True)))
    phases = frozenset({"prefill", "decode"})
    times = []
    for _ in range(150):
        start = time.perf_counter()
        step = scheduler.schedule(0, phases)
        scheduled = time.perf_counter()
        sampled = {request.request_id: [7] for request, _, samples, _ in step.rows if samples}
        output = ModelRunnerOutput(step.step_id, "m", sampled)
        resumed = time.perf_counter()
        scheduler.update(step, output)
        times.append(1000 * (scheduled - start + time.perf_counter() - resumed))
    return [at_most("scheduler step, 256 running", statistics.median(times[20:]), 1.0, "ms", f"largest {max(times[20:]):.2f} ms")]


def sampling(threads: int) -> list[Row]:
    """One row of 131,072 logits."""
    found = sampling_row_s(make_ops(threads))
    return [at_most(f"sampling a row of 131072, {name}", 1000 * seconds, 0.1, "ms") for name, seconds in found.items()]


def loading(threads: int) -> list[Row]:
    """Packing the checkpoint into an arena against reading its file, both from the page cache, interleaved."""
    path = MODEL / "model.safetensors"
    spec = read_spec(MODEL)
    ops = make_ops(threads)
    reads, loads = [], []
    for _ in range(5):
        reads.append(_timed(path.read_bytes))
        loads.append(_timed(lambda: load_model(ModelConfig(model=str(MODEL)), spec, ops)))
    read_s, load_s = statistics.median(reads), statistics.median(loads)
    return [at_most("load, against reading the file", load_s / read_s, 1.5, "x", f"{load_s:.2f} s, file {read_s:.2f} s")]


def startup(threads: int) -> list[Row]:
    """Processes from start to end: first token of the bundled model, the import, the help text."""
    first_token = _process_s("from apportion import LLM, SamplingParams; LLM().generate('Once upon a time', SamplingParams(max_tokens=1))")
    bare = _process_s("pass")
    return [
        at_most("process start to first token, bundled model", first_token, 2.5, "s"),
        at_most("import apportion", max(0.0, _process_s("import apportion") - bare), 0.2, "s"),
        at_most("apportion --help", _process_s("import sys; from apportion.cli.main import main; sys.exit(main(['--help']))"), 0.4, "s"),
    ]


MEMORY_SCRIPT = """
import json, resource, sys
from apportion import LLM
from apportion.bench.latency import random_prompts, time_batch
llm = LLM(sys.argv[1], kv_cache_memory=256 << 20, max_model_len=2048, num_threads=int(sys.argv[2]))
time_batch(llm, random_prompts(15, 960, 32000, 0), 64)
plan = dict(llm.memory_plan.rows())
json.dump([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, plan], sys.stdout)
"""


def memory(threads: int) -> list[Row]:
    """Peak resident memory of a process that loads bench-250m and fills 256 MiB of KV."""
    with tempfile.TemporaryFile("w+") as out:
        subprocess.run([sys.executable, "-c", MEMORY_SCRIPT, str(MODEL), str(threads)], check=True, stdout=out)
        out.seek(0)
        peak, plan = json.load(out)
    named = {name: size for name, size in plan.items() if name not in ("free", "total")}
    weights = sum(size for name, size in named.items() if "weight" in name.lower())
    kv = sum(size for name, size in named.items() if "kv" in name.lower())
    bar = 1.15 * (weights + kv) + (350 << 20)
    mib = 1 << 20
    note = f"weights {weights / mib:.0f} + KV {kv / mib:.0f} MiB; bar 1.15 x + 350 MiB"
    return [at_most("peak RSS, bench-250m", peak / mib, bar / mib, "MiB", note)]


def _process_s(code: str, repeats: int = 5) -> float:
    """Median wall time of a Python process, the first one left out (it warms the file cache)."""
    command = [sys.executable, "-c", code]
    run = lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: E731
    return statistics.median([_timed(run) for _ in range(repeats + 1)][1:])


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


SECTIONS: dict[str, Callable[[int], list[Row]]] = {
    "floor": step_floor,
    "attention": attention,
    "prefix": prefix,
    "overhead": overhead,
    "scheduler": scheduler,
    "sampling": sampling,
    "loading": loading,
    "startup": startup,
    "memory": memory,
}


if __name__ == "__main__":
    # One section in a process of its own (run_all.py calls this): pinning, caches and memory of one do not touch the next.
    torch.manual_seed(0)
    rows = SECTIONS[sys.argv[1]](int(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps([row.__dict__ for row in rows]))
