"""Chat completions with tools and thoughts: a stream is its whole, and what must be enforced is in the grammar that the engine gets."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from apportion.serving.structured.compiler import GrammarCompiler

from .scripted import OPEN_THINKING, PLAIN, THINKING, cut, places, script, texts

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY, "strict": True}},
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "%s"}}\n</tool_call>'


def joined(events):
    """The message that a client builds of a stream."""
    message, calls, reason = {"content": "", "reasoning_content": ""}, {}, None
    for _, data in events[:-1]:
        ChatCompletionChunk.model_validate(data)
        [choice] = data["choices"]
        for name in message:
            message[name] += choice["delta"].get(name) or ""
        for call in choice["delta"].get("tool_calls", ()):
            known = calls.setdefault(call["index"], ["", ""])
            known[0] += call["function"].get("name") or ""
            known[1] += call["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    assert events[-1] == ("", {})
    return message["content"], message["reasoning_content"], [tuple(calls[i]) for i in sorted(calls)], reason


def shape(answer):
    ChatCompletion.model_validate(answer)
    [choice] = answer["choices"]
    message = choice["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return message["content"] or "", message.get("reasoning_content", ""), calls, choice["finish_reason"]


@settings(max_examples=100, deadline=None)
@given(
    texts, places, st.sampled_from([PLAIN, THINKING, OPEN_THINKING]), st.sampled_from(["hermes", "llama3_json", "mistral"]),
    st.sampled_from(["stop", "length"]), st.booleans(),
)  # fmt: skip
def test_a_stream_is_its_whole(text, ends, template, parser, finish_reason, with_tools):
    player = script(template, parser)
    asked = {"messages": HELLO, **({"tools": TOOLS[1:]} if with_tools else {})}
    player.plays(*cut(text, ends), finish_reason=finish_reason)
    assert joined(player.events(PATH, **asked)) == shape(player.post(PATH, **asked).json())


def test_a_thought_an_answer_and_parallel_calls_with_streamed_arguments():
    player = script(OPEN_THINKING)
    player.plays("I won", "der.</th", "ink>\nLet me ", "look.\n", *(CALL % "Paris"), "\n", *(CALL % "Rome"))
    events = player.events(PATH, messages=HELLO, tools=TOOLS)
    calls = [("get_weather", '{"city": "Paris"}'), ("get_weather", '{"city": "Rome"}')]
    assert joined(events) == ("Let me look.", "I wonder.", calls, "tool_calls")
    pieces = [call["function"]["arguments"] for _, d in events[:-1] for call in d["choices"][0]["delta"].get("tool_calls", ())]
    assert sum(map(bool, pieces)) > 20, "arguments come as they are written"


@pytest.fixture(scope="module")
def follows():
    """Whether a text, to its end, is what the grammar of the last request admits."""
    player = script(PLAIN)
    compiler = GrammarCompiler()
    compiler.add_model("m", player.engine.tokenizer, player.engine.tokenizer.vocab_size, [0])

    def check(player, text):
        params = player.engine.seen[-1].params.structured_outputs
        if params is None:
            return True
        grammar = compiler.compile("m", params).start()
        tokens = [*player.engine.tokenizer.encode(text), 0]
        for place, token in enumerate(tokens):
            mask = grammar.mask(30.0)
            if not mask[token // 8] >> token % 8 & 1:
                return False
            grammar.accept(token)
            if grammar.is_finished:
                return place >= len(tokens) - 2
        return True

    yield check
    compiler.close()


GOOD, WRONG_CITY = CALL % "Paris", CALL % "Oslo"
OTHER = '<tool_call>\n{"name": "f", "arguments": {"x": [1]}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("fields", "admitted", "refused"),
    [
        ({"tool_choice": "auto"}, ["Hi.", GOOD, f"Well. {OTHER}", f"{GOOD}\n{OTHER}"], [WRONG_CITY]),
        ({"tool_choice": "none"}, ["Hi.", WRONG_CITY], []),
        ({"tool_choice": "required"}, [GOOD, OTHER, f"{GOOD}\n{GOOD}"], ["Hi.", WRONG_CITY, f"Well. {GOOD}"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [GOOD], [f"{GOOD}\n{GOOD}"]),
        ({"tool_choice": NAMED}, [OTHER], [GOOD, "Hi.", f"{OTHER}\n{OTHER}"]),
        ({"tools": TOOLS[1:], "parallel_tool_calls": False}, ["Hi.", OTHER], [f"{OTHER}\n{OTHER}"]),
    ],
    ids=str,
)
def test_what_is_asked_of_calls_is_in_the_grammar(follows, fields, admitted, refused):
    player = script(PLAIN)
    player.plays("x")
    answer = player.post(PATH, messages=HELLO, **{"tools": TOOLS, **fields})
    assert answer.status_code == 200, answer.text
    for text in admitted:
        assert follows(player, text), text
    for text in refused:
        assert not follows(player, text), text


@pytest.mark.parametrize(("template", "lead"), [(OPEN_THINKING, "Hm.</think>\n"), (THINKING, "<think>Hm.</think>\n"), (THINKING, "")])
def test_a_model_may_think_before_it_follows_a_grammar(follows, template, lead):
    player = script(template)
    player.plays("x")
    for fields, text in [
        ({"tools": TOOLS, "tool_choice": "required"}, GOOD),
        ({"response_format": {"type": "json_object"}}, '{"a": 1}'),
        ({"guided_choice": ["yes", "no"]}, "yes"),
    ]:
        assert player.post(PATH, messages=HELLO, **fields).status_code == 200
        assert follows(player, lead + text)
        assert not follows(player, f"{lead}Sure! {text}")


def test_a_thought_that_was_switched_off_is_not_waited_for(follows):
    player = script(THINKING)
    player.plays('{"a": 1}')
    asked = {"messages": HELLO, "response_format": {"type": "json_object"}, "reasoning_effort": "none"}
    assert json.loads(player.post(PATH, **asked).json()["choices"][0]["message"]["content"]) == {"a": 1}
    assert follows(player, '{"a": 1}') and not follows(player, '<think>Hm.</think>{"a": 1}')
