"""Holds the serving simulator to the engine on this machine: traffic is predicted before it is served.

    python recipes/validate_serving_simulator.py [--out benchmarks/results/simulator-serving.json] [--seconds 8]

The engine runs batches of several sizes; `StepFit` learns from them what a step costs. Poisson traffic at shares of the capacity that the
simulator finds is then simulated, and served for real: errors of single steps, of the median latency and of its 99th percentile.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

from apportion import LLM
from apportion.core.request import Request
from apportion.core.sampling_params import SamplingParams
from apportion.simulator.executor import Arrival, BatchReader, serve
from apportion.simulator.serving import StepFit

LOADS = (0.3, 0.5, 0.7)  # of the rate at which the simulated engine keeps up
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)
PROMPT, OUTPUT = (32, 256), (8, 48)  # tokens, evenly drawn
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


def drawn(count, rate, seed, vocab):
    """Poisson arrivals of random prompts; rate 0: all at once."""
    draw, at, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        tokens = [draw.randrange(10, vocab) for _ in range(draw.randint(*PROMPT))]
        arrivals.append(Arrival(at, len(tokens), draw.randint(*OUTPUT), tokens))
        at += draw.expovariate(rate) if rate else 0.0
    return arrivals


def really(llm, arrivals):
    """Serve them as they come; seconds from arrival to the end of each."""
    engine, name = llm.engine, llm.config.models[0].name
    waiting, inside, latencies, begun = deque(arrivals), {}, [], time.perf_counter()
    while waiting or inside:
        now = time.perf_counter() - begun
        while waiting and waiting[0].at_s <= now:
            arrival = waiting.popleft()
            params = SamplingParams(max_tokens=arrival.output_len, ignore_eos=True, temperature=0.0, detokenize=False)
            request = Request(f"{id(arrivals)}-{len(waiting)}", name, list(arrival.token_ids), params)
            inside[request.request_id] = arrival
            engine.add_request(request)
        if not inside:
            time.sleep(max(0.0, waiting[0].at_s - now))
            continue
        for update in engine.step(0.05):
            if update.request.is_finished:
                latencies.append(time.perf_counter() - begun - inside.pop(update.request.request_id).at_s)
    return latencies


def percentiles(latencies):
    ordered = sorted(latencies)
    return {f"p{q}_s": ordered[min(len(ordered) - 1, round(q / 100 * (len(ordered) - 1)))] for q in (50, 99)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/simulator-serving.json"))
    parser.add_argument("--seconds", type=float, default=8.0, help="of traffic at each load")
    args = parser.parse_args()
    with LLM(num_threads=os.cpu_count()) as llm:
        model = llm.engine.models[llm.config.models[0].name]
        recorder = llm.engine.lanes[0].executor = Recorder(llm.engine.lanes[0].executor)
        really(llm, drawn(4, 0.0, 99, model.spec.vocab))  # warm
        recorder.steps.clear()
        for seed, count in enumerate(BATCHES):
            really(llm, drawn(count, 0.0, seed, model.spec.vocab))
        fit = StepFit.of(recorder.steps)

        def simulated(arrivals):
            config = llm.config
            return serve(arrivals, model.spec, fit, llm.memory_plan.kv_cache, scheduler=config.scheduler, cache=config.cache, depth=1)

        full = simulated(drawn(200, 0.0, 7, model.spec.vocab))
        traffic = {}
        for load in LOADS:
            rate = load * 200 / full.seconds
            traffic[load] = drawn(max(20, round(rate * args.seconds)), rate, int(100 * load), model.spec.vocab)
        days = {load: simulated(arrivals) for load, arrivals in traffic.items()}
        predicted = {load: percentiles([s.latency for s in day.served]) for load, day in days.items()}
        result = {"cores": os.cpu_count(), "steps_calibrated": len(recorder.steps), "spread": fit.spread, "loads": []}
        result["predicted_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for load, arrivals in traffic.items():
            recorder.steps.clear()
            measured = percentiles(really(llm, [replace(a) for a in arrivals]))
            errors = [fit.step(rows).seconds / seconds - 1 for rows, seconds in recorder.steps]
            row = {"load": load, "requests": len(arrivals), "steps": len(errors), "extrapolated": days[load].extrapolated}
            row |= {"step_error": statistics.mean(map(abs, errors)), "step_bias": statistics.mean(errors)}
            for key, value in predicted[load].items():
                row |= {f"predicted_{key}": value, f"measured_{key}": measured[key], f"error_{key}": value / measured[key] - 1}
            result["loads"].append(row)
            print(json.dumps(row))
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
