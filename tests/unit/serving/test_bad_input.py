"""What no client should send, at every endpoint: an error that says what is wrong, in that API's shape, and nobody else is hurt."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

WORD = "MARK"
TURN = [{"role": "user", "content": WORD}]
BODIES = {
    "/v1/completions": {"prompt": WORD},
    "/v1/chat/completions": {"messages": TURN},
    "/v1/responses": {"input": WORD},
    "/v1/messages": {"messages": TURN, "max_tokens": 5},
    "/v1/embeddings": {"input": WORD},
}


def raw(body: dict, word: bytes = b'"x"', **fields: str) -> bytes:
    """The body as JSON with `word` in the place of its text, and further fields as they are spelt."""
    text = json.dumps(body).encode().replace(b'"MARK"', word)
    return text[:-1] + b"".join(b", " + json.dumps(name).encode() + b": " + value.encode() for name, value in fields.items()) + b"}"


BAD = {
    "nothing": (lambda body: b"", "the request has no body"),
    "half": (lambda body: raw(body)[:-1], "not valid JSON"),
    "a list": (lambda body: b"[1, 2]", "valid dictionary"),
    "no UTF-8": (lambda body: raw(body, b'"\xff\xfe"'), "not valid JSON in UTF-8"),
    "half a character": (lambda body: raw(body, b'"\\ud800"'), "surrogate"),
    "too deep": (lambda body: raw(body, b"[" * 100_000 + b"]" * 100_000), "not valid JSON"),
    "an object for text": (lambda body: raw(body, b'{"a": 1}'), next),
    "text for a number": (lambda body: raw(body, priority='"7"'), "priority: input should be a valid integer"),
    "a fraction": (lambda body: raw(body, priority="1.5"), "priority"),
    "a huge number": (lambda body: raw(body, priority="9" * 30), "priority"),
    "an unknown field": (lambda body: raw(body, best_off="3"), "unknown or unsupported field 'best_off'"),
    "too long": (lambda body: raw(body, json.dumps("word " * 5000).encode()), "max_model_len"),
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("kind", BAD)
def test_it_is_a_400_that_says_what_is_wrong(server, path, kind):
    make, says = BAD[kind]
    answer = server.post(path, content=make(BODIES[path]), headers={"content-type": "application/json"})
    error = answer.json()["error"]
    expected = next(iter(BODIES[path])) if says is next else says  # the field that holds the text
    assert answer.status_code == 400 and expected in error["message"], answer.text[:300]
    assert error["type"] == "invalid_request_error"
    assert ("type" in answer.json()) == (path == "/v1/messages")  # Anthropic's shape


@pytest.mark.parametrize("path", [path for path in BODIES if path != "/v1/embeddings"])
def test_what_is_no_number_is_refused(server, path):
    answer = server.post(path, content=raw(BODIES[path], temperature="NaN"), headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "temperature: input should be a finite number" in answer.json()["error"]["message"]


def shaped(path: str, schema: dict) -> dict:
    """The fields that ask an endpoint for JSON of `schema`."""
    match path:
        case "/v1/responses":
            return {"text": {"format": {"type": "json_schema", "name": "s", "schema": schema}}, "max_output_tokens": 300}
        case "/v1/messages":
            return {"output_config": {"format": {"type": "json_schema", "schema": schema}}, "max_tokens": 300}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}, "max_tokens": 300}


def text_of(path: str, answer: dict) -> tuple[str, bool]:
    """What the model wrote, and whether it came to its end."""
    match path:
        case "/v1/responses":
            return "".join(part["text"] for item in answer["output"] for part in item["content"]), answer["status"] == "completed"
        case "/v1/messages":
            return "".join(block["text"] for block in answer["content"]), answer["stop_reason"] == "end_turn"
    [choice] = answer["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"], choice["finish_reason"] == "stop"


GENERATING = [path for path in BODIES if path != "/v1/embeddings"]


@pytest.mark.parametrize("path", GENERATING)
def test_an_empty_schema_is_any_json(server, path):
    """It asks for no type, and for no error either; whoever waits beside it is not disturbed."""
    ended = 0
    for seed in range(4):
        answer = server.post(path, json={**BODIES[path], **shaped(path, {}), "seed": seed, "temperature": 1.5})
        assert answer.status_code == 200, answer.text
        text, is_whole = text_of(path, answer.json())
        if is_whole:
            json.loads(text)
            ended += 1
    assert ended


def doubling(levels: int) -> dict:
    """2 ** levels ways to be an empty object, each level named once."""
    defs = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(levels)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{levels}": {"type": "object", "additionalProperties": False}}}


def nested(levels: int) -> dict:
    schema: dict = {"type": "null"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema, "minItems": 1}
    return schema


BOMBS = [
    {"$ref": "#"},
    {"type": "string", "pattern": "((a{1000}){1000}){1000}"},
    {"type": "string", "pattern": "^(a|b)*c(a|b){30000}$"},
    {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "minItems": 30000}, "minItems": 30000},
    {"type": "object", "patternProperties": {f"^({'a' * i}|b)+$": {"type": "string"} for i in range(1, 60)}},
    {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(20_000)}, "additionalProperties": False},
    {"enum": [f"{i:x}" * 8 for i in range(50_000)]},
    doubling(40),
    nested(400),
]


def test_schema_bombs_hurt_nobody_else(server):
    """Thrown through every API while others write: these get what they get alone, and no bomb ends in more than a 400 of its own."""
    asked = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "temperature": 0.9, "seed": 11}
    alone = server.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    with ThreadPoolExecutor(len(BOMBS) * len(GENERATING) + 4) as pool:
        bombs = {
            (path, i): pool.submit(server.post, path, json={**BODIES[path], **shaped(path, bomb)})
            for i, bomb in enumerate(BOMBS)
            for path in GENERATING
        }
        beside = [pool.submit(server.post, "/v1/completions", json=asked) for _ in range(4)]
        assert [answer.result().json()["choices"][0]["text"] for answer in beside] == [alone] * 4
        told = {key: answer.result() for key, answer in bombs.items()}
    by_bomb = [{told[path, i].status_code for path in GENERATING} for i in range(len(BOMBS))]
    assert all(len(statuses) == 1 and statuses <= {200, 400} for statuses in by_bomb), by_bomb
    assert by_bomb[0] == {400}, by_bomb
    messages = {answer.json()["error"]["message"] for answer in told.values() if answer.status_code == 400}
    assert all("the JSON schema cannot be used" in message or "characters; at most" in message for message in messages), messages
    assert len(messages) > 2  # for reasons of their own
    assert server.get("/readyz").status_code == 200
