"""Train the small models that judge this project: `python recipes/train_small.py dense --data ../shared/data --init DENSE --out DIR`.

One command for each of them, resumed by giving it again. Weights are float32 and products bf16; Muon for the matrices, AdamW for the rest.
On a CPU rows have up to 1,024 tokens; on a GPU (`--device cuda`) 8,192. What is learnt and when stands in text_course.py and
vision_course.py as data, and the text, tasks and puzzles in training_mix.py.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, Protocol

import checkpoints
import torch
from muon import Muon
from text_course import Plan, text_course
from torch import Tensor, nn
from vision_course import vision_course

WARMUP = 60
AVERAGED = ("embed", "lm_head", "mlp.gate.weight", "position")  # matrices that Muon is not for: a row of each is one thing's own


class Course(Protocol):
    """A model and what it is taught. `start` holds what `loss` keeps in `progress` beside the step."""

    model: nn.Module
    plan: Plan
    start: dict[str, Any]

    def loss(self, step: int, progress: dict[str, Any]) -> Tensor: ...

    def line(self, step: int, progress: dict[str, Any]) -> dict[str, Any]: ...

    def judge(self) -> dict[str, Any]: ...

    def export(self, source: Path, folder: Path) -> None: ...


def optimizers_of(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.dim() in (2, 3) and not any(part in name for part in AVERAGED)]
    known = {id(p) for p in matrices}
    rest = [p for _, p in trained if id(p) not in known]
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def pace(step: int, steps: int) -> float:
    """The share of the peak learning rate: a short warm-up, then straight down to nothing."""
    return min((step + 1) / WARMUP, 1 - step / steps)


def train(
    course: Course,
    out: Path,
    *,
    minutes: float = math.inf,
    until: int | None = None,
    log_every: int = 25,
    judge_every: int = 200,
    save_every: int = 100,
) -> int:
    """Steps from the last checkpoint in `out` on, to the plan's end or step `until`, or until `minutes` have gone by. Returns the step."""
    plan, folder = course.plan, out / "checkpoint"
    optimizers = optimizers_of(course.model, plan.lr)
    progress = {"step": 0, "cpu_seconds": 0.0} | course.start
    if checkpoints.exists(folder):
        progress = checkpoints.load(folder, course.model, optimizers)
    out.mkdir(parents=True, exist_ok=True)
    deadline, last = time.monotonic() + minutes * 60, min(plan.steps, until or plan.steps)
    with (out / "log.jsonl").open("a") as log:
        while progress["step"] < last and time.monotonic() < deadline:
            began, step = time.process_time(), progress["step"]
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = plan.lr * pace(step, plan.steps)
            loss = course.loss(step, progress)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(course.model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            progress["step"] = step = step + 1
            progress["cpu_seconds"] += time.process_time() - began
            if step % log_every == 0 or step == last:
                line = {"step": step, "cpu_seconds": round(progress["cpu_seconds"]), "loss": round(loss.item(), 3)}
                line |= {"norm": round(norm.item(), 2)} | course.line(step - 1, progress)
                if step % judge_every == 0 or step == last:
                    line |= course.judge()
                print(json.dumps(line), file=log, flush=True)
            if step % save_every == 0 or step == last or time.monotonic() >= deadline:
                checkpoints.save(folder, course.model, optimizers, progress)
    return progress["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("dense", "polish", "moe", "draft", "vision"))
    parser.add_argument("--data", type=Path, required=True, help="folder with text-train and text-gsm8k")
    parser.add_argument("--init", type=Path, required=True, help="folder of the dense model to start from (draft: its tokenizer)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the log, the checkpoint and, at the end, the model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; give the command again to go on")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model == "vision":
        course: Course = vision_course(args.init, args.device)
    else:
        course = text_course(args.model, args.data, args.init, args.device)
    print(f"{args.model}: {sum(p.numel() for p in course.model.parameters()) / 1e6:.2f} M parameters", flush=True)
    if train(course, args.out, minutes=args.minutes) == course.plan.steps:
        course.export(args.init, args.out / "model")


if __name__ == "__main__":
    main()
