"""How long the simulator itself takes: GPT-2 and VGG19 on 32 devices, and a graph of 10,000 tasks.

    python recipes/time_simulator.py [--out benchmarks/results/simulator-speed.json]

The original takes 6.265 s and 1.698 s for 32 GPUs, its operator profiles not counted; here compiling, costs, execution and memory are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from apportion.platforms.cpu import processor_name
from apportion.simulator import presets
from apportion.simulator.compiler import compile
from apportion.simulator.cost.measured import Measured, MeasuredCollectives
from apportion.simulator.cost.model import CostModel, Roofline
from apportion.simulator.models.cnn import vgg19
from apportion.simulator.models.library import decoder
from apportion.simulator.plan import Plan, Workload, strategy
from apportion.simulator.run import simulate
from apportion.simulator.strategy_tree import StrategyTree
from apportion.simulator.topology import topology

TO_REACH = {"gpt2 on 32": 6.3, "vgg19 on 32": 1.7, "execution of 10,000 tasks": 2.0}


def gpt2(where):
    """Pipeline, data and tensor parallel: 2 x 8 x 2, in two micro-batches."""
    spec, gated = decoder("gpt2")
    work = Workload(spec, 64, 1024, gated=gated)
    return work.model(), lambda model: strategy(model, spec.num_layers, Plan(pp=2, dp=8, tp=2, num_micro_batches=2), where.cluster)


def vgg(where):
    def data_parallel(model):
        tree = StrategyTree(model)
        presets.data_parallel(tree, where.cluster.mesh(dp=32))
        return tree

    return vgg19(1024, 224, 1000), data_parallel


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/simulator-speed.json"))
    args = parser.parse_args()
    where, rows = topology("dgx-a100", 4), {}
    for name, make in (("gpt2 on 32", gpt2), ("vgg19 on 32", vgg)):
        start = time.perf_counter()
        model, annotate = make(where)
        graph = compile(model, annotate(model), where.cluster)
        compiled = time.perf_counter()
        costs = CostModel(where, (Measured(), Roofline()), MeasuredCollectives())
        simulate(graph, costs, num_draws=0)
        end = time.perf_counter()
        rows[name] = {"seconds": end - start, "compiling": compiled - start, "tasks": len(graph.tasks), "to_reach": TO_REACH[name]}
    spec, gated = decoder("gpt2")
    work, plan = Workload(spec, 64, 1024, gated=gated), Plan(pp=2, dp=4, num_micro_batches=4)
    graph = compile(work.model(), strategy(work.model(), spec.num_layers, plan, where.cluster), where.cluster)
    costs = CostModel(where, (Measured(), Roofline()), MeasuredCollectives())
    start = time.perf_counter()
    simulate(graph, costs, num_draws=0)
    seconds = time.perf_counter() - start
    name = "execution of 10,000 tasks"
    rows[name] = {"seconds": seconds * 1e4 / len(graph.tasks), "tasks": len(graph.tasks), "to_reach": TO_REACH[name]}
    for name, row in rows.items():
        print(f"{name}: {row['seconds']:.2f} s ({row['tasks']} tasks), to reach {row['to_reach']} s")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True).stdout.strip()
    about = {"machine": {"processor": processor_name(), "cores": os.cpu_count()}, "commit": commit, "command": " ".join(sys.argv)}
    about["when"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    args.out.write_text(json.dumps(about | rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
