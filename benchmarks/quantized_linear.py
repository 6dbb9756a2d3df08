"""One packed linear in every number format: time against the time that reading its bytes takes.

    python benchmarks/quantized_linear.py [--shape 2816x1024] [--rows 1,8,16,512] [--schemes int4_g128_bf16,...] [--isa amx]

As many copies of the weight as fill --bytes are multiplied one after the other, so that no cache of a core holds them, as in a step of a
model. Rounds over the schemes are interleaved; the figure is the median. The floor: stored bytes over the bandwidth measured
in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch

from apportion.bench.bandwidth import measure_bandwidth
from apportion.core.number_format import Scheme
from apportion.kernels.cpu import extension
from apportion.kernels.cpu.ops import CpuOps
from apportion.kernels.ops import LinearSpec
from apportion.kernels.reference.number_formats import quantize
from apportion.platforms.arena import Arena

SCHEMES = (
    "bfloat16,e4m3_channel,e4m3_channel@e4m3_token,e4m3_b128x128@e4m3_g128,int8_channel,int8_channel@int8_token,"
    "int6_g128_bf16@int8_token,int4_g128_bf16,int4_g128_bf16@int8_token,int4_g32_zp_f16,int3_g128_bf16,int2_g64_zp_f16"
)


class Copies:
    """One scheme's linears, and the next to be called."""

    def __init__(self, ops: CpuOps, scheme: str, n: int, c: int, nbytes: int) -> None:
        fmt = Scheme.parse(scheme).weight
        weight = torch.randn(n, c) * c**-0.5
        first = ops.linear(LinearSpec(n, c, scheme))
        self.nbytes = first.nbytes
        count = max(2, nbytes // first.nbytes)
        self.arena = Arena.create(count * first.nbytes, shared=False)
        rows = weight.bfloat16() if fmt.is_float else quantize(weight, fmt)
        self.linears = []
        for i in range(count):
            linear = ops.linear(LinearSpec(n, c, scheme))
            linear.bind(self.arena.tensor[i * first.nbytes : (i + 1) * first.nbytes])
            if i == 0:
                linear.load_rows(rows, 0)
            else:
                self.arena.tensor[i * first.nbytes : (i + 1) * first.nbytes].copy_(self.arena.tensor[: first.nbytes])
            self.linears.append(linear)

    def seconds(self, x: torch.Tensor, out: torch.Tensor, calls: int) -> float:
        start = time.perf_counter()
        for i in range(calls):
            self.linears[i % len(self.linears)](x, out)
        return (time.perf_counter() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="2816x1024", help="outputs x inputs")
    parser.add_argument("--rows", default="1,8,16,512")
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--bytes", type=int, default=96 << 20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isa")
    args = parser.parse_args()
    n, c = map(int, args.shape.split("x"))
    bandwidth = measure_bandwidth(args.threads).best
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    os.sched_setaffinity(0, cores[:1])
    torch.set_num_threads(1)
    ops = CpuOps(extension.load().ThreadTeam(args.threads, cores), args.isa)
    schemes = {scheme: Copies(ops, scheme, n, c, args.bytes) for scheme in args.schemes.split(",")}
    print(f"{n} x {c}, {args.threads} threads, {ops.name}, {bandwidth / 1e9:.1f} GB/s")
    for rows in map(int, args.rows.split(",")):
        x, out = torch.randn(rows, c), torch.empty(rows, n)
        times: dict[str, list[float]] = {scheme: [] for scheme in schemes}
        for _ in range(args.rounds):
            for scheme, copies in schemes.items():
                times[scheme].append(copies.seconds(x, out, max(2, min(len(copies.linears), 2000 // rows))))
        for scheme, values in times.items():
            t, nbytes = statistics.median(values), schemes[scheme].nbytes
            print(
                f"T={rows:4} {scheme:26} {8 * nbytes / n / c:6.3f} bits {t * 1e6:9.1f} us {nbytes / t / 1e9:6.1f} GB/s "
                f"{nbytes / bandwidth / t:6.1%} of the floor {2 * rows * n * c / t / 1e9:8.0f} GF/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
