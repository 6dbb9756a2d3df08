"""What a family is held to: logits and greedy tokens of transformers, from files that transformers wrote."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch

from apportion.core.sampling_params import SamplingParams
from apportion.kernels.dispatch import choose
from tests.combinations.harness import Setup, generate
from tests.ranks import on_ranks

TOLERANCE = 1e-4  # max |difference| / max |logit|
NUM_PROMPTS, NUM_TOKENS, MAX_PROMPT = 20, 64, 40

SMALL = {"hidden_size": 48, "intermediate_size": 76, "num_hidden_layers": 2, "vocab_size": 131, "max_position_embeddings": 256}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}


def rope(kind: str, **numbers: float) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **numbers}}


@dataclass
class Family:
    name: str
    config: str
    fields: dict = field(default_factory=dict)
    dtype: str = "float32"
    shard_size: str = "5GB"
    seed: int = 0
    fused: bool = False  # experts as one tensor of three dimensions
    one_by_one: bool = False  # transformers' result depends on how tokens are fed: compare with its own token-by-token generation


def checkpoint_of(family: Family, make_checkpoint) -> tuple:
    """(folder, the transformers model of it)."""
    return make_checkpoint(family.config, SMALL | family.fields, family.dtype, family.shard_size, family.seed, family.fused)


def prompts_of(family: Family) -> list[list[int]]:
    rng = random.Random(family.name)
    return [[rng.randrange(SMALL["vocab_size"]) for _ in range(rng.randint(1, MAX_PROMPT))] for _ in range(NUM_PROMPTS)]


def hold_to_transformers(family: Family, folder: Path, reference, driver) -> None:
    """driver: of the model in `folder`; it shows logits, and the engine makes the tokens, with the same kernels."""
    prompts = prompts_of(family)
    # prompts are cut into chunks, requests wait for one another, and those that decode share steps with those that do not yet
    setup = Setup(model=folder, kernels=driver.kernels, budget=48, max_num_seqs=12, kv_blocks=256)
    results = generate(setup, prompts, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True))
    generated = [list(result.token_ids) for result in results]
    whole = [prompt + tokens for prompt, tokens in zip(prompts, generated, strict=True)]
    if family.one_by_one:
        assert generated == [greedy(reference, prompt) for prompt in prompts]
        whole = [row[: family.fields["max_position_embeddings"] - 1] for row in whole]
    expected = reference_logits(reference, whole)
    actual = driver.step(whole, [0] * len(whole)).clone().split([len(row) for row in whole])
    if choose("cpu", driver.kernels)[0].capability.batch_invariant:
        assert torch.equal(driver.step([whole[3]], [0]), actual[3]), "a request alone has other bits than in a batch"
    scale = max(rows.abs().max() for rows in expected)
    worst = max((a - e).abs().max() for a, e in zip(actual, expected, strict=True))
    assert worst / scale < TOLERANCE
    if not family.one_by_one:  # by induction the tokens are those of greedy decoding
        for prompt, tokens, rows in zip(prompts, generated, expected, strict=True):
            assert tokens == rows[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


def hold_ranks_to_transformers(family: Family, folder: Path, reference, make_driver) -> None:
    """Two ranks, each with its shard of the weights: the same logits, bit for bit on both."""
    prompts = prompts_of(family)[:4]
    expected = torch.cat(reference_logits(reference, prompts))
    first, second = on_ranks(2, lambda group: make_driver(folder, "reference", group=group).step(prompts, [0] * len(prompts)))
    assert torch.equal(first, second)
    assert (first - expected).abs().max() / expected.abs().max() < TOLERANCE


def reference_logits(reference, sequences: list[list[int]]) -> list[torch.Tensor]:
    """One forward pass of transformers, padded on the right, where nothing causal looks."""
    longest = max(map(len, sequences))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in sequences])
    with torch.no_grad():
        logits = reference(ids).logits
    return [rows[: len(row)] for rows, row in zip(logits, sequences, strict=True)]


def greedy(reference, prompt: list[int]) -> list[int]:
    """Token by token with transformers' cache, without its generation machinery's stopping rules."""
    ids, cache, tokens = torch.tensor([prompt]), None, []
    with torch.no_grad():
        for _ in range(NUM_TOKENS):
            out = reference(ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            tokens.append(int(out.logits[0, -1].argmax()))
            ids = torch.tensor([[tokens[-1]]])
    return tokens
