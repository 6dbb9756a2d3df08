"""LLM in vLLM's shapes, on the bundled model: forms of prompts, stops, log-probabilities, chat, streaming, defaults."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest

from apportion import LLM, LaneConfig, SamplingParams
from apportion.core.errors import InvalidParameter, InvalidRequest

GREEDY = SamplingParams(temperature=0, max_tokens=8)
PROMPT = "The detective looked at the"


@pytest.fixture(scope="module")
def llm():
    with LLM(max_num_seqs=8, kv_cache_memory=2**26) as llm:
        yield llm
        llm.engine.check_integrity()


def text_of(llm, prompt, **params):
    return llm.generate(prompt, SamplingParams(**{"temperature": 0, "max_tokens": 8} | params))[0].outputs[0]


def unfinished(llm):
    return llm.engine.models[llm.config.models[0].name].scheduler.unfinished


def test_every_form_of_a_prompt_gives_the_same(llm):
    ids = llm.get_tokenizer().encode(PROMPT)
    forms = [PROMPT, ids, {"prompt": PROMPT}, {"prompt_token_ids": np.array(ids)}]
    outputs = [llm.generate(form, GREEDY) for form in forms] + [llm.generate([form], GREEDY) for form in forms]
    assert {tuple(o.outputs[0].token_ids) for [o] in outputs} == {tuple(outputs[0][0].outputs[0].token_ids)}
    assert all(o.prompt_token_ids == ids for [o] in outputs)
    assert [o.prompt for [o] in outputs[:4]] == [PROMPT, None, PROMPT, None]


def test_a_batch_comes_back_in_order_and_equal_to_each_alone(llm):
    prompts = [PROMPT, "Once", "A much longer prompt than the others, to be first in nothing", "x"]
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (9, 2, 5, 7)]
    outputs = llm.generate(prompts, params)
    assert [o.prompt for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [9, 2, 5, 7]
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)
    for output, prompt, own in zip(outputs, prompts, params, strict=True):
        assert llm.generate(prompt, own)[0].outputs[0].token_ids == output.outputs[0].token_ids


def test_metrics_are_in_order(llm):
    [output] = llm.generate(PROMPT, GREEDY)
    m = output.metrics
    assert m.arrival_time <= m.first_scheduled_time <= m.first_token_time <= m.last_token_time <= m.finished_time
    assert m.time_in_queue >= 0 and m.time_to_first_token > 0


def test_a_prefix_is_found_again(llm):
    prompt = list(range(100, 170))
    llm.generate(prompt, GREEDY)
    assert llm.generate(prompt, GREEDY)[0].num_cached_tokens == 64


def test_seeds_repeat_and_n_completions_differ(llm):
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=12, n=3)
    [output] = llm.generate(PROMPT, params)
    assert [c.index for c in output.outputs] == [0, 1, 2] and len({c.text for c in output.outputs}) == 3
    assert [c.text for c in llm.generate(PROMPT, params)[0].outputs] == [c.text for c in output.outputs]
    second = output.outputs[1]
    assert text_of(llm, PROMPT, temperature=1.0, max_tokens=12, seed=second.seed).text == second.text


def test_a_stop_string_across_tokens(llm):
    whole = text_of(llm, PROMPT, max_tokens=12).text
    stop = whole[5:9]
    at = whole.index(stop)
    stopped = text_of(llm, PROMPT, max_tokens=12, stop=[stop])
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (whole[:at], "stop", stop)
    kept = text_of(llm, PROMPT, max_tokens=12, stop=stop, include_stop_str_in_output=True)
    assert kept.text == whole[: at + len(stop)]


def test_a_stop_token(llm):
    whole = text_of(llm, PROMPT)
    stop = whole.token_ids[3]
    first = whole.token_ids.index(stop)
    stopped = text_of(llm, PROMPT, stop_token_ids=[stop])
    assert stopped.token_ids == whole.token_ids[: first + 1] and stopped.stop_reason == stop and stopped.finish_reason == "stop"
    assert stopped.text == llm.tokenizer.decode(stopped.token_ids[:-1])
    assert len(text_of(llm, PROMPT, stop_token_ids=[stop], min_tokens=first + 2).token_ids) >= first + 2


def test_the_end_token_stops_unless_ignored(llm):
    forced = {"logit_bias": {0: 100.0}, "max_tokens": 4}
    ended = text_of(llm, PROMPT, **forced)
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([0], "", "stop", None)
    assert text_of(llm, PROMPT, ignore_eos=True, **forced).token_ids == [0, 0, 0, 0]


def test_logprobs_and_prompt_logprobs(llm):
    [output] = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=2))
    completion = output.outputs[0]
    chosen = [at[token] for token, at in zip(completion.token_ids, completion.logprobs, strict=True)]
    assert len(chosen) == 4 and all(entry.rank == 1 for entry in chosen) and all(len(at) == 3 for at in completion.logprobs)
    assert math.isclose(completion.cumulative_logprob, sum(entry.logprob for entry in chosen))
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids) and output.prompt_logprobs[0] is None
    assert all(output.prompt_token_ids[i] in output.prompt_logprobs[i] for i in range(1, len(output.prompt_token_ids)))


def test_words_that_must_and_must_not_come(llm):
    tokens = text_of(llm, PROMPT).token_ids
    token, word = next((t, llm.tokenizer.decode([t])) for t in tokens if llm.tokenizer.decode([t]).strip())
    assert token not in text_of(llm, PROMPT, bad_words=[word]).token_ids
    assert set(text_of(llm, PROMPT, allowed_token_ids=[45, 84], ignore_eos=True).token_ids) <= {45, 84}


def test_streaming_grows_to_the_same_text_and_can_be_left(llm):
    texts = [output.outputs[0].text for output in llm.stream(PROMPT, GREEDY)]
    assert texts == sorted(texts, key=len) and texts[-1] == text_of(llm, PROMPT).text
    for _ in llm.stream(PROMPT, GREEDY):
        break
    assert not unfinished(llm)
    assert text_of(llm, PROMPT).text == texts[-1]


def test_chat_is_generate_on_the_rendered_prompt(llm):
    messages = [{"role": "user", "content": "Hello"}]
    [answer] = llm.chat(messages, GREEDY)
    assert answer.prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert answer.outputs[0].token_ids == llm.generate(answer.prompt, GREEDY)[0].outputs[0].token_ids
    assert [o.prompt for o in llm.chat([messages, messages], GREEDY)] == [answer.prompt] * 2
    assert llm.chat(messages, GREEDY, chat_template="{{ messages[0].content }}!")[0].prompt == "Hello!"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least one message"),
        ("hello", "a list of messages, got str"),
        (5, "got int"),
        ([5], "got int"),
        ([{"content": "a"}], "no role"),
    ],
)
def test_chats_that_make_no_sense(llm, messages, said):
    with pytest.raises(InvalidRequest, match=said):
        llm.chat(messages, GREEDY)


def test_two_lanes_say_what_one_says(llm):
    prefill, decode = (LaneConfig(name=phase, phases=frozenset({phase})) for phase in ("prefill", "decode"))
    prompts = [PROMPT, "x", list(range(100, 170))]
    with LLM(lanes=[prefill, decode], kv_cache_memory=2**26) as two:
        told = [output.outputs[0].token_ids for output in two.generate(prompts, GREEDY)]
    assert told == [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("x " * 3000, r"the prompt has \d+ tokens and max_model_len is 2048"),
        ("", "the prompt is empty"),
        (["a"], "prompt token 0 is 'a'"),
        ([5000], "outside the vocabulary of 4096"),
        ({"text": "a"}, "needs 'prompt' or 'prompt_token_ids', got 'text'"),
        (3.5, "a prompt is text, token ids or a mapping, got float"),
        (b"abc", "a prompt is text, token ids or a mapping, got bytes"),
        ("a\ud800b", r"half a surrogate pair and cannot be encoded: 'a\\ud800b'"),
    ],
)
def test_one_bad_prompt_refuses_the_call_and_leaves_nothing_behind(llm, prompt, said):
    with pytest.raises(InvalidRequest, match=said):
        llm.generate([PROMPT, prompt], GREEDY)
    assert not unfinished(llm)
    assert len(text_of(llm, PROMPT).token_ids) == 8


def test_parameters_are_one_or_one_each(llm):
    with pytest.raises(InvalidParameter, match="sampling_params has 1 entries for 2 prompts"):
        llm.generate([PROMPT, "x"], [GREEDY])
    with pytest.raises(InvalidParameter, match="sampling_params must be SamplingParams, got dict"):
        llm.generate(PROMPT, {"temperature": 0})
    with pytest.raises(InvalidParameter, match="priority needs scheduling_policy"):
        llm.generate([PROMPT], GREEDY, priority=[1])
    with pytest.raises(InvalidParameter, match="priority needs scheduling_policy"):
        llm.generate(PROMPT, SamplingParams(priority=1))
    for prompts in (None, 5, b"abc"):
        with pytest.raises(InvalidRequest, match=f"or a list of these, got {type(prompts).__name__}"):
            llm.generate(prompts, GREEDY)


def test_one_call_at_a_time(llm):
    stream = llm.stream(PROMPT, GREEDY)
    next(stream)
    with pytest.raises(InvalidRequest, match="in the middle of another call"):
        llm.generate(PROMPT, GREEDY)
    stream.close()


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"max_model_length": 5}, "unknown parameter 'max_model_length'; did you mean 'max_model_len'"),
        ({"gpu_util": 5}, "unknown parameter 'gpu_util'; known:"),
        ({"dtype": "int3"}, "unknown dtype 'int3'"),
        ({"max_num_seqs": 0}, "max_num_seqs must be a positive integer"),
        ({"max_model_len": 4096}, "max_model_len 4096 is more than the 2048 positions"),
        ({"kernels": "cuda"}, "unknown kernels 'cuda'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"scheduling_policy": "lottery"}, "lottery"),
        ({"quantization": "fp9"}, "quantization 'fp9' is not known; known: fp8, fp8_block"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be True or False, got 'no'"),
        ({"long_prefill_token_threshold": -3}, "long_prefill_token_threshold must be an integer of at least 0"),
        ({"seed": "x"}, "seed must be an integer of at least 0, got 'x'"),
        ({"lanes": 3}, "lanes must be a list of LaneConfig, got 3"),
        ({"revision": "main"}, "revision 'main' chooses among those of a hub model"),
    ],
)
def test_engine_parameters_that_make_no_sense(keywords, said):
    with pytest.raises(ValueError, match=said):
        LLM(**keywords)


def test_the_models_own_defaults_are_taken(bundled_model, tmp_path):
    shutil.copytree(bundled_model, tmp_path / "m")
    recommended = {"temperature": 0.0, "top_k": 5, "max_new_tokens": 3, "eos_token_id": [0, 1]}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(recommended))
    with LLM(tmp_path / "m", kv_cache_memory=2**25) as llm:
        params = llm.get_default_sampling_params()
        assert (params.temperature, params.top_k, params.max_tokens) == (0.0, 5, 3)
        assert len(llm.generate(PROMPT)[0].outputs[0].token_ids) == 3
        assert text_of(llm, PROMPT, logit_bias={1: 100.0}).token_ids == [1], "every end token of the list stops"


@pytest.mark.parametrize("template", [5, ""])
def test_a_chat_template_is_text(llm, template):
    with pytest.raises(InvalidRequest, match="a chat template is jinja2 text"):
        llm.chat([{"role": "user", "content": "Hello"}], GREEDY, chat_template=template)
