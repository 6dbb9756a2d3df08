"""/v1/responses: OpenAI's events in OpenAI's order, a stream that is its whole, and nothing taken that is not done."""

import json
from typing import Annotated

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, Field, TypeAdapter

from .scripted import OPEN_THINKING, PLAIN, THINKING, cut, places, script, texts, without

EVENT = TypeAdapter(ResponseStreamEvent)
PATH = "/v1/responses"
TOOLS = [
    {"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}}},
    {"type": "function", "name": "f"},
]
TEMPLATES = st.sampled_from([PLAIN, THINKING, OPEN_THINKING])
PARSERS = st.sampled_from(["hermes", "llama3_json", "mistral"])
CHANGING = {"id", "call_id", "item_id", "created_at", "completed_at"}


def replay(events):
    """The output items that the events of a stream build, as a client puts them together; checks their order."""
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    assert all(name == data["type"] for name, data in events)
    assert [name for name, _ in events[:2]] == ["response.created", "response.in_progress"]
    built, is_open, texts = [], None, []
    for name, data in events[2:-1]:
        if name == "response.output_item.added":
            assert is_open is None and data["output_index"] == len(built) and data["item"]["status"] == "in_progress"
            is_open, texts = data["item"], []
            continue
        assert is_open is not None and data["output_index"] == len(built)
        assert "item_id" not in data or data["item_id"] == is_open["id"]
        if name.endswith(".delta"):
            assert data["delta"]
            texts.append(data["delta"])
        elif name.endswith((".output_text.done", ".reasoning_text.done", ".function_call_arguments.done")):
            assert data.get("text", data.get("arguments")) == "".join(texts)
        elif name == "response.output_item.done":
            item = data["item"]
            assert (item["id"], item["type"]) == (is_open["id"], is_open["type"])
            assert "".join(texts) == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
            built.append(item)
            is_open = None
        else:
            assert name in ("response.content_part.added", "response.content_part.done")
    assert is_open is None
    return built


@settings(max_examples=120, deadline=None)
@given(texts, places, TEMPLATES, PARSERS, st.sampled_from(["stop", "length"]), st.booleans())
def test_a_stream_is_its_whole(text, ends, template, parser, finish_reason, with_tools):
    player = script(template, parser)
    asked = {"input": "Hi", "store": False, **({"tools": TOOLS} if with_tools else {})}
    player.plays(*cut(text, ends), finish_reason=finish_reason)
    whole = player.post(PATH, **asked).json()
    events = player.events(PATH, **asked)
    for _, data in events:
        EVENT.validate_python(data)
    last_name, last = events[-1]
    assert last_name == f"response.{whole['status']}" == ("response.completed" if finish_reason == "stop" else "response.incomplete")
    assert without(last["response"], CHANGING) == without(whole, CHANGING)
    assert replay(events) == last["response"]["output"]
    Response.model_validate(whole)


def test_the_order_of_events_with_a_thought_a_text_and_a_call():
    player = script(THINKING)
    player.plays("<think>so", "</think>I look.", '<tool_call>{"name": "f", "arguments": {"a": ', "1}}</tool_call>")
    events = player.events(PATH, input="Hi", tools=TOOLS)
    assert [name.removeprefix("response.") for name, _ in events] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]  # fmt: skip
    usage = events[-1][1]["response"]["usage"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]
    assert usage["input_tokens_details"]["cached_tokens"] == 3


def test_a_stream_that_breaks_ends_with_response_failed():
    player = script()
    player.plays("so ", "far", finish_reason="error")
    events = player.events(PATH, input="Hi")
    name, data = events[-1]
    assert name == "response.failed" and data["response"]["error"] == {"code": "server_error", "message": "it broke"}
    EVENT.validate_python(data)
    answer = player.post(PATH, input="Hi")
    assert answer.status_code == 500 and answer.json()["error"]["message"] == "it broke"


