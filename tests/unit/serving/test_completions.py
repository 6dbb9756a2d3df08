"""/v1/completions by OpenAI's own client."""

from __future__ import annotations

import math

import pytest
from openai import BadRequestError, NotFoundError


def ask(client, **fields):
    """Fields that the client knows, and the rest beside them."""
    known = {
        "prompt",
        "max_tokens",
        "temperature",
        "seed",
        "n",
        "stop",
        "stream",
        "stream_options",
        "logprobs",
        "echo",
        "logit_bias",
        "top_p",
    }
    known |= {"presence_penalty", "frequency_penalty", "user"}
    extra = {name: fields.pop(name) for name in list(fields) if name not in known}
    return client.completions.create(model="apportion", extra_body=extra, **fields)


def test_text_and_usage(client):
    answer = ask(client, prompt="Once upon a time", max_tokens=8, temperature=0)
    assert answer.object == "text_completion"
    [choice] = answer.choices
    assert choice.text and choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


@pytest.mark.parametrize("chat", [False, True])
def test_a_token_without_text_has_a_chunk_too(client, server, chat):
    """So that a client's clock knows of it: here the first piece of a character, over and over."""
    piece = server.post("/tokenize", json={"prompt": "\U0001f642", "add_special_tokens": False}).json()["tokens"][0]
    fields = {"max_tokens": 30, "logit_bias": {str(piece): 100}, "temperature": 0, "stream": True}
    if chat:
        messages = [{"role": "user", "content": "Hi"}]
        chunks = [c.choices[0] for c in client.chat.completions.create(model="apportion", messages=messages, **fields)]
        assert chunks[0].delta.role == "assistant"
        texts = [chunk.delta.content or "" for chunk in chunks]
    else:
        chunks = [c.choices[0] for c in ask(client, prompt="Hi", **fields)]
        texts = [chunk.text for chunk in chunks]
    assert texts[0] == "" and len(chunks) > 5
    assert set("".join(texts)) <= {"\N{REPLACEMENT CHARACTER}"}


def test_usage_ends_a_stream_that_asks_for_it(client):
    *chunks, last = ask(client, prompt="Count", max_tokens=9, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == 9
    assert all(chunk.usage is None for chunk in chunks)


def test_several_prompts_in_order(client):
    prompts = ["One", "Two and", "Three"]
    together = ask(client, prompt=prompts, max_tokens=4, temperature=0, echo=True)
    assert [c.index for c in together.choices] == [0, 1, 2]
    for prompt, choice in zip(prompts, together.choices, strict=True):
        assert choice.text.startswith(prompt)
        assert ask(client, prompt=prompt, max_tokens=4, temperature=0, echo=True).choices[0].text == choice.text


def test_token_ids_are_a_prompt_too(client, server):
    tokens = server.post("/tokenize", json={"prompt": "The sun and the moon"}).json()["tokens"]
    assert server.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "The sun and the moon"
    by_ids = ask(client, prompt=[tokens, tokens], max_tokens=5, temperature=0)
    by_text = ask(client, prompt="The sun and the moon", max_tokens=5, temperature=0)
    assert {choice.text for choice in by_ids.choices} == {by_text.choices[0].text}


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_what_lm_eval_asks_for(client, server, max_tokens):
    """Log-probabilities of a given continuation: echoed prompts of token ids, as lm-eval's local-completions sends and reads them."""
    texts = ["The cat sat on the mat.", "A b c"]
    tokens = [server.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in texts]
    answer = ask(client, prompt=tokens, max_tokens=max_tokens, temperature=0, echo=True, logprobs=1, seed=1234)
    for ids, text, choice in zip(tokens, texts, answer.choices, strict=True):
        scores = choice.logprobs
        assert (
            len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == len(scores.text_offset) == len(ids) + max_tokens
        )
        assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
        assert all(value <= 0 for value in scores.token_logprobs[1:])
        assert "".join(scores.tokens[: len(ids)]) == text == choice.text[: len(text)]
        assert scores.text_offset == [sum(map(len, scores.tokens[:i])) for i in range(len(scores.tokens))]
        for token, score, top in zip(scores.tokens[1:], scores.token_logprobs[1:], scores.top_logprobs[1:], strict=True):
            assert top[token] == score <= max(top.values())


def test_the_scores_of_a_prompt_are_those_of_generating_it(client):
    """Greedy text scored afterwards: every token is its position's most likely, with the same number."""
    written = ask(client, prompt="In the morning", max_tokens=12, temperature=0, logprobs=1, return_token_ids=True).choices[0]
    ids = written.prompt_token_ids + written.token_ids
    scored = ask(client, prompt=ids, max_tokens=0, echo=True, logprobs=1, temperature=0).choices[0]
    again = scored.logprobs.token_logprobs[len(written.prompt_token_ids) :]
    assert all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(again, written.logprobs.token_logprobs, strict=True))


def test_a_seed_repeats_and_a_bias_rules(client):
    first = ask(client, prompt="Once", max_tokens=12, seed=5, temperature=1.2).choices[0].text
    assert ask(client, prompt="Once", max_tokens=12, seed=5, temperature=1.2).choices[0].text == first
    assert ask(client, prompt="Once", max_tokens=12, seed=6, temperature=1.2).choices[0].text != first
    biased = ask(client, prompt="Once", max_tokens=3, temperature=0, logit_bias={"65": 100}, return_token_ids=True)
    assert biased.choices[0].token_ids == [65, 65, 65]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"best_off": 3}, "best_off", "unknown or unsupported field 'best_off'"),
        ({"suffix": "x"}, "suffix", "unknown or unsupported"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"top_p": 2}, "top_p", "at most 1"),
        ({"n": 0}, "n", "between 1 and"),
        ({"n": 2, "temperature": 0}, "n", "greedy"),
        ({"max_tokens": -3}, "max_tokens", "between 1 and"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias", "vocabulary"),
        ({"prompt": []}, None, "empty"),
        ({"prompt": [999_999_999]}, None, "vocabulary"),
        ({"prompt": "word " * 5000}, None, "max_model_len"),
        ({"priority": 1}, None, "scheduling-policy"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"chat_template": "x"}, "chat_template", "unknown"),
    ],
)
def test_what_is_wrong_is_named(client, fields, param, says):
    with pytest.raises(BadRequestError) as caught:
        ask(client, **{"prompt": "x", **fields})
    assert says in str(caught.value)
    assert caught.value.param == param


def test_an_unknown_model_is_named(client):
    with pytest.raises(NotFoundError) as caught:
        client.completions.create(model="gpt-17", prompt="x")
    assert caught.value.code == "model_not_found" and "gpt-17" in str(caught.value)


def test_a_salt_separates_caches(client):
    prompt = "word " * 200

    def cached(**extra):
        return ask(client, prompt=prompt, max_tokens=1, **extra).usage.prompt_tokens_details.cached_tokens

    assert cached(cache_salt="mine") == 0
    assert cached(cache_salt="mine") > 100
    assert cached(cache_salt="yours") == 0
