"""Llama, Mistral, Qwen2, Qwen3 in odd sizes: logits and greedy tokens against transformers, from files that transformers wrote."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

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
    one_by_one: bool = False  # transformers' result depends on how tokens are fed: compare with its own token-by-token generation


FAMILIES = [
    Family("llama2", "LlamaConfig", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    Family("llama-gqa7-head8-tied-bf16", "LlamaConfig",
           {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1, "tie_word_embeddings": True}, "bfloat16"),
    Family("llama-head80-sharded-fp16", "LlamaConfig",
           {"hidden_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 80}, "float16", "60KB"),
    Family("llama3-biases", "LlamaConfig", HEADS | {"attention_bias": True, "mlp_bias": True}
           | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)),
    Family("llama-linear", "LlamaConfig", HEADS | rope("linear", factor=4.0)),
    Family("llama-dynamic", "LlamaConfig", HEADS | {"max_position_embeddings": 48} | rope("dynamic", factor=4.0), one_by_one=True),
    Family("llama-yarn", "LlamaConfig", HEADS | rope("yarn", factor=8.0, original_max_position_embeddings=32)),
    Family("llama-yarn-mscale", "LlamaConfig",
           HEADS | rope("yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0, mscale=0.8, mscale_all_dim=0.5)),
    Family("mistral-window", "MistralConfig", HEADS | {"sliding_window": 11}),
    Family("mistral-full-tied", "MistralConfig", HEADS | {"sliding_window": None, "head_dim": 16, "tie_word_embeddings": True}),
    Family("qwen2", "Qwen2Config", HEADS | {"tie_word_embeddings": True}),
    Family("qwen2-two-windows", "Qwen2Config",
           HEADS | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    Family("qwen3-bf16", "Qwen3Config", HEADS | {"head_dim": 24, "tie_word_embeddings": True}, "bfloat16"),
    Family("qwen3-alternating", "Qwen3Config", HEADS | {
        "num_hidden_layers": 3, "head_dim": 16, "attention_bias": True, "use_sliding_window": True, "sliding_window": 33,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
]  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def case(request, make_checkpoint):
    family = request.param
    folder, reference = make_checkpoint(family.config, SMALL | family.fields, family.dtype, family.shard_size, family.seed)
    return family, folder, reference


def prompts_of(family: Family) -> list[list[int]]:
    rng = random.Random(family.name)
    return [[rng.randrange(SMALL["vocab_size"]) for _ in range(rng.randint(1, MAX_PROMPT))] for _ in range(NUM_PROMPTS)]


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_equal_to_transformers(case, kernels, make_driver):
    family, folder, reference = case
    prompts = prompts_of(family)
    driver = make_driver(folder, kernels)
    generated = driver.generate(prompts, NUM_TOKENS)
    whole = [prompt + tokens for prompt, tokens in zip(prompts, generated, strict=True)]
    if family.one_by_one:
        assert generated == [greedy(reference, prompt) for prompt in prompts]
        whole = [row[: family.fields["max_position_embeddings"] - 1] for row in whole]
    expected = reference_logits(reference, whole)
    actual = driver.step(whole, [0] * len(whole)).split([len(row) for row in whole])
    scale = max(rows.abs().max() for rows in expected)
    worst = max((a - e).abs().max() for a, e in zip(actual, expected, strict=True))
    assert worst / scale < TOLERANCE
    if not family.one_by_one:  # by induction the tokens are those of greedy decoding
        for prompt, tokens, rows in zip(prompts, generated, expected, strict=True):
            assert tokens == rows[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


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
