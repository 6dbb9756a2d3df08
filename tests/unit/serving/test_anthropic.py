"""/v1/messages: Anthropic's blocks, events and errors, a stream that is its whole, and nothing taken that is not done."""

import json

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from pydantic_core import from_json

from .scripted import OPEN_THINKING, PLAIN, THINKING, Script, cut, places, script, texts, without

EVENT = TypeAdapter(RawMessageStreamEvent)
PATH = "/v1/messages"
TOOLS = [
    {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}},
    {"name": "f", "description": "does it", "input_schema": {"type": "object"}},
]
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100}


def replay(events):
    """The message that a client builds of a stream; checks the order of its events."""
    for name, data in events:
        assert name == data["type"]
        EVENT.validate_python(data)
    assert [name for name, _ in (events[0], events[-2], events[-1])] == ["message_start", "message_delta", "message_stop"]
    message, is_open, inputs = dict(events[0][1]["message"]), False, {}
    message["content"] = []
    for name, data in events[1:-2]:
        if name == "content_block_start":
            assert not is_open and data["index"] == len(message["content"])
            message["content"].append(dict(data["content_block"]))
            is_open = True
            continue
        assert is_open and data["index"] == len(message["content"]) - 1
        block = message["content"][-1]
        if name == "content_block_stop":
            is_open = False
            continue
        match data["delta"]:
            case {"type": "text_delta", "text": text}:
                block["text"] += text
            case {"type": "thinking_delta", "thinking": text}:
                block["thinking"] += text
            case {"type": "input_json_delta", "partial_json": text}:
                inputs[data["index"]] = inputs.get(data["index"], "") + text
                block["input"] = from_json(inputs[data["index"]], allow_partial=True)
    assert not is_open
    return {**message, **events[-2][1]["delta"], "usage": {**message["usage"], **events[-2][1]["usage"]}}


@settings(max_examples=120, deadline=None)
@given(
    texts, places, st.sampled_from([PLAIN, THINKING, OPEN_THINKING]), st.sampled_from(["hermes", "mistral"]), st.booleans(), st.booleans()
)
def test_a_stream_is_its_whole(text, ends, template, parser, is_cut, with_tools):
    player = script(template, parser)
    player.plays(*cut(text, ends), finish_reason="length" if is_cut else "stop")
    asked = {**HELLO, **({"tools": TOOLS} if with_tools else {})}
    whole = player.post(PATH, **asked)
    assert whole.status_code == 200, whole.text
    Message.model_validate(whole.json())
    assert without(replay(player.events(PATH, **asked)), {"id"}) == without(whole.json(), {"id"})


def test_stop_reasons():
    player = script()
    for played, expected in [
        ({"finish_reason": "length"}, ("max_tokens", None)),
        ({}, ("end_turn", None)),
        ({"stop_reason": "###"}, ("stop_sequence", "###")),
        ({"stop_reason": 7}, ("end_turn", None)),
    ]:
        player.plays("text", **played)
        answer = player.post(PATH, **HELLO).json()
        assert (answer["stop_reason"], answer["stop_sequence"]) == expected
    player.plays('<tool_call>{"name": "f", "arguments": {"a": "b"}}</tool_call>')
    answer = player.post(PATH, **HELLO, tools=TOOLS).json()
    [block] = answer["content"]
    assert answer["stop_reason"] == "tool_use" and (block["type"], block["name"], block["input"]) == ("tool_use", "f", {"a": "b"})
    assert answer["usage"]["cache_read_input_tokens"] == 3


def test_blocks_become_the_conversation():
    player = script("{{ messages | tojson }}{# tools #}")
    player.plays("ok")
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "One", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "two"}],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "text", "text": "Wait."},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
                {"type": "tool_use", "id": "t2", "name": "f", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "done"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "lost", "is_error": True},
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    asked = {
        "messages": messages,
        "max_tokens": 5,
        "system": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}],
        "tools": TOOLS,
    }
    assert player.post(PATH, **asked).status_code == 200
    calls = [
        {"id": "t1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
        {"id": "t2", "type": "function", "function": {"name": "f", "arguments": {}}},
    ]
    assert json.loads(player.engine.seen[-1].prompt) == [
        {"role": "system", "content": "Be\nkind."},
        {"role": "user", "content": "One\ntwo"},
        {"role": "assistant", "reasoning_content": "Hm.", "content": "Wait.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "t1", "content": "done"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: lost"},
        {"role": "user", "content": "And?"},
    ]
    count = player.post(f"{PATH}/count_tokens", **{name: asked[name] for name in ("messages", "system", "tools")})
    assert count.json() == {"input_tokens": len(player.engine.seen[-1].prompt_token_ids)}


def test_an_assistants_last_message_is_gone_on_with():
    player = script()
    player.plays(" blue")
    messages = [*HELLO["messages"], {"role": "assistant", "content": "It is"}]
    answer = player.post(PATH, messages=messages, max_tokens=5).json()
    assert player.engine.seen[-1].prompt == "[user]Hello[assistant]It is" and answer["content"] == [{"type": "text", "text": " blue"}]


def test_calls_are_held_to_objects_even_when_the_model_is_free():
    player = script()
    player.plays("hi")
    player.post(PATH, **HELLO, tools=TOOLS)
    assert "%json" in player.engine.seen[-1].params.structured_outputs.grammar
    player.post(PATH, **HELLO, tools=TOOLS, tool_choice={"type": "none"})
    assert player.engine.seen[-1].params.structured_outputs is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens: input should be greater than or equal to 1"),
        ({"messages": []}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages.0.content.0: unknown or unsupported type 'image'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]}, "in a turn of the user"),
        ({"messages": [{"role": "assistant", "content": "a "}]}, "without a blank at its end"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice needs a name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "g"}}, "'g'"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type: input should be 'adaptive' or 'disabled'"),
        ({"output_config": {"effort": "high"}}, "effort"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {}, "name": "x"}}}, "output_config.format.name"),
        ({"container": "c"}, "unknown or unsupported field 'container'"),
        ({"mcp_servers": []}, "unknown or unsupported field 'mcp_servers'"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"stop_sequences": [""]}, "stop"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_not_done_is_refused_by_name_in_anthropics_shape(fields, message):
    player = script()
    player.plays("never")
    answer = player.post(PATH, **{**HELLO, **fields})
    body = answer.json()
    assert answer.status_code == 400 and (body["type"], body["error"]["type"]) == ("error", "invalid_request_error"), body
    assert message in body["error"]["message"]


