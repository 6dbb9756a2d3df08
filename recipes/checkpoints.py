"""Checkpoints of a training run in few bytes: weights in float32, moments in 8 bits, files of at most 16 MB.

Moments are rounded in the running optimizer too when they are written, so that a resumed run goes on bit for bit as the run itself does.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE_BYTES = 16 * 10**6
BLOCK = 256  # moments that share a scale
SQUARES = "exp_avg_sq"


def encode_moment(moment: Tensor, name: str) -> dict[str, Tensor]:
    """A moment as one byte each. Squares keep their roots, rounded up: none becomes nothing, no step becomes longer."""
    flat = moment.detach().float().cpu().flatten()
    rows = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    if name == SQUARES:
        scale = (rows.amax(-1).sqrt() / 255).clamp_min(1e-20)
        # a hair less: what is a whole number of steps already must not go up by one for a rounding error
        codes = (rows.sqrt() / scale[:, None] * (1 - 8e-7)).ceil().clamp(0, 255).to(torch.uint8)
    else:
        scale = (rows.abs().amax(-1) / 127).clamp_min(1e-20)
        codes = (rows / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {"codes": codes.flatten()[: len(flat)].view(moment.shape), "scale": scale}


def decode_moment(codes: Tensor, scale: Tensor, name: str) -> Tensor:
    flat = codes.float().flatten()
    rows = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK) * scale[:, None]
    values = rows.flatten()[: len(flat)].view(codes.shape)
    return values.square() if name == SQUARES else values


def save(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], progress: dict[str, Any]) -> None:
    """Replace what `folder` holds by this state, all of it or nothing."""
    tensors = {f"model.{name}": p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    for place, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()["state"]
        for index, entry in state.items():
            for name, value in entry.items():
                key = f"optimizer.{place}.{index}.{name}"
                if value.numel() < BLOCK:
                    tensors[key] = value.detach().cpu().clone()
                    continue
                coded = encode_moment(value, name)
                value.copy_(decode_moment(**coded, name=name))
                tensors |= {f"{key}.{part}": tensor for part, tensor in coded.items()}
    partial = folder.with_name(folder.name + ".new")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, shard in enumerate(shards(tensors)):
        save_file(shard, partial / f"state-{number}.safetensors")
    (partial / "progress.json").write_text(json.dumps(progress))
    before = previous(folder)
    if folder.exists():
        folder.rename(before)
    partial.rename(folder)
    shutil.rmtree(before, ignore_errors=True)


def previous(folder: Path) -> Path:
    """Where the last state is for the moment in which another takes its place."""
    return folder.with_name(folder.name + ".old")


def exists(folder: Path) -> bool:
    return folder.exists() or previous(folder).exists()


def load(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Put the state that `folder` holds into model and optimizers; returns the progress."""
    tensors: dict[str, Tensor] = {}
    folder = folder if folder.exists() else previous(folder)
    for path in sorted(folder.glob("state-*.safetensors")):
        tensors |= load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for place, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if not key.startswith(f"optimizer.{place}."):
                continue
            _, _, index, name, *part = key.split(".")
            if part == ["scale"]:
                continue
            value = decode_moment(tensor, tensors[key.removesuffix("codes") + "scale"], name) if part else tensor
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((folder / "progress.json").read_text())


def shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors in their order, in pieces of at most FILE_BYTES (a tensor is not cut)."""
    pieces: list[dict[str, Tensor]] = [{}]
    room = FILE_BYTES - 2**16  # for the header
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if pieces[-1] and sum(t.numel() * t.element_size() for t in pieces[-1].values()) + size > room:
            pieces.append({})
        pieces[-1][name] = tensor
    return pieces
