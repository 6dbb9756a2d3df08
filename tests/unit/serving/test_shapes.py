"""Formats, grammars, tools and embeddings over HTTP, as the openai client asks for them."""

import base64
import json
import math
import re
import struct
import threading

import openai
import pytest

HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"$ref": "#/$defs/unit"}},
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["c", "f"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "What it is like outside", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
BOMB = "((a{1000}){1000}){1000}"


def ask(client, **fields):
    return client.chat.completions.create(**{"model": "apportion", "messages": HELLO, "max_tokens": 200, "seed": 1, **fields})


def joined(stream):
    """A stream's only choice, put together as clients do: (content, calls as (id, name, arguments), finish_reason)."""
    content, calls, reason = "", {}, None
    for chunk in stream:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            known = calls.setdefault(call.index, ["", "", ""])
            known[0] += call.id or ""
            known[1] += call.function.name or ""
            known[2] += call.function.arguments or ""
        reason = choice.finish_reason or reason
    return content, [tuple(call) for call in calls.values()], reason


def test_json_object(client):
    choice = ask(client, response_format={"type": "json_object"}, max_tokens=600).choices[0]
    assert isinstance(json.loads(choice.message.content), dict) and choice.finish_reason == "stop"


@pytest.mark.parametrize("seed", range(3))
def test_json_schema_stream_and_whole(client, seed):
    format_ = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}}
    whole = ask(client, response_format=format_, seed=seed).choices[0]
    value = json.loads(whole.message.content)
    assert set(value) == {"city", "unit"} and value["unit"] in ("c", "f") and len(value["city"]) <= 12
    assert joined(ask(client, response_format=format_, seed=seed, stream=True)) == (whole.message.content, [], "stop")


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": r"\d{4}-\d{2}"}, r"\d{4}-\d{2}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'start: ("a" | "aa") "b"'}, "a{1,2}b"),  # bounded: a model may love the letter a
        ({"guided_json": {"enum": ["x", 5]}}, '"x"|5'),
        ({"structured_outputs": {"regex": "[xyz]{3}"}}, "[xyz]{3}"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
    ],
    ids=str,
)
def test_guided_decoding_in_both_apis(client, fields, pattern):
    assert re.fullmatch(pattern, ask(client, extra_body=fields).choices[0].message.content)
    text = client.completions.create(model="apportion", prompt="Say", max_tokens=200, extra_body=fields).choices[0].text
    assert re.fullmatch(pattern, text)


def test_n_sequences_have_a_grammar_each(client):
    choices = ask(client, n=6, temperature=2.0, extra_body={"guided_regex": "[0-9]{3,5}"}).choices
    texts = [choice.message.content for choice in choices]
    assert all(re.fullmatch("[0-9]{3,5}", text) for text in texts) and len(set(texts)) > 1


