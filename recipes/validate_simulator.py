"""Holds the simulator to real training runs of two processes on this machine: gloo over loopback and over rate-limited veth links.

    python recipes/validate_simulator.py calibrate          # per-operator times, per-link message times, overlap; on other models
    python recipes/validate_simulator.py predict            # every held-out case, before any is measured; the file says when
    python recipes/validate_simulator.py measure            # one round, for --seconds at most; call again for another
    python recipes/validate_simulator.py report             # errors, orders, ablations -> benchmarks/results/simulator-real-runs.*
    python recipes/validate_simulator.py capped             # real steps under memory caps 10 % above and below the predicted peak

A case is a compiled execution graph: the simulator predicts its time, `simulator/two_ranks` runs it (torch computes, gloo carries), each
rank pinned to a core of its own, which nothing else should use. gloo's threads run at real-time priority (CAP_SYS_NICE). veth links between
network namespaces need the right to make them (CAP_NET_ADMIN, CAP_SYS_ADMIN) and are skipped with a reason otherwise. Every process keeps
freed memory, so that steps do not pay for page faults.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from recipes.simulator.capped import CAPS, CASES  # noqa: E402
from recipes.simulator.capped import ENV as CAPPED_ENV  # noqa: E402
from recipes.simulator.cases import CALIBRATION_MODELS, LINKS, STRATEGIES, all_cases  # noqa: E402

ENV = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.trim_threshold=4294967296:glibc.malloc.mmap_max=0:glibc.malloc.top_pad=67108864:glibc.malloc.hugetlb=1",
}
PACKET = {"1gbit": 32, "200mbit": 8}  # KiB that the kernel hands to a link at once; hardly more than one goes ahead of the rate
SHORT = ("match", "u16", "0", "0xffc0", "at", "2")  # under 64 bytes: acknowledgements, which do not wait behind the other direction's data


class Link:
    """Where the two ranks run. loopback: this namespace; else two namespaces of their own, joined by a veth pair of the given rate."""

    def __init__(self, name):
        self.name, self.spaces, self.address, self.interface = name, [None, None], "127.0.0.1", "lo"

    def __enter__(self):
        if self.name != "loopback":
            tag = f"ap{os.getpid() % 10000}"
            self.spaces, self.address, self.interface = [f"{tag}a", f"{tag}b"], "10.77.0.1", "ap0"
            try:
                self._join()
            except PermissionError:
                self.__exit__()
                raise
        return self

    def _join(self):
        packet = PACKET[self.name]
        rate = ("rate", self.name, "burst", f"{packet + 2}kb", "cburst", f"{packet + 2}kb")
        for space in self.spaces:
            sh("ip", "netns", "add", space)
        sh("ip", "link", "add", "ap0", "netns", self.spaces[0], "type", "veth", "peer", "name", "ap0", "netns", self.spaces[1])
        for i, space in enumerate(self.spaces):
            inside = ("ip", "netns", "exec", space)
            sh(*inside, "ip", "addr", "add", f"10.77.0.{i + 1}/24", "dev", "ap0")
            sh(*inside, "ip", "link", "set", "ap0", "gso_max_size", str(packet << 10), "up")
            sh(*inside, "ip", "link", "set", "lo", "up")
            sh(*inside, "sysctl", "-q", "-w", "net.ipv4.tcp_slow_start_after_idle=0")
            tc = (*inside, "tc")
            sh(*tc, "qdisc", "add", "dev", "ap0", "root", "handle", "1:", "htb", "default", "2")
            sh(*tc, "class", "add", "dev", "ap0", "parent", "1:", "classid", "1:1", "htb", "rate", "10gbit")
            sh(*tc, "class", "add", "dev", "ap0", "parent", "1:", "classid", "1:2", "htb", *rate)
            sh(*tc, "filter", "add", "dev", "ap0", "parent", "1:", "protocol", "ip", "u32", *SHORT, "flowid", "1:1")

    def __exit__(self, *_):
        for space in filter(None, self.spaces):
            subprocess.run(["ip", "netns", "del", space], check=False, stderr=subprocess.DEVNULL)

    def start(self, job, num_ranks, env=ENV):
        """The job's worker processes, rank r on core r; what they print as JSON lines, by rank."""
        cores = sorted(os.sched_getaffinity(0))
        port, processes = str(20000 + os.getpid() % 20000), []
        said = [tempfile.TemporaryFile("w+") for _ in range(num_ranks)]  # no pipes: a full one would hold a rank up
        for rank in range(num_ranks):
            prefix = ["ip", "netns", "exec", self.spaces[rank]] if self.spaces[rank] else []
            command = [*prefix, "taskset", "-c", str(cores[rank % len(cores)]), sys.executable, __file__, "rank", str(rank), str(num_ranks)]
            environment = {**os.environ, **env, "MASTER_ADDR": self.address, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": self.interface}
            processes.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=said[rank], text=True))
        for process in processes:
            process.stdin.write(json.dumps(job))
            process.stdin.close()
        if any(process.wait() for process in processes):
            raise SystemExit(f"a rank of {job['kind']} over {self.name} failed")
        for lines in said:
            lines.seek(0)
        return [[json.loads(line) for line in lines if line.startswith("{")] for lines in said]


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


