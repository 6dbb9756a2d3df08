"""Every field that makes no sense is refused by name, before anything runs."""

import pytest

from apportion.core.errors import InvalidParameter
from apportion.core.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temprature": 1.0}, "unknown sampling parameter 'temprature'; known: n, temperature"),
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"temperature": None}, "temperature must be a finite number"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"top_p": 0.0}, "top_p must be greater than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be greater than 0 and at most 1"),
        ({"top_k": -2}, "top_k must be between 0 and"),
        ({"min_p": 2}, "min_p must be at least 0 and at most 1"),
        ({"presence_penalty": 3}, "presence_penalty must be at least -2 and at most 2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be at least 0.01 and at most 100"),
        ({"n": 0}, "n must be between 1 and 1024"),
        ({"n": 2, "temperature": 0}, "greedy completions would all be the same"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"seed": 2**63}, "seed must be between"),
        ({"max_tokens": 0}, "max_tokens must be between 1"),
        ({"min_tokens": 20}, r"min_tokens \(20\) is greater than max_tokens \(16\)"),
        ({"logprobs": -2}, "logprobs must be between -1"),
        ({"prompt_logprobs": True}, "prompt_logprobs must be an integer"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be between 1"),
        ({"stop": ""}, "stop must be non-empty strings"),
        ({"stop": 5}, "stop must be a list, got 5"),
        ({"stop": ["a"], "detokenize": False}, "stop strings need detokenize"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list, got 5"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be non-negative integers"),
        ({"allowed_token_ids": []}, "no token could be sampled"),
        ({"allowed_token_ids": 5}, "allowed_token_ids must be a list, got 5"),
        ({"bad_words": "word"}, "bad_words must be a list, got 'word'"),
        ({"bad_words": [3]}, "bad_words must be non-empty strings"),
        ({"logit_bias": [1]}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": {"1": 2.0}}, "logit_bias has the key '1'"),
        ({"logit_bias": {1: 101}}, r"logit_bias\[1\] must be at least -100 and at most 100"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False, got 'no'"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output must be True or False"),
        ({"priority": "high"}, "priority must be an integer"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(fields, said):
    with pytest.raises(InvalidParameter, match=said):
        SamplingParams(**fields)


def test_what_is_given_is_not_kept_by_reference():
    stop, allowed = ["a"], (1, 2)
    params = SamplingParams(stop=stop, allowed_token_ids=allowed, stop_token_ids=range(2), top_k=-1)
    stop.append("b")
    assert (params.stop, params.allowed_token_ids, params.stop_token_ids, params.top_k) == (["a"], [1, 2], [0, 1], 0)
