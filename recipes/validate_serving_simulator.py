"""Holds the serving simulator to the engine on this machine: traffic is predicted before it is served.

    python recipes/validate_serving_simulator.py [--model FOLDER] [--out benchmarks/results/simulator-serving.json] [--seconds 8]

Capacity is the rate at which the engine gets through requests that come all at once, measured. For each share of it the engine serves
calibration traffic (Poisson arrivals and two batches, its own seeds and another rate), `StepFit` learns from it what a step costs, other
traffic is simulated, and then served for real, twice: the difference of the two rounds is the noise. Errors of single steps, of the median
latency and of its 99th percentile.

The engine is in the state of one that has run for a while: its KV memory has been used once (the first touch of a huge page costs a step
milliseconds), and Python's garbage collector no longer walks what was there at the start (a full collection stops a step for 0.1 s).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

import psutil

from apportion import LLM
from apportion.core.request import Request
from apportion.core.sampling_params import SamplingParams
from apportion.platforms.cpu import processor_name
from apportion.simulator.executor import Arrival, BatchReader, Workday, serve
from apportion.simulator.serving import Row, StepFit

LOADS = (0.3, 0.5, 0.7)  # of the capacity
PARTS = 4
CROWD = 64  # requests at once, to measure it
CALIBRATION_LOAD = 0.8
BATCHES = (2, 6, 12)
PROMPT, OUTPUT = (32, 256), (8, 48)  # tokens, evenly drawn
KV_BYTES = 256 << 20
IDLE_S = 2e-3  # the engine waited for work, not for itself


class Recorder:
    """An executor that remembers what each step computed and how long the engine took over it, its own work included."""

    def __init__(self, executor):
        self.executor, self.reader, self.steps = executor, BatchReader(), []
        self.ended, self.under_way = 0.0, {}

    def submit(self, step):
        start, (rows, _) = time.perf_counter(), self.reader.read(step)
        self.under_way[ticket := self.executor.submit(step)] = (rows, start)
        return ticket

    def poll(self, timeout_s):
        ended = self.executor.poll(timeout_s)
        for ticket, _ in ended:
            (rows, start), now = self.under_way.pop(ticket), time.perf_counter()
            if rows:
                self.steps.append((rows, now - (self.ended if start - self.ended < IDLE_S else start)))
            self.ended = now
        return ended

    def __getattr__(self, name):
        return getattr(self.executor, name)


def drawn(count, rate, seed, vocab, text=0):
    """Poisson arrivals of random prompts; rate 0: all at once. text: the same arrivals and lengths with other tokens."""
    draw, tokens, at, arrivals = random.Random(seed), random.Random(f"{seed}-{text}"), 0.0, []
    for _ in range(count):
        prompt = [tokens.randrange(10, vocab) for _ in range(draw.randint(*PROMPT))]
        arrivals.append(Arrival(at, len(prompt), draw.randint(*OUTPUT), prompt))
        at += draw.expovariate(rate) if rate else 0.0
    return arrivals


@dataclass
class Bench:
    """An engine that is served requests, and simulated."""

    llm: LLM

    def __post_init__(self):
        self.engine, self.name = self.llm.engine, self.llm.config.models[0].name
        self.model, self.num_requests = self.engine.models[self.name], 0
        self.vocab = self.model.spec.vocab
        lane = self.engine.lanes[0]
        self.recorder = lane.executor = Recorder(lane.executor)

    def really(self, arrivals) -> tuple[list[float], list[tuple[list[Row], float]]]:
        """Serve them as they come: seconds from arrival to the end of each, and the steps."""
        waiting, inside, latencies, begun = deque(arrivals), {}, [], time.perf_counter()
        self.recorder.steps = []
        while waiting or inside:
            now = time.perf_counter() - begun
            while waiting and waiting[0].at_s <= now:
                arrival, self.num_requests = waiting.popleft(), self.num_requests + 1
                params = SamplingParams(max_tokens=arrival.output_len, ignore_eos=True, temperature=0.0, detokenize=False)
                inside[name := str(self.num_requests)] = arrival
                self.engine.add_request(Request(name, self.name, list(arrival.token_ids), params))
            if not inside:
                time.sleep(max(0.0, waiting[0].at_s - now))
                continue
            for update in self.engine.step(0.05):
                if update.request.is_finished:
                    latencies.append(time.perf_counter() - begun - inside.pop(update.request.request_id).at_s)
        return latencies, self.recorder.steps

    def simulated(self, arrivals, fit) -> Workday:
        config = self.llm.config
        depth = self.engine.lanes[0].config.depth
        kv = self.llm.memory_plan.kv_cache
        return serve(arrivals, self.model.spec, fit, kv, scheduler=config.scheduler, cache=config.cache, depth=depth)

    def warm(self) -> None:
        """Use the whole KV memory once."""
        tokens = KV_BYTES // sum(group.block_bytes // group.block_size for group in self.model.kv_groups)
        draw, length = random.Random(0), 512
        for _ in range(-(-tokens // length) + 1):
            self.really([Arrival(0.0, length, 1, [draw.randrange(10, self.vocab) for _ in range(length)])])
        gc.collect()
        gc.freeze()

    def calibrate(self, seed, rate, seconds) -> list[tuple[list[Row], float]]:
        """Steps of traffic, and of batches."""
        steps = self.really(drawn(max(8, round(rate * seconds)), rate, 1000 * seed, self.vocab))[1]
        for count in BATCHES:
            steps += self.really(drawn(count, 0.0, 1000 * seed + count, self.vocab))[1]
        return steps


def percentiles(latencies):
    ordered = sorted(latencies)
    return {f"p{q}": ordered[min(len(ordered) - 1, round(q / 100 * (len(ordered) - 1)))] for q in (50, 99)}


def decodes(steps):
    """number of requests -> seconds of each step that only decodes so many"""
    found = defaultdict(list)
    for rows, seconds in steps:
        if all(row.tokens == 1 for row in rows):
            found[len(rows)].append(seconds)
    return {count: times for count, times in found.items() if len(times) > 4}


def step_errors(parts):
    """parts: (fit, steps it was made from, steps served). Of single steps and of their sum.

    noise: how far a served step is from the median of those that decode as many requests; drift: how far that median is from the same one
    of the calibration, just before. Neither is the model's.
    """
    pairs = [(fit.step(rows).seconds, seconds) for fit, _, served in parts for rows, seconds in served]
    errors = [abs(predicted / seconds - 1) for predicted, seconds in pairs]
    noise, drift = [], []
    for _, seen, served in parts:
        before = decodes(seen)
        for count, times in decodes(served).items():
            typical = statistics.median(times)
            noise += [abs(typical / seconds - 1) for seconds in times]
            if count in before:
                drift += [abs(statistics.median(before[count]) / typical - 1)] * len(times)
    return {
        "step_error": statistics.mean(errors),
        "median_step_error": statistics.median(errors),
        "sum_of_steps_error": sum(p for p, _ in pairs) / sum(s for _, s in pairs) - 1,
        "noise": statistics.mean(noise),
        "drift": statistics.mean(drift),
    }


def cores_of_others():
    """Seconds that cores have spent on anything but this process."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice - time.process_time()


