"""Holds the simulator to real training runs of two processes on this machine: gloo over loopback and over rate-limited veth links.

    python recipes/validate_simulator.py calibrate          # per-operator times, per-link message times, overlap; on other models
    python recipes/validate_simulator.py predict            # every held-out case, before any is measured; the file says when
    python recipes/validate_simulator.py measure            # in slices of --seconds; call again until it says that all are done
    python recipes/validate_simulator.py report             # errors, orders, ablations -> benchmarks/simulator/

A case is a compiled execution graph: the simulator predicts its time, `simulator/two_ranks` runs it (torch computes, gloo carries), each
rank pinned to a core of its own. veth links between network namespaces need the right to make them (CAP_NET_ADMIN, CAP_SYS_ADMIN) and are
skipped with a reason otherwise. Every process keeps freed memory, so that steps do not pay for page faults.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from recipes.simulator.cases import CALIBRATION_MODELS, LINKS, STRATEGIES, all_cases  # noqa: E402

ENV = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": "67108864",
}
RATES = {"1gbit": "1gbit", "200mbit": "200mbit"}


class Link:
    """Where the two ranks run. loopback: this namespace; else two namespaces of their own, joined by a veth pair of the given rate."""

    def __init__(self, name):
        self.name, self.spaces, self.address, self.interface = name, [None, None], "127.0.0.1", "lo"

    def __enter__(self):
        if self.name != "loopback":
            tag = f"ap{os.getpid() % 10000}"
            self.spaces, self.address, self.interface = [f"{tag}a", f"{tag}b"], "10.77.0.1", "ap0"
            sh("ip", "netns", "add", self.spaces[0])
            sh("ip", "netns", "add", self.spaces[1])
            sh("ip", "link", "add", "ap0", "netns", self.spaces[0], "type", "veth", "peer", "name", "ap0", "netns", self.spaces[1])
            for i, space in enumerate(self.spaces):
                inside = ("ip", "netns", "exec", space)
                sh(*inside, "ip", "addr", "add", f"10.77.0.{i + 1}/24", "dev", "ap0")
                sh(*inside, "ip", "link", "set", "ap0", "up")
                sh(*inside, "ip", "link", "set", "lo", "up")
                sh(
                    *inside,
                    "tc",
                    "qdisc",
                    "add",
                    "dev",
                    "ap0",
                    "root",
                    "tbf",
                    "rate",
                    RATES[self.name],
                    "burst",
                    "256kb",
                    "latency",
                    "50ms",
                )
        return self

    def __exit__(self, *_):
        for space in filter(None, self.spaces):
            subprocess.run(["ip", "netns", "del", space], check=False)

    def start(self, job, num_ranks):
        """The job's worker processes, rank r on core r; what they print as JSON lines, by rank."""
        cores = sorted(os.sched_getaffinity(0))
        port, processes = str(20000 + os.getpid() % 20000), []
        for rank in range(num_ranks):
            prefix = ["ip", "netns", "exec", self.spaces[rank]] if self.spaces[rank] else []
            command = [*prefix, "taskset", "-c", str(cores[rank % len(cores)]), sys.executable, __file__, "rank", str(rank), str(num_ranks)]
            env = {**os.environ, **ENV, "MASTER_ADDR": self.address, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": self.interface}
            processes.append(subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        for process in processes:
            process.stdin.write(json.dumps(job))
            process.stdin.close()
        found = [[json.loads(line) for line in process.stdout if line.startswith("{")] for process in processes]
        if any(process.wait() for process in processes):
            raise SystemExit(f"a rank of {job['kind']} over {self.name} failed")
        return found


def sh(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(f"{' '.join(command)}: {done.stderr.strip()}")


def links():
    """The links that can be made here; why not, for the others."""
    for name in LINKS:
        try:
            with Link(name):
                pass
            yield name
        except (PermissionError, FileNotFoundError) as error:
            print(f"skipped {name}: {error}", file=sys.stderr)


def calibrate(out):
    """One part at each call, so that no part runs for more than a minute."""
    result = json.loads(out.read_text()) if out.exists() else {"machine": machine(), "when": now(), "operators": {}, "links": {}}
    graphs = sorted({(c.model, c.strategy) for c in all_cases()} | {(m, s) for m in CALIBRATION_MODELS for s in STRATEGIES_SEEN})
    seen, begun = result.setdefault("seen", []), time.perf_counter()
    for name, ranks in (("together", 2), ("alone", 1)):
        known = result["operators"].setdefault(name, {})
        for model in dict.fromkeys(m for m, _ in graphs):
            mine = [g for g in graphs if g[0] == model and (ranks == 2) != g[1].startswith("single")]
            if [name, model] in seen or not mine or time.perf_counter() - begun > 28:
                continue
            with Link("loopback") as link:
                rows = link.start({"kind": "operators", "graphs": mine, "known": list(known)}, ranks)
            known |= {both[0]["key"]: statistics.mean(x["seconds"] for x in both) for both in zip(*rows, strict=True)}
            seen.append([name, model])
            out.write_text(json.dumps(result, indent=1))
            print(f"{name}, {model}: {len(rows[0])} kinds of operators", flush=True)
    if time.perf_counter() - begun > 5:
        print("call again: messages and steps are next")
        return None
    for name in links():
        if name not in result["links"]:
            with Link(name) as link:
                rows = link.start({"kind": "messages"}, 2)
            result["links"][name] = {both[0]["key"]: max(x["value"] for x in both) for both in zip(*rows, strict=True)}
            print(name, {k: f"{v:.3g}" for k, v in result["links"][name].items() if "gamma" in k})
            out.write_text(json.dumps(result, indent=1))
            if time.perf_counter() - begun > 30:
                return None
    if time.perf_counter() - begun > 12:
        return None
    wanted = [
        (m, s, link) for link in result["links"] for m in CALIBRATION_MODELS for s in STRATEGIES_SEEN if link == "loopback" or s != "single"
    ]
    result["steps"] = measure_cases(wanted, 1e9, result.get("steps", {}), rounds=1)
    out.write_text(json.dumps(result, indent=1))
    print("calibrated")
    return None


STRATEGIES_SEEN = ("single", "ddp-no-overlap", "ddp-1mb")


def predict(out, calibration):
    from recipes.simulator.predict import Predictor

    predictor = Predictor(json.loads(calibration.read_text()))
    found = {}
    for case in all_cases():
        if case.link in predictor.links or case.num_ranks == 1:
            found[case.name] = predictor.all(case)
    out.write_text(json.dumps({"when": now(), "calibration": calibration.name, "fit": predictor.fitted, "cases": found}, indent=1))
    print(f"{len(found)} predictions")


def measure_cases(cases, seconds, done, rounds=2):
    """[(model, strategy, link)] -> name -> list of step times per round, all ranks' slowest. done: what is there already."""
    begun = time.perf_counter()
    for link_name in dict.fromkeys(link for _, _, link in cases):
        for ranks in (1, 2):
            mine = [c for c in cases if c[2] == link_name and (STRATEGIES[c[1]] is not None) and (2 - c[1].startswith("single")) == ranks]
            mine = [c for c in mine if len(done.get(" ".join(c), [])) < rounds]
            left = seconds - (time.perf_counter() - begun)
            if not mine or left < 8:
                continue
            with Link(link_name) as link:
                rows = link.start({"kind": "steps", "cases": mine, "seconds": min(left - 6, 1e6)}, ranks)
            for both in zip(*rows, strict=False):
                done.setdefault(both[0]["case"], []).append(statistics.median(map(max, zip(*(r["times"] for r in both), strict=False))))
                done.setdefault("peak " + both[0]["case"], []).append(max(r["peak"] for r in both))
    return done


def measure(out, predictions, seconds):
    predicted = json.loads(predictions.read_text())
    digest = hashlib.sha256(predictions.read_bytes()).hexdigest()
    data = (
        json.loads(out.read_text())
        if out.exists()
        else {"predicted": predicted["when"], "predictions_sha256": digest, "slices": [], "steps": {}}
    )
    if data["predictions_sha256"] != digest:
        raise SystemExit("the predictions have changed since measuring began: remove the measurements and measure again")
    cases = [name.split(" ") for name, p in predicted["cases"].items() if p["full"] < 2.5]
    first = all(" ".join(c) in data["steps"] for c in cases)  # everything once, then again: what the machine itself varies by
    data["steps"] = measure_cases([tuple(c) for c in cases], seconds, data["steps"], rounds=1 + first)
    data["slices"].append(now())
    out.write_text(json.dumps(data, indent=1))
    left = [sum(len(data["steps"].get(" ".join(c), [])) < n for c in cases) for n in (1, 2)]
    print(f"of {len(cases)} cases {left[0]} are left to measure, {left[1]} to measure again")


def machine():
    import platform

    import torch

    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo", encoding="utf-8") if line.startswith("model name")), "")
    return {"processor": model, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def report(folder):
    from recipes.simulator.report import write_report

    write_report(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("calibrate", "predict", "measure", "report", "rank"))
    parser.add_argument("numbers", nargs="*", type=int)
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "simulator")
    parser.add_argument("--seconds", type=float, default=50.0, help="of one slice of measuring")
    args = parser.parse_args()
    if args.mode == "rank":
        from recipes.simulator.worker import work

        return work(json.loads(sys.stdin.read()), *args.numbers)
    args.folder.mkdir(parents=True, exist_ok=True)
    files = {name: args.folder / f"{name}.json" for name in ("calibration", "predictions", "measurements")}
    if args.mode == "calibrate":
        calibrate(files["calibration"])
    elif args.mode == "predict":
        predict(files["predictions"], files["calibration"])
    elif args.mode == "measure":
        measure(files["measurements"], files["predictions"], args.seconds)
    else:
        report(args.folder)
    return 0


if __name__ == "__main__":
    main()