def test_a_text_cut_short_says_so(client):
    choice = ask(client, max_tokens=3, extra_body={"guided_regex": "[a-z]{200}"}).choices[0]
    assert choice.finish_reason == "length" and re.fullmatch("[a-z]+", choice.message.content)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"guided_regex": "("}, None, "unclosed group"),
        ({"guided_regex": BOMB}, None, "the regular expression cannot be used"),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, None, "no text can satisfy it"),
        ({"structured_outputs": {"json": {"uniqueItems": True, "type": "array"}}}, None, "uniqueItems"),
        ({"structured_outputs": {}}, None, "exactly one of"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "unknown or unsupported field"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex", "exclude each other"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "contradicts"),
        ({"response_format": {"type": "yaml"}}, "response_format", "yaml"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools", "two functions named 'get_weather'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type", "function"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, None, "exclude each other"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "'messages'"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_is_a_400_that_says_why(server, fields, param, message):
    answer = server.post("/v1/chat/completions", json={"messages": HELLO, **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"] and error["param"] == param, error


def test_bombs_hurt_nobody_else(server, client):
    answers = []

    def throw(index):
        answers.append(server.post("/v1/chat/completions", json={"messages": HELLO, "guided_regex": BOMB + "b" * index}).status_code)

    bombs = [threading.Thread(target=throw, args=(index,)) for index in range(4)]
    for bomb in bombs:
        bomb.start()
    for _ in range(3):
        assert ask(client, extra_body={"guided_choice": ["fine"]}).choices[0].message.content == "fine"
    for bomb in bombs:
        bomb.join()
    assert answers == [400] * 4
    assert server.get("/readyz").status_code == 200


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["required", "named"])
@pytest.mark.parametrize("seed", range(2))
def test_calls_are_enforced_and_streamed_as_they_are(client, choice, seed):
    fields = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "seed": seed}
    whole = ask(client, **fields).choices[0]
    [call] = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and whole.message.content is None and call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        assert set(arguments) == {"city", "unit"} and arguments["unit"] in ("c", "f")
    else:
        assert (choice, call.function.name, arguments) == ("required", "now", {})
    content, calls, reason = joined(ask(client, **fields, stream=True))
    assert (content, reason) == ("", "tool_calls")
    assert [(name, text) for _, name, text in calls] == [(call.function.name, call.function.arguments)]


def test_a_free_model_may_answer_in_text(client):
    for fields in ({"tool_choice": "auto"}, {"tool_choice": "none"}, {"parallel_tool_calls": False}):
        whole = ask(client, tools=TOOLS, max_tokens=40, **fields).choices[0]
        content, calls, reason = joined(ask(client, tools=TOOLS, max_tokens=40, stream=True, **fields))
        assert content == (whole.message.content or "") and reason == whole.finish_reason
        assert len(calls) == len(whole.message.tool_calls or ())


def test_a_conversation_with_calls_and_results_goes_on(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "call_1", "content": "noon"}]
    assert ask(client, messages=messages, tools=TOOLS, max_tokens=5).usage.completion_tokens > 0
    call["function"]["arguments"] = "no json"
    with pytest.raises(openai.BadRequestError, match="arguments are not JSON"):
        ask(client, messages=messages, tools=TOOLS)


def test_embeddings(client, server):
    texts = ["A cat sat on the mat.", "Numbers add up.", "A cat sat on the mat."]
    answer = client.embeddings.create(model="apportion", input=texts)
    vectors = [item.embedding for item in answer.data]
    assert [item.index for item in answer.data] == [0, 1, 2] and answer.usage.prompt_tokens == answer.usage.total_tokens > 10
    assert vectors[0] == vectors[2] != vectors[1] and all(abs(math.hypot(*v) - 1) < 1e-5 for v in vectors)
    body = {"input": texts[0], "encoding_format": "base64", "dimensions": len(vectors[0])}
    raw = base64.b64decode(server.post("/v1/embeddings", json=body).json()["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(vectors[0], abs=1e-6)
    tokens = server.post("/tokenize", json={"prompt": texts[0]}).json()["tokens"]
    by_tokens = client.embeddings.create(model="apportion", input=[tokens, tokens], encoding_format="float")
    assert all(item.embedding == pytest.approx(vectors[0], abs=1e-6) for item in by_tokens.data)
    mean = client.embeddings.create(model="apportion", input=texts[0], extra_body={"pooling_type": "mean"}).data[0].embedding
    assert mean != pytest.approx(vectors[0], abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": []}, "input", "empty list"),
        ({"input": ""}, None, "the prompt is empty"),
        ({"input": "a", "dimensions": 64}, "dimensions", "the model's vectors have 256"),
        ({"input": [99999]}, None, "outside the vocabulary"),
        ({"input": "word " * 5000}, None, "max_model_len is 2048"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "float"),
        ({"input": "a", "task": "query"}, "task", "unknown or unsupported"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_embeddings_that_cannot_be(server, fields, param, message):
    answer = server.post("/v1/embeddings", json=fields)
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"] and error["param"] == param, error
