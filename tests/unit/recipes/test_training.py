"""Training at a tiny size: every course learns, resumes bit for bit, keeps its checkpoints small, and exports what transformers loads."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from apportion.assets import DEFAULT_MODEL

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(DEFAULT_MODEL / "tokenizer.json"))


@pytest.fixture
def course(request, recipe, tokenizer, monkeypatch):
    """A function that makes a fresh tiny course of the kind the test is run with."""
    monkeypatch.setattr(recipe("vision_course"), "QUESTIONS_JUDGED", 32)
    text, mixing = recipe("text_course"), recipe("training_mix")
    upcycled, small = recipe("upcycled"), recipe("small_models")
    texts = [f"Number {n} is here. It was seen by {n + 1} people, and by a dog. Nobody spoke of it." for n in range(200)]
    mix = mixing.TrainingMix(tokenizer, texts, [("What is 2 + 2?", "4")], seed=1)
    stages = (mixing.Stage(0.5, 64, 0.3, 0, 1, 1, 0), mixing.Stage(0.5, 192, 0.3, 2, 1, 1, 1))
    plan = text.Plan(6, 576, 1e-3, stages)

    def make():
        torch.manual_seed(5)
        if request.param == "vision":
            vision = recipe("vision_course")
            return vision.VisionCourse(TINY, tokenizer, replace(plan, batch_tokens=2 * vision.ROW_TOKENS), "cpu", image_token=3)
        model = small.Decoder(TINY)
        if request.param == "moe":
            config = upcycled.config_of_mixture(TINY, num_experts=4, top_k=2, ffn_dim=16)
            model = upcycled.upcycle(model, config, torch.from_numpy(text.windows(mix.stream[:512])), seed=0)
        return text.TextCourse(model, mix, mix.stream[:512], plan, "cpu", compiled=False)

    return make


EVERY = {"log_every": 2, "judge_every": 6, "save_every": 2}


@pytest.mark.parametrize("course", ["dense", "moe", "vision"], indirect=True)
def test_a_resumed_run_is_the_run(course, recipe, tmp_path):
    train = recipe("train_small").train
    whole, cut, resumed = course(), course(), course()
    assert train(whole, tmp_path / "whole", **EVERY) == 6
    assert train(cut, tmp_path / "cut", until=4, **EVERY) == 4
    assert train(resumed, tmp_path / "cut", **EVERY) == 6
    before = dict(course().model.named_parameters())
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert sum(not torch.equal(p, before[name]) for name, p in whole.model.named_parameters()) > len(before) / 2
    lines = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6] and any(key.startswith("held_out") for key in lines[-1])


@pytest.mark.parametrize("course", ["dense"], indirect=True)
def test_a_run_stops_when_its_time_is_over(course, recipe, tmp_path):
    assert recipe("train_small").train(course(), tmp_path, minutes=1e-9, **EVERY) == 0


def rounded(model):
    """The model with its weights as bf16 keeps them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.mark.parametrize("course", ["dense", "moe", "vision"], indirect=True)
