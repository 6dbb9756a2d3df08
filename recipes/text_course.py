"""What a decoder of text is taught, and how it is judged meanwhile: the stages of each model, its loss, its held-out text, its export."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from small_models import Decoder, checkpoint_of, load_checkpoint
from tokenizers import Tokenizer
from torch import Tensor, nn
from training_mix import KINDS, Stage, TrainingMix, encode_texts, read_texts
from upcycled import config_of_mixture, upcycle
from weighted_loss import WeightedLoss, chunk_loss

SEED = 20261121
MAX_PASSES = 6  # over the training text, in one run
FILE_BYTES = 16 * 10**6  # of an exported file


@dataclass(frozen=True)
class Plan:
    """lr: the peak, for Muon and AdamW alike; config: what differs from the configuration of the model that the run starts from."""

    steps: int
    batch_tokens: int
    lr: float
    stages: tuple[Stage, ...]
    config: dict[str, Any] = field(default_factory=dict)

    def stage_at(self, step: int) -> Stage:
        done = (step + 0.5) / self.steps
        for stage in self.stages:
            done -= stage.share
            if done < 0:
                return stage
        return self.stages[-1]

    def passes(self, stream: int) -> float:
        """How often a text of `stream` tokens is read."""
        return sum(stage.share * stage.text for stage in self.stages) * self.steps * self.batch_tokens / stream


# Short rows of nothing but puzzles come first: there induction forms within minutes, and everything else is learnt on top of it.
SHORT = (
    Stage(0.168, length=128, text=0.10, words=0, repeat=50, recall=50, chat=0),
    Stage(0.112, length=256, text=0.40, words=60, repeat=10, recall=30, chat=0),
    Stage(0.56, length=512, text=0.65, words=65, repeat=5, recall=15, chat=15),
    Stage(0.16, length=1024, text=0.65, words=65, repeat=5, recall=15, chat=15),
)
WORDS = (
    Stage(0.5, length=256, text=0.45, words=80, repeat=5, recall=10, chat=5),
    Stage(0.5, length=512, text=0.50, words=80, repeat=5, recall=10, chat=5),
)
# A task of 512 tokens with all its questions takes a row of 640.
AFTER_DENSE = (
    Stage(0.08, length=128, text=0.30, words=0, repeat=30, recall=70, chat=0),
    Stage(0.57, length=256, text=0.70, words=75, repeat=5, recall=10, chat=10),
    Stage(0.35, length=640, text=0.60, words=75, repeat=5, recall=10, chat=10),
)
LONG = (
    Stage(0.06, length=128, text=0.10, words=0, repeat=50, recall=50, chat=0),
    Stage(0.10, length=256, text=0.30, words=60, repeat=10, recall=30, chat=0),
    Stage(0.34, length=1024, text=0.45, words=65, repeat=5, recall=15, chat=15),
    Stage(0.30, length=4096, text=0.40, words=65, repeat=5, recall=15, chat=15),
    Stage(0.20, length=8192, text=0.40, words=65, repeat=5, recall=15, chat=15),
)
LONG_CONFIG = {"max_position_embeddings": 16384, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
DRAFT_CONFIG = {
    "hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 512, "num_hidden_layers": 3,
}  # fmt: skip
PLANS = {
    ("dense", "cpu"): Plan(1250, 8192, 2e-3, SHORT),
    ("polish", "cpu"): Plan(160, 8192, 1e-3, WORDS),
    ("moe", "cpu"): Plan(320, 8192, 1.5e-3, AFTER_DENSE),
    ("draft", "cpu"): Plan(1250, 8192, 2e-3, SHORT, DRAFT_CONFIG),
    ("dense", "cuda"): Plan(1500, 65536, 2e-3, LONG, LONG_CONFIG),
    ("moe", "cuda"): Plan(1500, 65536, 2e-3, LONG, LONG_CONFIG),
    ("draft", "cuda"): Plan(1500, 65536, 2e-3, LONG, DRAFT_CONFIG | LONG_CONFIG),
}
EXPERTS = {"num_experts": 16, "top_k": 4, "ffn_dim": 64}


class TextCourse:
    """A decoder, its rows and its loss. device: 'cpu' or 'cuda'; balance: weight of the experts' balancing loss."""

    def __init__(
        self, model: Decoder, mix: TrainingMix, held_out: np.ndarray, plan: Plan, device: str, balance: float = 0.0, compiled: bool = True
    ) -> None:
        self.model, self.mix, self.held_out, self.plan, self.device, self.balance = model.to(device), mix, held_out, plan, device, balance
        if plan.passes(len(mix.stream)) > MAX_PASSES:
            raise ValueError(f"the plan reads the text {plan.passes(len(mix.stream)):.1f} times; {MAX_PASSES} are allowed")
        self.run = torch.compile(model, dynamic=False) if compiled else model
        WeightedLoss.piece = torch.compile(chunk_loss, dynamic=False) if compiled else chunk_loss
        self.start = {"position": 0}
        self._sums = np.zeros((3, len(KINDS)))  # by kind of token: how many, their NLL, how many were the likeliest

    def loss(self, step: int, progress: dict[str, Any]) -> Tensor:
        """The loss of a step's batch; moves the text's position in `progress` on."""
        ids, weights, kinds, progress["position"] = self._batch(self.plan.stage_at(step), step, progress["position"])
        ids, weights = ids.to(self.device), weights.to(self.device)
        with torch.autocast(self.device, torch.bfloat16):
            hidden = self.run(ids[:, :-1])
        loss, nlls, hits = WeightedLoss.apply(hidden.flatten(0, 1), self.model.embed_tokens.weight, ids[:, 1:].flatten(), weights)
        counted = (torch.ones_like(nlls).cpu(), nlls.cpu(), hits.cpu())
        self._sums += np.stack([np.bincount(kinds, weights=what, minlength=len(KINDS)) for what in counted])
        return loss + self.balance * sum((moe.balance for moe in self.model.mixtures()), torch.zeros((), device=self.device))

    def _batch(self, stage: Stage, step: int, position: int) -> tuple[Tensor, Tensor, np.ndarray, int]:
        """ids [B, T + 1], weights [B * T] that sum to 1, kinds [B * T], and where the text goes on."""
        rows = []
        for place in range(self.plan.batch_tokens // stage.length):
            row, position = self.mix.row(stage, step, place, position)
            rows.append(row)
        weights = torch.from_numpy(np.concatenate([row.weights for row in rows]))
        kinds = np.concatenate([row.kinds for row in rows])
        return torch.from_numpy(np.stack([row.ids for row in rows])), weights / weights.sum(), kinds, position

    def line(self, step: int, progress: dict[str, Any]) -> dict[str, Any]:
        """What the log says of the steps since it was last asked."""
        count, nll, hits = self._sums
        self._sums = np.zeros_like(self._sums)
        said = {name: round(n / c, 3) for name, n, c in zip(KINDS, nll, count, strict=True) if c}
        right = {name: round(h / c, 3) for name, h, c in zip(KINDS, hits, count, strict=True) if c}
        passes = round(progress["position"] / len(self.mix.stream), 3)
        return {"length": self.plan.stage_at(step).length, "nll": said, "hits": right, "passes": passes}

    def judge(self) -> dict[str, Any]:
        """NLL of the held-out text, and the most and least used expert of each layer there (share of its tokens)."""
        loads = [0.0] * len(self.model.mixtures())
        total, count = 0.0, 0
        for batch in torch.from_numpy(windows(self.held_out)).split(32):
            total, count = total + held_out_nll(self.model, batch.to(self.device)) * len(batch), count + len(batch)
            loads = [load + moe.load for load, moe in zip(loads, self.model.mixtures(), strict=True)]
        extremes = [[round((load / load.sum()).max().item(), 4), round((load / load.sum()).min().item(), 4)] for load in loads]
        return {"held_out_nll": round(total / count, 4)} | ({"loads": extremes} if extremes else {})

    def export(self, source: Path, folder: Path) -> None:
        """The checkpoint in bf16, in files of at most 16 MB, with the tokenizer of `source`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.bfloat16().cpu().contiguous() for name, tensor in checkpoint_of(self.model).items()}
        save_sharded(tensors, folder)
        (folder / "config.json").write_text(json.dumps(self.model.config | {"dtype": "bfloat16"}, indent=2) + "\n")
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(source / name, folder / name)


def save_sharded(tensors: dict[str, Tensor], folder: Path) -> None:
    """One file, or several with an index, none above 16 MB."""
    from checkpoints import shards

    pieces = shards(tensors)
    names = ["model.safetensors"] if len(pieces) == 1 else [f"model-{i + 1:05}-of-{len(pieces):05}.safetensors" for i in range(len(pieces))]
    for name, piece in zip(names, pieces, strict=True):
        save_file(piece, folder / name, metadata={"format": "pt"})
    if len(pieces) > 1:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        where = {key: name for name, piece in zip(names, pieces, strict=True) for key in piece}
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def windows(stream: np.ndarray, length: int = 256) -> np.ndarray:
    return stream[: len(stream) // length * length].astype(np.int64).reshape(-1, length)


@torch.no_grad()
def held_out_nll(model: Decoder, ids_BT: Tensor) -> float:
    """Mean NLL per token, the first of each row not predicted."""
    with torch.autocast(ids_BT.device.type, torch.bfloat16):
        hidden = model(ids_BT)
    logits = (hidden[:, :-1] @ model.embed_tokens.weight.to(hidden.dtype).T).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten()).item()


def text_course(kind: str, data: Path, source: Path, device: str) -> TextCourse:
    """The course of `kind` ('dense', 'moe', 'draft') from the dense checkpoint in `source`; `data` is the folder of texts."""
    plan = PLANS[kind, device]
    torch.manual_seed(SEED)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    chats = [(row["question"], row["answer"]) for row in map(json.loads, (data / "text-gsm8k/train.jsonl").open())]
    mix = TrainingMix(tokenizer, read_texts(data / "text-train/train.jsonl.xz"), chats, SEED)
    held_out = encode_texts(tokenizer, read_texts(data / "text-train/val.jsonl.xz"))[:16384]
    config = json.loads((source / "config.json").read_text()) | plan.config
    if kind == "draft":
        return TextCourse(Decoder(config), mix, held_out, plan, device)
    config, tensors = deepened(config, load_file(source / "model.safetensors"))
    model = Decoder(config)
    load_checkpoint(model, tensors)
    if kind == "moe":
        every = windows(mix.stream)
        sample = torch.from_numpy(every[:: len(every) // 128][:128])
        model = upcycle(model, config_of_mixture(config, **EXPERTS), sample, SEED)
    return TextCourse(model, mix, held_out, plan, device)


def deepened(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The six-layer checkpoint of the data folder with two layers more that begin as nothing; any other as it is."""
    if config["num_hidden_layers"] != 6:
        return config, tensors
    order = [0, 1, 2, 2, 3, 4, 4, 5]
    grown = {name: t for name, t in tensors.items() if ".layers." not in name}
    for new, old in enumerate(order):
        for name, tensor in tensors.items():
            if name.startswith(f"model.layers.{old}."):
                nothing = order[:new].count(old) and name.endswith(("o_proj.weight", "down_proj.weight"))
                grown[name.replace(f"layers.{old}.", f"layers.{new}.", 1)] = torch.zeros_like(tensor) if nothing else tensor.clone()
    return config | {"num_hidden_layers": len(order)}, grown
