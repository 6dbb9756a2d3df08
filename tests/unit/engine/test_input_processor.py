"""Prompts and parameters become requests, or one sentence."""

from __future__ import annotations

import pytest

from apportion.core.errors import InvalidParameter, InvalidRequest
from apportion.core.sampling_params import MAX_SEED, SamplingParams
from apportion.engine.input_processor import InputProcessor
from apportion.models.checkpoint import read_spec
from apportion.processor.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def inputs(bundled_model):
    return InputProcessor("m", read_spec(bundled_model), 100, Tokenizer.from_folder(bundled_model))


def make(inputs, prompt, **params):
    return inputs.make_requests("r", prompt, SamplingParams(**params))


def test_text_and_tokens_are_the_same_prompt(inputs):
    [by_text] = make(inputs, "Hello there")
    [by_ids] = make(inputs, inputs.tokenizer.encode("Hello there"))
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids and by_text.request_id == "r"
    assert by_text.eos_token_ids == {0, 2}  # the end of a text and that of a message


def test_n_sequences_have_their_own_ids_and_seeds(inputs):
    requests = make(inputs, "Hello", n=3, seed=5)
    assert [(r.request_id, r.sampling_params.seed, r.sampling_params.n) for r in requests] == [("0_r", 5, 1), ("1_r", 6, 1), ("2_r", 7, 1)]
    wrapped = make(inputs, "Hello", n=2, seed=MAX_SEED)
    assert wrapped[1].sampling_params.seed == -MAX_SEED


def test_seeds_are_drawn_repeatably_and_greedy_needs_none(bundled_model):
    def seeds(engine_seed):
        made = InputProcessor("m", read_spec(bundled_model), 100, None, seed=engine_seed)
        return [made.make_requests("r", [1], SamplingParams())[0].sampling_params.seed for _ in range(3)]

    assert seeds(0) == seeds(0) != seeds(1)
    assert len(set(seeds(0))) == 3
    made = InputProcessor("m", read_spec(bundled_model), 100, None)
    assert made.make_requests("r", [1], SamplingParams(temperature=0))[0].sampling_params.seed is None


def test_the_callers_parameters_are_not_written_to(inputs):
    params = SamplingParams(bad_words=["the"])
    [request] = inputs.make_requests("r", "Hello", params)
    assert request.sampling_params.bad_words_token_ids and not params.bad_words_token_ids and params.seed is None


@pytest.mark.parametrize(("limit", "kept"), [(3, [7, 8, 9]), (50, list(range(10))), (-1, list(range(10)))])
def test_truncation_keeps_the_end(inputs, limit, kept):
    assert make(inputs, list(range(10)), truncate_prompt_tokens=limit)[0].prompt_token_ids == kept


def test_truncation_to_what_fits_leaves_room_for_a_token(inputs):
    assert make(inputs, [1] * 500, truncate_prompt_tokens=-1)[0].num_prompt_tokens == 99


@pytest.mark.parametrize(
    ("prompt", "params", "kind", "said"),
    [
        ("", {}, InvalidRequest, "the prompt is empty"),
        ([], {}, InvalidRequest, "the prompt is empty"),
        ([1, 4096], {}, InvalidRequest, "prompt token 1 is 4096, outside the vocabulary of 4096 tokens"),
        ([-1], {}, InvalidRequest, "prompt token 0 is -1, outside"),
        ([1, "a"], {}, InvalidRequest, "prompt token 1 is 'a'; token ids are integers"),
        ("a", {"stop_token_ids": [9999]}, InvalidParameter, "stop_token_ids names token 9999, outside the vocabulary of 4096"),
        ("a", {"allowed_token_ids": [1, 5000]}, InvalidParameter, "allowed_token_ids names token 5000"),
        ("a", {"logit_bias": {4096: 1.0}}, InvalidParameter, "logit_bias names token 4096"),
    ],
)
def test_refusals(inputs, prompt, params, kind, said):
    with pytest.raises(kind, match=said):
        make(inputs, prompt, **params)


def test_text_needs_a_tokenizer(bundled_model):
    made = InputProcessor("m", read_spec(bundled_model), 100, None)
    with pytest.raises(InvalidRequest, match="has no tokenizer: give prompt_token_ids"):
        made.make_requests("r", "text", SamplingParams())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temprature": 1.0}, "unknown sampling parameter 'temprature'"),
        ({"n": 2, "temperature": 0.0}, "greedy completions would all be the same"),
        ({"min_tokens": 5, "max_tokens": 4}, r"min_tokens \(5\) is greater than max_tokens \(4\)"),
        ({"stop": ["a"], "detokenize": False}, "stop strings need detokenize"),
        ({"top_p": 0.0}, "top_p must be greater than 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
    ],
)
def test_parameters_that_make_no_sense(fields, said):
    with pytest.raises(InvalidParameter, match=said):
        SamplingParams(**fields)