def test_transformers_loads_what_is_exported(course, recipe, tmp_path):
    from transformers import AutoModelForCausalLM, LlavaOnevisionForConditionalGeneration

    made = course()
    made.export(DEFAULT_MODEL, tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    if hasattr(made, "rows"):
        taken, _ = made.rows("a seed", 2, held_out=False)
        theirs = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(theirs(**taken).logits, rounded(made.model)(**taken).logits, rtol=1e-4, atol=1e-4)
        return
    ids = torch.from_numpy(made.held_out[:64].astype(np.int64))[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = rounded(made.model)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids) @ ours.embed_tokens.weight.T, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_the_default_model_fits(recipe, tmp_path):
    """Weights and moments of the real size: at most 40 MB, no file above 16 MB."""
    small, train, checkpoints = recipe("small_models"), recipe("train_small"), recipe("checkpoints")
    model = small.Decoder(json.loads((DEFAULT_MODEL / "config.json").read_text()))
    optimizers = train.optimizers_of(model, 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    checkpoints.save(tmp_path / "checkpoint", model, optimizers, {"step": 1})
    sizes = [path.stat().st_size for path in (tmp_path / "checkpoint").iterdir()]
    assert sum(sizes) <= 40e6 and max(sizes) <= 16e6


@pytest.mark.parametrize("name", ["momentum_buffer", "exp_avg_sq"])
def test_moments_in_a_byte(name, recipe):
    checkpoints = recipe("checkpoints")
    moment = torch.randn(3, 250).mul(torch.logspace(-6, 2, 3)[:, None])
    moment = moment.square() if name == "exp_avg_sq" else moment
    coded = checkpoints.encode_moment(moment, name)
    again = checkpoints.decode_moment(**coded, name=name)
    assert coded["codes"].element_size() == 1
    twice = checkpoints.decode_moment(**checkpoints.encode_moment(again, name), name=name)
    torch.testing.assert_close(twice, again, rtol=1e-5, atol=0)
    if name == "exp_avg_sq":
        assert (again >= moment * (1 - 3e-6)).all(), "no step becomes longer"
    blocks = torch.nn.functional.pad(moment.flatten(), (0, -moment.numel() % 256)).view(-1, 256).abs().amax(-1)
    worst = (again - moment).abs().flatten()
    limit = blocks.repeat_interleave(256)[: moment.numel()] * (2 / 255 if name == "exp_avg_sq" else 0.51 / 127)
    assert (worst <= limit * 1.01).all()


def test_a_stage_follows_another_and_a_plan_caps_its_text(recipe):
    text, mixing = recipe("text_course"), recipe("training_mix")
    stages = (mixing.Stage(0.25, 64, 0.5, 0, 1, 1, 0), mixing.Stage(0.75, 128, 1.0, 0, 1, 1, 0))
    plan = text.Plan(100, 1024, 1e-3, stages)
    assert [plan.stage_at(step).length for step in (0, 24, 25, 99)] == [64, 64, 128, 128]
    assert plan.passes(102400) == pytest.approx(0.875)
    for (kind, _), each in text.PLANS.items():
        assert sum(stage.share for stage in each.stages) == pytest.approx(1), kind
        assert each.passes(6_900_000) <= text.MAX_PASSES, kind


def test_pictures_show_their_attributes(recipe):
    """Every attribute can be read off the pixels; the held-out combinations are a fifth, and never drawn for training."""
    pictures = recipe("pictures")
    rng = random.Random(3)
    drawn = {pictures.draw(rng, held_out=False) for _ in range(2000)}
    held_out = {pictures.draw(rng, held_out=True) for _ in range(500)}
    assert not drawn & held_out and len(drawn) > 1000
    every = [pictures.Scene(s, c, n, q, d) for s in range(4) for c in range(6) for n in range(4) for q in range(4) for d in range(10)]
    assert sum(scene.is_held_out for scene in every) == len(every) / 5
    for scene in list(drawn)[:40]:
        picture = (scene.render(rng).transpose(1, 2, 0) + 1) * 127.5
        assert picture.shape == (64, 64, 3) and picture.min() >= 0 and picture.max() <= 255
        colour = np.array(list(pictures.COLOURS.values())[scene.colour])
        painted = np.abs(picture - colour).max(-1) < 1
        top, left = divmod(scene.quarter, 2)
        inside = painted[top * 32 : top * 32 + 32, left * 32 : left * 32 + 32]
        assert inside.sum() == painted.sum() > 0
        cells = [inside[y : y + 16, x : x + 16].any() for y in (0, 16) for x in (0, 16)]
        assert sum(cells) == scene.count + 1
        answers = [answer for _, answer in scene.questions()]
        assert all(answer in answers[-1] for answer in answers[:-1])