def one_load(bench, load, capacity, seconds):
    """The machine's speed drifts within seconds, so traffic comes in parts, each calibrated and predicted just before it is served."""
    rate, parts = load * capacity, []
    predicted, rounds, busy, beyond = [], ([], []), [], 0
    others, begun = cores_of_others(), time.perf_counter()
    for part in range(PARTS):
        seed = round(100 * load) + part
        seen = bench.calibrate(1000 + seed, CALIBRATION_LOAD * capacity, seconds / PARTS / 2)
        fit = StepFit.of(seen)
        arrivals = [drawn(max(4, round(rate * seconds / PARTS)), rate, seed, bench.vocab, text) for text in (0, 1)]
        day = bench.simulated(arrivals[0], fit)
        predicted += [s.latency for s in day.served]
        busy.append(day.busy / day.seconds)
        beyond += day.extrapolated
        for latencies, each in zip(rounds, arrivals, strict=True):
            found, steps = bench.really(each)
            latencies += found
            parts.append((fit, seen, steps))
    row = {"load": load, "requests_per_s": rate, "requests": len(predicted), "steps": sum(len(steps) for _, _, steps in parts)}
    row |= {"predicted_busy": statistics.mean(busy), "extrapolated": beyond, "spread": fit.spread}
    row |= {"cores_used_by_others": (cores_of_others() - others) / (time.perf_counter() - begun)}
    row |= {"predicted_s": percentiles(predicted), "measured_s": [percentiles(latencies) for latencies in rounds]} | step_errors(parts)
    for key, value in row["predicted_s"].items():
        first, second = (m[key] for m in row["measured_s"])
        row |= {f"{key}_error": 2 * value / (first + second) - 1, f"{key}_rounds_differ": 2 * abs(first - second) / (first + second)}
    return row


def validate(bench, seconds):
    """One row per load, printed as soon as it is known."""
    bench.warm()
    capacity = CROWD / max(bench.really(drawn(CROWD, 0.0, 7, bench.vocab))[0])
    for load in LOADS:
        yield (row := one_load(bench, load, capacity, seconds))
        print(json.dumps(row), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder; the bundled model unless given")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/simulator-serving.json"))
    parser.add_argument("--seconds", type=float, default=8.0, help="of traffic at each load and round")
    args = parser.parse_args()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True).stdout.strip()
    with LLM(args.model, num_threads=os.cpu_count(), kv_cache_memory=KV_BYTES) as llm:
        bench = Bench(llm)
        result = {"machine": {"processor": processor_name(), "cores": os.cpu_count()}, "commit": commit, "command": " ".join(sys.argv)}
        result |= {"model": Path(bench.name).name, "loads": list(validate(bench, args.seconds))}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
