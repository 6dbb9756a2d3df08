"""Tokens to outputs: text, stops, log-probabilities, groups of n, prompts that are computed twice."""

from __future__ import annotations

import pytest

from apportion.core.request import Request, RequestStatus, RequestUpdate
from apportion.core.sampling_params import SamplingParams
from apportion.core.schedule import TokenLogprobs
from apportion.engine.output_processor import OutputProcessor
from apportion.processor.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(bundled_model):
    return Tokenizer.from_folder(bundled_model)


def start(tokenizer, n=1, prompt=(45, 557, 84), **params):
    processor = OutputProcessor({"m": tokenizer})
    requests = [Request(f"{i}_r", "m", list(prompt), SamplingParams(**params)) for i in range(n)]
    processor.add("r", "the prompt", requests)
    return processor, requests


def finish(request, reason, stop_reason=None):
    request.status, request.finish_reason, request.stop_reason = RequestStatus.FINISHED, reason, stop_reason


def feed(processor, request, tokens, logprobs=(), prompt_logprobs=()):
    request.token_ids += tokens
    return processor.append(request, list(tokens), list(logprobs), list(prompt_logprobs))


def test_text_grows_and_ends(tokenizer):
    processor, [request] = start(tokenizer)
    seen = []
    for token in tokenizer.encode(" went 😀 home"):
        feed(processor, request, [token])
        [output] = processor.outputs([RequestUpdate(request)])
        seen.append(output.outputs[0].text)
        assert not output.finished and output.prompt == "the prompt"
    assert all(later.startswith(earlier) for earlier, later in zip(seen, seen[1:], strict=False)) and not any("\ufffd" in s for s in seen)
    finish(request, "length")
    [output] = processor.outputs([RequestUpdate(request)])
    assert output.finished and output.outputs[0].text == " went 😀 home" and output.outputs[0].finish_reason == "length"
    assert processor.outputs([RequestUpdate(request)]) == [], "a finished request is told once"


@pytest.mark.parametrize(("include", "text"), [(False, " one"), (True, " one<|im_end|>")])
def test_the_stop_token_is_in_the_ids_and_not_in_the_text(tokenizer, include, text):
    processor, [request] = start(tokenizer, include_stop_str_in_output=include, skip_special_tokens=False)
    ids = [*tokenizer.encode(" one"), tokenizer.backend.token_to_id("<|im_end|>")]
    request.stop_ids = frozenset(ids[-1:])  # the scheduler sets them
    finish(request, "stop", ids[-1])
    feed(processor, request, ids)
    [output] = processor.outputs([RequestUpdate(request)])
    assert output.outputs[0].text == text and output.outputs[0].token_ids == ids


def test_a_stop_string_is_reported_to_the_engine(tokenizer):
    processor, [request] = start(tokenizer, stop=["llo w"])
    found = [feed(processor, request, [token]) for token in tokenizer.encode(" hello world")]
    assert "llo w" in found
    finish(request, "stop", "llo w")
    assert processor.outputs([RequestUpdate(request)])[0].outputs[0].text == " he"


def test_logprobs_and_their_sum(tokenizer):
    processor, [request] = start(tokenizer, logprobs=1)
    feed(processor, request, [7], [TokenLogprobs([7, 9], [-2.0, -0.5], [3, 1])])
    feed(processor, request, [9], [TokenLogprobs([9, 9], [-1.0, -1.0], [1, 1])])
    [output] = processor.outputs([RequestUpdate(request)])
    completion = output.outputs[0]
    assert completion.cumulative_logprob == -3.0
    assert {t: (p.logprob, p.rank) for t, p in completion.logprobs[0].items()} == {7: (-2.0, 3), 9: (-0.5, 1)}
    assert completion.logprobs[1].keys() == {9} and completion.logprobs[1][9].decoded_token == tokenizer.token_text(9)
    assert output.prompt_logprobs is None


def test_without_logprobs_there_are_none(tokenizer):
    processor, [request] = start(tokenizer)
    feed(processor, request, [7])
    completion = processor.outputs([RequestUpdate(request)])[0].outputs[0]
    assert completion.logprobs is None and completion.cumulative_logprob is None


def test_prompt_logprobs_come_chunk_by_chunk(tokenizer):
    prompt = list(range(10, 16))
    rows = [TokenLogprobs([token], [-float(token)], [1]) for token in prompt[1:]]
    processor, [request] = start(tokenizer, prompt=prompt, prompt_logprobs=0)
    feed(processor, request, [], prompt_logprobs=rows[:3])
    feed(processor, request, [3], prompt_logprobs=rows[3:])
    [output] = processor.outputs([RequestUpdate(request)])
    assert output.prompt_logprobs[0] is None
    assert [entry[token].logprob for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)] == [
        -float(t) for t in prompt[1:]
    ]


def test_a_group_is_finished_with_its_last_sequence(tokenizer):
    processor, requests = start(tokenizer, n=2)
    feed(processor, requests[0], [7])
    finish(requests[0], "length")
    assert processor.outputs([RequestUpdate(requests[0])], finished_only=True) == []
    feed(processor, requests[1], [8])
    finish(requests[1], "error")
    requests[1].error = "why"
    [output] = processor.outputs([RequestUpdate(r) for r in requests], finished_only=True)
    assert [(c.index, c.token_ids, c.error) for c in output.outputs] == [(0, [7], None), (1, [8], "why")]


def test_what_nobody_waits_for_is_passed_over(tokenizer):
    processor, [request] = start(tokenizer, stop=["a"])
    processor.forget([request])
    assert feed(processor, request, tokenizer.encode("a")) is None
    assert processor.outputs([RequestUpdate(request)]) == []
