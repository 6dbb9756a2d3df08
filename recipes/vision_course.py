"""A small vision-language model in the layout of LLaVA-OneVision: a SigLIP tower, a projector, the dense decoder; through transformers."""

from __future__ import annotations

import json
import random
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import SIZE, draw
from safetensors.torch import load_file
from text_course import SEED, Plan
from tokenizers import Tokenizer
from torch import Tensor
from training_mix import CHAT_END, CHAT_START, END

PATCH = 8
# The layout gives a picture its whole view, then the rows of its tiles (here one), each closed by the newline's embedding.
IMAGE_TOKENS = (SIZE // PATCH) ** 2 + (SIZE // PATCH) * (SIZE // PATCH + 1)
ROW_TOKENS = IMAGE_TOKENS + 56
TOWER = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
PLANS = {"cpu": Plan(2000, 32 * ROW_TOKENS, 1e-3, ()), "cuda": Plan(4000, 256 * ROW_TOKENS, 1e-3, ())}
QUESTIONS_JUDGED = 256


class VisionCourse:
    """The model, and pictures with one question each. Token embeddings stay as they are: their moments would not fit a checkpoint.

    language: configuration of the decoder; image_token: the id that stands in a row for each vector of a picture.
    """

    def __init__(self, language: dict[str, Any], tokenizer: Tokenizer, plan: Plan, device: str, image_token: int, seed: int = SEED) -> None:
        from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

        torch.manual_seed(seed)
        config = LlavaOnevisionConfig(
            vision_config={"model_type": "siglip_vision_model", "image_size": SIZE, "patch_size": PATCH, "vision_use_head": False} | TOWER,
            text_config=language,
            image_token_index=image_token,
            video_token_index=image_token,
            image_grid_pinpoints=[[SIZE, SIZE]],
            tie_word_embeddings=True,
        )
        self.model = LlavaOnevisionForConditionalGeneration(config).to(device)
        self.model.get_input_embeddings().weight.requires_grad_(False)
        self.tokenizer, self.plan, self.device, self.seed, self.image_token = tokenizer, plan, device, seed, image_token
        self.start: dict[str, Any] = {}
        self._losses: list[float] = []

    def rows(self, seed: str, count: int, *, held_out: bool) -> tuple[dict[str, Tensor], Tensor]:
        """(what the model takes, labels [B, T] with -100 where nothing is predicted) for `count` pictures."""
        rng = random.Random(seed)
        ids = np.full((count, ROW_TOKENS), self.tokenizer.token_to_id(END))
        labels = np.full((count, ROW_TOKENS), -100)
        pixels = np.empty((count, 2, 3, SIZE, SIZE), dtype=np.float32)
        for row in range(count):
            scene = draw(rng, held_out=held_out)
            pixels[row] = scene.render(rng)
            question, answer = rng.choice(scene.questions())
            before = self._encode(f"{CHAT_START}user\n<|vision_start|>") + [self.image_token] * IMAGE_TOKENS
            before += self._encode(f"<|vision_end|>{question}{CHAT_END}\n{CHAT_START}assistant\n")
            said = self._encode(f"{answer}{CHAT_END}")
            end = len(before) + len(said)
            ids[row, :end] = before + said
            labels[row, len(before) : end] = said
        taken = {
            "input_ids": torch.from_numpy(ids),
            "pixel_values": torch.from_numpy(pixels),
            "image_sizes": torch.tensor([[SIZE, SIZE]] * count),
        }
        return {name: tensor.to(self.device) for name, tensor in taken.items()}, torch.from_numpy(labels).to(self.device)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def loss(self, step: int, progress: dict[str, Any]) -> Tensor:
        taken, labels = self.rows(f"{self.seed} {step}", self.plan.batch_tokens // ROW_TOKENS, held_out=False)
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.model(**taken, labels=labels).loss
        self._losses.append(loss.item())
        return loss

    def line(self, step: int, progress: dict[str, Any]) -> dict[str, Any]:
        mean, self._losses = sum(self._losses) / max(len(self._losses), 1), []
        return {"answers_nll": round(mean, 4)}

    @torch.no_grad()
    def judge(self) -> dict[str, Any]:
        """Answers that greedy decoding would give to the letter, of questions about combinations that training never shows."""
        right = 0
        for part in range(QUESTIONS_JUDGED // 32):
            taken, labels = self.rows(f"held out {part}", 32, held_out=True)
            with torch.autocast(self.device, torch.bfloat16):
                said = self.model(**taken).logits[:, :-1].argmax(-1)
            right += ((said == labels[:, 1:]) | (labels[:, 1:] == -100)).all(-1).sum().item()
        return {"held_out_exact_match": round(right / QUESTIONS_JUDGED, 4)}

    def export(self, source: Path, folder: Path) -> None:
        """The checkpoint in bf16, in files of at most 16 MB, with the tokenizer of `source` and how pictures are prepared."""
        deepcopy(self.model).bfloat16().save_pretrained(folder, max_shard_size="16MB")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / name, folder / name)
        size = {"height": SIZE, "width": SIZE}
        prepared = {"image_processor_type": "LlavaOnevisionImageProcessor", "do_pad": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        text = json.dumps(prepared | {"size": size, "image_grid_pinpoints": [[SIZE, SIZE]]}, indent=2)
        (folder / "preprocessor_config.json").write_text(text + "\n")


def vision_course(source: Path, device: str) -> VisionCourse:
    """The course on top of the dense checkpoint in `source`."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    language = json.loads((source / "config.json").read_text())
    course = VisionCourse(language, tokenizer, PLANS[device], device, image_token=tokenizer.token_to_id("<|image_pad|>"))
    tensors = load_file(source / "model.safetensors")
    course.model.model.language_model.load_state_dict({name.removeprefix("model."): t.float() for name, t in tensors.items()})
    return course