def calibrate(out, rounds):
    """The median of rounds, each in processes of its own: where memory lies moves an operator by percents."""
    seen = [(m, s) for m in CALIBRATION_MODELS for s in STRATEGIES_SEEN]
    graphs = sorted({(c.model, c.strategy) for c in all_cases()} | set(seen))
    operators, tables, steps = defaultdict(lambda: defaultdict(list)), defaultdict(lambda: defaultdict(list)), {}
    usable = list(links())
    for _ in range(rounds):
        for name, ranks in (("together", 2), ("alone", 1)):
            mine = [g for g in graphs if (ranks == 2) != g[1].startswith("single")]
            with Link("loopback") as link:
                rows = link.start({"kind": "operators", "graphs": mine}, ranks)
            for both in zip(*rows, strict=True):
                operators[name][both[0]["key"]].append(statistics.mean(x["seconds"] for x in both))
            print(f"{name}: {len(rows[0])} kinds of operators", flush=True)
        for name in usable:
            with Link(name) as link:
                rows = link.start({"kind": "messages", "slow": name != "loopback"}, 2)
            for both in zip(*rows, strict=True):
                tables[name][both[0]["key"]].append(max(x["value"] for x in both))
            print(name, {k: f"{v[-1]:.3g}" for k, v in tables[name].items() if "gamma" in k}, flush=True)
        cases = [(*c, link) for link in usable for c in seen if link == "loopback" or c[1] != "single"]
        measure_cases(cases, 1e9, steps, rounds)
    result = {"machine": machine(), "when": now(), "rounds": rounds}
    result |= {"operators": medians(operators), "links": medians(tables), "steps": steps}
    out.write_text(json.dumps(result, indent=1))


def medians(found):
    return {name: {key: statistics.median(values) for key, values in rows.items()} for name, rows in found.items()}


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
    cases = [tuple(name.split(" ")) for name, p in predicted["cases"].items() if p["full"] < 2.5]
    data["steps"] = measure_cases(cases, seconds, data["steps"], rounds_of(cases, data) + 1)
    data["slices"].append(now())
    out.write_text(json.dumps(data, indent=1))
    print(f"{len(cases)} cases: all measured {rounds_of(cases, data)} times")


def rounds_of(cases, data):
    return min(len(data["steps"].get(" ".join(c), [])) for c in cases)


def capped(out):
    """Every case under a cap of memory above and below its prediction: does what was predicted happen?"""
    rows = []
    for (model, strategy), (expected, share) in itertools.product(CASES, CAPS.items()):
        job = {"kind": "capped", "model": model, "strategy": strategy, "share": share}
        with Link("loopback") as link:
            said = link.start(job, 1 if strategy.startswith("single") else 2, CAPPED_ENV)
        verdicts = [line["verdict"] for lines in said for line in lines]
        real = "out of memory" if "out of memory" in verdicts else " and ".join(sorted(set(verdicts)))
        rows.append({"case": f"{model} {strategy}", "cap": share, "predicted": expected, "real": real})
        print(f"{model} {strategy} at {share:.0%} of the prediction: {real}", flush=True)
    right = sum(row["predicted"] == row["real"] for row in rows)
    about = {"machine": machine(), "when": now(), "commit": commit(), "command": "python recipes/validate_simulator.py capped"}
    out.write_text(json.dumps(about | {"right": right, "of": len(rows), "rows": rows}, indent=1) + "\n")
    print(f"{right} of {len(rows)} verdicts are right")


def machine():
    import platform

    import torch

    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo", encoding="utf-8") if line.startswith("model name")), "")
    return {"processor": model, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}


def commit():
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def report(folder):
    from recipes.simulator.report import write_report

    write_report(folder, commit())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("calibrate", "predict", "measure", "report", "capped", "rank"))
    parser.add_argument("numbers", nargs="*", type=int)
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--seconds", type=float, default=50.0, help="of one slice of measuring")
    parser.add_argument("--rounds", type=int, default=3, help="of calibration")
    args = parser.parse_args()
    if args.mode == "rank":
        from recipes.simulator.worker import work

        return work(json.loads(sys.stdin.read()), *args.numbers)
    args.folder.mkdir(parents=True, exist_ok=True)
    files = {name: args.folder / f"simulator-{name}.json" for name in ("calibration", "predictions", "measurements")}
    if args.mode == "calibrate":
        calibrate(files["calibration"], args.rounds)
    elif args.mode == "predict":
        predict(files["predictions"], files["calibration"])
    elif args.mode == "measure":
        measure(files["measurements"], files["predictions"], args.seconds)
    elif args.mode == "capped":
        capped(args.folder / "simulator-memory-verdicts.json")
    else:
        report(args.folder)
    return 0


if __name__ == "__main__":
    main()
