"""Logit rules against vLLM's formulas written out per token; log-probabilities; rows that fail alone."""

import numpy as np
import pytest
import torch

from apportion.core.errors import InvalidParameter
from apportion.core.sampling_params import SamplingParams
from apportion.engine.sampler import LogitRules, Sampler, has_rules
from apportion.kernels.ops import SamplingRows
from apportion.kernels.reference.ops import ReferenceOps

VOCAB = 50
PROMPT, OUTPUT, EOS = [3, 4, 4, 9], [7, 4, 7, 30], (49,)


def logits(rows=1, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def sampling_rows(count, temperature=0.0, position=10):
    def full(value, dtype):
        return torch.full((count,), value, dtype=dtype)

    return SamplingRows(
        full(temperature, torch.float32),
        full(0, torch.int32),
        full(1.0, torch.float32),
        full(0.0, torch.float32),
        torch.arange(count),
        torch.arange(count) + position,
    )


def rules(**params):
    made = SamplingParams(**params)
    assert has_rules(made)
    return LogitRules(made, PROMPT, OUTPUT, EOS, VOCAB)


def changed(rule, row):
    after = row.clone()
    rule.apply(after)
    return after


def test_penalties_are_those_of_openai_and_ctrl():
    row = logits()[0]
    after = changed(rules(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.5), row)
    for token in range(VOCAB):
        expected = row[token].item()
        if token in PROMPT + OUTPUT:
            expected = expected / 1.5 if expected > 0 else expected * 1.5
        expected -= 0.25 * OUTPUT.count(token) + 0.5 * (token in OUTPUT)
        assert after[token].item() == pytest.approx(expected, abs=1e-6)


def test_counts_do_not_depend_on_when_tokens_came():
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.1, frequency_penalty=0.7)
    many = np.random.default_rng(0).integers(0, VOCAB, 300).tolist()
    whole, stepwise = LogitRules(params, PROMPT, many, EOS, VOCAB), LogitRules(params, PROMPT, [], EOS, VOCAB)
    for token in many:
        stepwise.append(token)
    row = logits()[0]
    assert torch.equal(changed(whole, row), changed(stepwise, row))


def test_masks_and_bias():
    row = logits()[0]
    only = changed(rules(allowed_token_ids=[5, 6]), row)
    assert set(only.isfinite().nonzero().flatten().tolist()) == {5, 6}
    biased = changed(rules(logit_bias={5: 2.5, 6: -100.0}), row)
    assert biased[5] == row[5] + 2.5 and biased[6] == row[6] - 100 and biased[7] == row[7]
    params = SamplingParams()
    params.bad_words_token_ids = [[11], [7, 30, 12], [30, 13], [4, 14]]  # the output ends in 7, 30
    excluded = changed(LogitRules(params, PROMPT, OUTPUT, EOS, VOCAB), row).isinf().nonzero().flatten().tolist()
    assert excluded == [11, 12, 13]


def test_min_tokens_holds_back_every_stop_until_reached():
    rule = rules(min_tokens=6, stop_token_ids=[2, 8])
    row = logits()[0]
    for _ in range(2):
        assert changed(rule, row).isinf().nonzero().flatten().tolist() == [2, 8, 49]
        rule.append(1)
    assert torch.equal(changed(rule, row), row)


@pytest.mark.parametrize("field", [{"logit_bias": {VOCAB: 1.0}}, {"allowed_token_ids": [1, 99]}, {"stop_token_ids": [70], "min_tokens": 1}])
def test_ids_outside_the_vocabulary_are_named(field):
    with pytest.raises(InvalidParameter, match=rf"{next(iter(field))} has the token id \d+; .* has 50 tokens"):
        rules(**field)


def test_logprobs_are_raw_and_ranked():
    batch = logits(3)
    raw = batch.log_softmax(-1)
    output = Sampler(ReferenceOps())(batch.clone(), sampling_rows(3), {1: rules(logit_bias={17: 100.0})}, {}, {0: 2, 1: 0, 2: -1})
    assert output.token_ids.tolist()[1] == 17
    for row, entry in output.logprobs.items():
        chosen = int(output.token_ids[row])
        assert entry.token_ids[0] == chosen and entry.logprobs[0] == pytest.approx(raw[row, chosen].item(), abs=1e-5)
        assert entry.ranks[0] == int((raw[row] > raw[row, chosen]).sum()) + 1
        order = raw[row].argsort(descending=True)[: (2, 0, VOCAB)[row]]
        assert entry.token_ids[1:] == order.tolist() and entry.ranks[1:] == list(range(1, len(order) + 1))


def test_a_bad_row_fails_alone():
    batch = logits(4)
    batch[1, 3], batch[2, 5] = torch.nan, torch.inf
    good = logits(4)
    sampler = Sampler(ReferenceOps())
    output = sampler(
        batch, sampling_rows(4, temperature=1.0), {3: rules(allowed_token_ids=[1], logit_bias={1: 1.0})}, {3: bytes(7)}, {0: 1}
    )
    assert output.errors.keys() == {1, 2, 3}
    assert "NaN or infinite logits at position 11" in output.errors[1] and "no token is left" in output.errors[3]
    assert output.token_ids[0] == sampler(good, sampling_rows(4, temperature=1.0), {}, {}, {}).token_ids[0]
