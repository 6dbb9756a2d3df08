"""What a stream sends, joined, is what the whole answer would have been: over models, stops, shapes and tools, with a real engine.

The models: the bundled one, a mixture of experts, and one whose tokens are pieces of characters more often than not.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import SHARED_DATA

STORIES = SHARED_DATA / "stories260K" / "hf"
SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck))
STOPS = st.lists(st.sampled_from(["e", " the", "\n", "th", "and ", ". ", "a", "ing", '"']), max_size=3)
TOOLS = [
    {"type": "function", "function": {"name": "now"}},
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 9}, "days": {"type": "integer"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def client(start_server, bundled_model, mixture_model):
    models = [f"dense={bundled_model}", f"moe={mixture_model}", *([f"stories={STORIES}"] if STORIES.is_dir() else [])]
    return start_server(*models, "--kv-cache-memory", "128MiB").client()


def choices_of(stream, n: int) -> list[dict]:
    """A stream's choices put together as clients do."""
    whole = [{"text": "", "calls": {}, "reason": None, "tokens": [], "scores": [], "offsets": []} for _ in range(n)]
    for chunk in stream:
        for choice in chunk.choices:
            mine = whole[choice.index]
            mine["reason"] = choice.finish_reason or mine["reason"]
            if not hasattr(choice, "delta"):
                mine["text"] += choice.text
                for ours, theirs in (("tokens", "tokens"), ("scores", "token_logprobs"), ("offsets", "text_offset")):
                    mine[ours] += getattr(choice.logprobs, theirs) if choice.logprobs else []
                continue
            mine["text"] += choice.delta.content or ""
            mine["tokens"] += choice.logprobs.content if choice.logprobs else []
            for call in choice.delta.tool_calls or ():
                known = mine["calls"].setdefault(call.index, {"name": "", "arguments": ""})
                known["name"] += call.function.name or ""
                known["arguments"] += call.function.arguments or ""
    return whole


@pytest.mark.parametrize("model", ["dense", "moe", "stories"])
@settings(SETTINGS, max_examples=25)
@given(
    prompt=st.sampled_from(["The old house", "Zwölf Boxkämpfer 漢字 🙂", "def f(x):\n", " "]),
    stop=STOPS,
    temperature=st.sampled_from([0.0, 0.7, 1.5, 5.0]),
    seed=st.integers(0, 1000),
    n=st.integers(1, 3),
    logprobs=st.sampled_from([None, 0, 2]),
    echo=st.booleans(),
    include_stop=st.booleans(),
    max_tokens=st.integers(1, 40),
)
def test_of_completions(client, model, prompt, stop, temperature, seed, n, logprobs, echo, include_stop, max_tokens):
    if model == "stories" and not STORIES.is_dir():
        pytest.skip("needs the shared data")
    n = 1 if temperature == 0 else n
    fields = {"model": model, "prompt": prompt, "stop": stop, "temperature": temperature, "seed": seed, "n": n, "logprobs": logprobs}
    fields |= {"echo": echo, "max_tokens": max_tokens, "extra_body": {"include_stop_str_in_output": include_stop}}
    whole = client.completions.create(**fields).choices
    for choice, joined in zip(whole, choices_of(client.completions.create(**fields, stream=True), n), strict=True):
        assert (joined["text"], joined["reason"]) == (choice.text, choice.finish_reason)
        if logprobs is not None:
            told = choice.logprobs
            assert (joined["tokens"], joined["scores"], joined["offsets"]) == (told.tokens, told.token_logprobs, told.text_offset)
        if stop and choice.finish_reason == "stop" and not include_stop:
            assert not any(s in choice.text[len(prompt) if echo else 0 :] for s in stop)


@pytest.mark.parametrize("model", ["dense", "moe"])
@settings(SETTINGS, max_examples=20)
@given(
    stop=STOPS,
    seed=st.integers(0, 1000),
    n=st.integers(1, 3),
    top_logprobs=st.sampled_from([None, 2]),
    tools=st.sampled_from([None, "none", "auto", "required", NAMED]),
    parallel=st.booleans(),
    shape=st.sampled_from([None, {"type": "json_object"}]),
)
def test_of_chats(client, model, stop, seed, n, top_logprobs, tools, parallel, shape):
    fields = {"model": model, "messages": [{"role": "user", "content": "Tell me 漢字"}], "stop": stop, "seed": seed, "n": n}
    fields |= {"max_tokens": 60, "temperature": 1.3, "logprobs": top_logprobs is not None, "top_logprobs": top_logprobs}
    if tools is not None:
        fields |= {"tools": TOOLS, "tool_choice": tools, "parallel_tool_calls": parallel}
    if shape is not None and tools in (None, "none"):
        fields |= {"response_format": shape}
    whole = client.chat.completions.create(**fields).choices
    for choice, joined in zip(whole, choices_of(client.chat.completions.create(**fields, stream=True), n), strict=True):
        calls = [{"name": call.function.name, "arguments": call.function.arguments} for call in choice.message.tool_calls or ()]
        assert (joined["text"], joined["reason"]) == (choice.message.content or "", choice.finish_reason)
        assert [joined["calls"][index] for index in sorted(joined["calls"])] == calls
        assert joined["tokens"] == (choice.logprobs.content if choice.logprobs else [])
        if tools in ("required", NAMED) and not stop and choice.finish_reason == "tool_calls":  # a stop string may cut a call
            assert calls and all(isinstance(json.loads(call["arguments"]), dict) for call in calls)