def test_errors_in_anthropics_shape_and_keys_in_anthropics_header():
    with Script(api_key=("secret",)) as player:
        player.plays("hi")
        for headers, status in [
            ({}, 401),
            ({"x-api-key": "wrong"}, 401),
            ({"x-api-key": "secret"}, 200),
            ({"authorization": "Bearer secret"}, 200),
        ]:
            answer = player.http.post(PATH, json=HELLO, headers=headers)
            assert answer.status_code == status
            assert status == 200 or answer.json()["error"]["type"] == "authentication_error"
        key = {"x-api-key": "secret"}
        answer = player.http.post(PATH, json={**HELLO, "model": "claude"}, headers=key)
        assert answer.status_code == 404 and answer.json()["error"]["type"] == "not_found_error"
        answer = player.http.post(PATH, content=b"{", headers={**key, "content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["type"] == "error" and "not valid JSON" in answer.json()["error"]["message"]


def test_a_stream_that_breaks_ends_with_an_error_event():
    player = script()
    player.plays("so ", "far", finish_reason="error")
    name, data = player.events(PATH, **HELLO)[-1]
    assert name == "error" and data == {"type": "error", "error": {"type": "api_error", "message": "it broke"}}


@pytest.fixture(scope="module")
def claude(server):
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120)


def test_anthropics_client_with_the_bundled_model(claude):
    asked = {"model": "apportion", "max_tokens": 24, "messages": HELLO["messages"], "system": "Be kind."}
    extra = {"extra_body": {"seed": 4, "temperature": 0.8, "ignore_eos": True}}
    whole = claude.messages.create(**asked, **extra)
    assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 24 and whole.role == "assistant"
    with claude.messages.stream(**asked, **extra) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, 24)
    total = sum((final.usage.input_tokens, final.usage.cache_read_input_tokens))
    assert total == claude.messages.count_tokens(model="apportion", messages=asked["messages"], system=asked["system"]).input_tokens
    letter = text[len(text) // 2]
    stopped = claude.messages.create(**asked, stop_sequences=[letter], **extra)
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == letter
    assert "".join(block.text for block in stopped.content) == text.partition(letter)[0]


def test_anthropics_client_uses_tools(claude):
    asked = {"model": "apportion", "max_tokens": 300, "messages": HELLO["messages"], "tools": TOOLS, "extra_body": {"seed": 1}}
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "get_weather"}):
        whole = claude.messages.create(**asked, tool_choice=choice)
        [block] = whole.content
        assert block.type == "tool_use" and whole.stop_reason == "tool_use"
        assert block.name != "get_weather" or block.input["city"] in ("Paris", "Rome")
        with claude.messages.stream(**asked, tool_choice=choice) as stream:
            [streamed] = stream.get_final_message().content
        assert (streamed.name, streamed.input) == (block.name, block.input)
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "fine"}]}
        messages = [*HELLO["messages"], {"role": "assistant", "content": whole.content}, result]
        assert claude.messages.create(**{**asked, "messages": messages, "max_tokens": 3}).usage.output_tokens > 0


def test_anthropics_client_gets_json_and_errors(claude):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    asked = {"model": "apportion", "max_tokens": 60, "messages": HELLO["messages"]}
    answer = claude.messages.create(**asked, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert set(json.loads(answer.content[0].text)) == {"ok"} and answer.stop_reason == "end_turn"
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(**{**asked, "model": "claude-17"})
    with pytest.raises(anthropic.BadRequestError, match="best_off"):
        claude.messages.create(**asked, extra_body={"best_off": 3})