def test_items_become_the_conversation():
    player = script("{{ messages | tojson }}{# tools #}")
    player.plays("ok")
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "One"}, {"type": "input_text", "text": "two"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Wait.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "done"},
        {"role": "assistant", "content": "Good."},
    ]
    assert player.post(PATH, input=items, instructions="You are kind.", tools=TOOLS).status_code == 200
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
        {"id": "c2", "type": "function", "function": {"name": "f", "arguments": {}}},
    ]
    assert json.loads(player.engine.seen[-1].prompt) == [
        {"role": "system", "content": "You are kind.\n\nBe brief."},
        {"role": "user", "content": "One\ntwo"},
        {"role": "assistant", "reasoning_content": "Hm.", "content": "Wait.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
        {"role": "assistant", "content": "Good."},
    ]


def test_a_response_goes_on_after_one_that_is_held():
    player = script(PLAIN)
    player.plays("Blue.")
    first = player.post(PATH, input="A colour?", instructions="Short.").json()
    assert player.http.get(f"{PATH}/{first['id']}").json() == first
    second = player.post(PATH, input="Another?", previous_response_id=first["id"]).json()
    assert player.engine.seen[-1].prompt == "[user]A colour?[assistant]Blue.[user]Another?"
    player.post(PATH, input="Why?", previous_response_id=second["id"], instructions="Long.")
    assert player.engine.seen[-1].prompt.startswith("[system]Long.[user]A colour?") and player.engine.seen[-1].prompt.endswith("[user]Why?")
    assert player.http.delete(f"{PATH}/{first['id']}").json()["deleted"] is True
    for answer in (player.http.get(f"{PATH}/{first['id']}"), player.post(PATH, input="x", previous_response_id=first["id"])):
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "response_not_found"
    unheld = player.post(PATH, input="x", store=False).json()["id"]
    assert player.http.get(f"{PATH}/{unheld}").status_code == 404


def test_the_store_forgets_the_oldest():
    from apportion.serving.response_store import ResponseStore, StoredResponse

    store = ResponseStore(max_bytes=100)
    for name in "abc":
        store.put(name, StoredResponse(b"", [], 40))
    assert store.num_bytes == 80 and store.get("b") and store.get("c")
    with pytest.raises(Exception, match="not held"):
        store.get("a")
    store.get("b")
    store.put("d", StoredResponse(b"", [], 40))
    with pytest.raises(Exception, match="not held"):
        store.get("c")
    store.put("huge", StoredResponse(b"", [], 400))
    assert store.num_bytes == 0


def test_thinking_is_switched_off_or_refused():
    player = script(THINKING)
    player.plays("hi")
    assert player.post(PATH, input="x", reasoning={"effort": "none"}).status_code == 200
    assert player.engine.seen[-1].prompt.endswith("<think></think>")
    assert player.post(PATH, input="x", reasoning={"effort": "high"}).status_code == 400
    always = script(OPEN_THINKING).post(PATH, input="x", reasoning={"effort": "none"})
    assert always.status_code == 400 and "always thinks" in always.json()["error"]["message"]
    graded = script("{{ reasoning_effort }}")
    graded.plays("hi")
    assert graded.post(PATH, input="x", reasoning={"effort": "low"}).status_code == 200
    assert graded.engine.seen[-1].prompt == "low"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": []}, "input", "empty list"),
        ({"input": 5}, "input", "string"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0", "'input_image'"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input.0.role", "'developer'"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "no"}]}, "messages", "not JSON"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "'function'"),
        ({"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools.0.defer_loading", "unsupported field"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.type", "'function'"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "unsupported field"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary", "None"),
        ({"include": ["reasoning.encrypted_content"]}, "include", "at most 0"),
        ({"background": True}, "background", "False"),
        ({"truncation": "auto"}, "truncation", "'disabled'"),
        ({"conversation": "c"}, "conversation", "unsupported field"),
        ({"max_tool_calls": 3}, "max_tool_calls", "unsupported field"),
        ({"prompt": {"id": "x"}}, "prompt", "unsupported field"),
        ({"stream_options": {}}, "stream_options", "stream to be true"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_not_done_is_refused_by_name(fields, param, message):
    player = script()
    player.plays("never")
    answer = player.post(PATH, **{"input": "x", **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"] and error["param"] == param, error


class Weather(BaseModel):
    city: Annotated[str, Field(max_length=10)]
    celsius: Annotated[int, Field(ge=-50, le=50)]


def test_openais_client_with_the_bundled_model(client):
    asked = {"model": "apportion", "input": "Hello", "max_output_tokens": 24, "extra_body": {"seed": 3, "ignore_eos": True}}
    whole = client.responses.create(**asked)
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens" and whole.usage.output_tokens == 24
    with client.responses.stream(**asked) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == whole.output_text
    again = client.responses.create(model="apportion", input="More", previous_response_id=whole.id, max_output_tokens=4)
    assert again.usage.input_tokens > whole.usage.total_tokens and again.previous_response_id == whole.id
    assert client.responses.retrieve(again.id).output_text == again.output_text
    client.responses.delete(again.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(again.id)


def test_openais_client_stops_and_parses(client):
    whole = client.responses.create(model="apportion", input="Hello", max_output_tokens=40, extra_body={"seed": 5, "stop": ["e"]})
    assert "e" not in whole.output_text and whole.status == "completed"
    parsed = client.responses.parse(
        model="apportion", input="Hello", text_format=Weather, max_output_tokens=400, temperature=0.5, extra_body={"seed": 2}
    )
    assert parsed.status == "completed" and isinstance(parsed.output_parsed, Weather)


def test_openais_client_calls_functions(client):
    asked = {"model": "apportion", "input": "Hello", "tools": TOOLS, "max_output_tokens": 300, "extra_body": {"seed": 1}}
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        whole = client.responses.create(**asked, tool_choice=choice, parallel_tool_calls=False)
        [call] = whole.output
        assert call.type == "function_call" and whole.status == "completed" and isinstance(json.loads(call.arguments), dict)
        with client.responses.stream(**asked, tool_choice=choice, parallel_tool_calls=False) as stream:
            deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
            [streamed] = stream.get_final_response().output
        assert "".join(deltas) == call.arguments == streamed.arguments and streamed.name == call.name
        items = [
            {"role": "user", "content": "Hello"},
            *whole.output,
            {"type": "function_call_output", "call_id": call.call_id, "output": "ok"},
        ]
        assert client.responses.create(model="apportion", input=items, tools=TOOLS, max_output_tokens=4).usage.output_tokens > 0
