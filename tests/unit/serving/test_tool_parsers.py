"""Tool calls and thoughts in text: read right, and the same however the text is cut."""

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apportion.serving.reasoning_parsers.think import ThinkParser
from apportion.serving.tool_parsers.hermes import HermesParser
from apportion.serving.tool_parsers.llama3 import Llama3Parser
from apportion.serving.tool_parsers.machine import CallMachine
from apportion.serving.tool_parsers.mistral import MistralParser
from apportion.serving.transforms import ContentDelta, PlainText, ReasoningDelta, ToolCallDelta

NAMES = frozenset({"get_weather", "f", "search.web"})
PARSERS = {
    "hermes": lambda: HermesParser(NAMES),
    "llama3": lambda: Llama3Parser(NAMES),
    "mistral": lambda: MistralParser(NAMES),
    "think": lambda: ThinkParser(PlainText(), is_open=False),
    "think, open": lambda: ThinkParser(PlainText(), is_open=True),
    "think, then hermes": lambda: ThinkParser(HermesParser(NAMES), is_open=False),
}


@pytest.fixture(autouse=True)
def counted_ids(monkeypatch):
    def make_id(self):
        return f"id{self.num_calls}"

    for kind in (CallMachine, MistralParser):
        monkeypatch.setattr(kind, "make_id", make_id)


def read(parser, pieces):
    """(content, reasoning, calls as (id, name, arguments)) of a text that comes in pieces."""
    deltas = [*itertools.chain.from_iterable(map(parser.feed, pieces)), *parser.finish()]
    calls = {}
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            if delta.index not in calls:
                assert delta.id and delta.name, "a call begins with its id and name"
                calls[delta.index] = [delta.id, delta.name, ""]
            else:
                assert delta.id is None and delta.name is None and delta.arguments
            calls[delta.index][2] += delta.arguments
    assert list(calls) == list(range(len(calls)))
    text = {kind: "".join(d.text for d in deltas if isinstance(d, kind)) for kind in (ContentDelta, ReasoningDelta)}
    return text[ContentDelta], text[ReasoningDelta], [tuple(call) for call in calls.values()]


def calls_of(kind, text):
    return [(name, arguments) for _, name, arguments in read(PARSERS[kind](), [text])[2]]


WEATHER = ("get_weather", '{"city": "Paris {\\"}", "days": [1, 2]}')
WHOLE = [
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": %s}\n</tool_call>', "", [WEATHER]),
    ("hermes", 'Let me see.\n<tool_call>{"arguments": %s, "name": "get_weather"}</tool_call>\n', "Let me see.", [WEATHER]),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": %s}', "", [WEATHER]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>', "", [("f", "{}")] * 2),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call> done', " done", [("f", '{"a": 1}')]),
    ("hermes", "<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ("hermes", 'a < b <tool <tool_call>{"name"', 'a < b <tool <tool_call>{"name"', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
    ("hermes", "text with a blank end \n", "text with a blank end \n", []),
    ("llama3", '{"name": "get_weather", "parameters": %s}', "", [WEATHER]),
    ("llama3", '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": %s}', "", [WEATHER]),
    ("llama3", '{"name": "f", "parameters": {}}; {"name": "get_weather", "parameters": %s}', "", [("f", "{}"), WEATHER]),
    ("llama3", '{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
    ("llama3", '\n {"answer": 42} yes', '\n {"answer": 42} yes', []),
    ("llama3", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("llama3", "<b>bold</b>", "<b>bold</b>", []),
    ("llama3", "", "", []),
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": %s}]', "", [WEATHER]),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "get_weather", "arguments": %s}]', "", [("f", "{}"), WEATHER]),
    ("mistral", "Well. [TOOL_CALLS]get_weather[ARGS]%s", "Well.", [WEATHER]),
    ("mistral", "[TOOL_CALLS]f[CALL_ID]a1b2c3d4e[ARGS]{}[TOOL_CALLS]get_weather%s", "", [("f", "{}"), WEATHER]),
    ("mistral", "[TOOL_CALLS]what is this", "[TOOL_CALLS]what is this", []),
    ("mistral", "[TOOL_CALL] [no]", "[TOOL_CALL] [no]", []),
]


@pytest.mark.parametrize(("kind", "text", "content", "calls"), WHOLE, ids=lambda value: str(value)[:40])
def test_calls_are_read(kind, text, content, calls):
    text = text.replace("%s", WEATHER[1])
    assert calls_of(kind, text) == calls
    assert read(PARSERS[kind](), [text])[0] == content


@pytest.mark.parametrize(
    ("kind", "text", "reasoning", "content"),
    [
        ("think", "<think>\nI think.\n</think>\n\nYes.", "I think.", "Yes."),
        ("think", "No thought.", "", "No thought."),
        ("think", " <thin ice", "", " <thin ice"),
        ("think", "<think>\n\n</think>\n\nYes.", "", "Yes."),
        ("think", "<think>cut off < here", "cut off < here", ""),
        ("think, open", "I think.\n</think>Yes. </think>", "I think.", "Yes. </think>"),
        ("think", "", "", ""),
    ],
    ids=str,
)
def test_thoughts_are_told_apart(kind, text, reasoning, content):
    assert read(PARSERS[kind](), [text]) == (content, reasoning, [])


PIECES = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>", '{"name": "f", ']
PIECES += [
    '"arguments": ',
    '"parameters": ',
    '{"a": "\\"}", "b": [1, -2.5e3, null]}',
    '"name": "get_weather"',
    "{",
    "}",
    "[",
    "]",
    ",",
    ";",
    '"',
]
PIECES += [" ", "\n", "x", "\\", "true", "12", ":", "é😀", "<", "f", "{}"]
texts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
cuts = st.lists(st.integers(0, 300), max_size=12)


def cut(text, places):
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("kind", PARSERS)
@settings(max_examples=150, deadline=None)
@given(text=texts, places=cuts)
@example(text='<tool_call>{"name": "f", "arguments": {"a": "}"}}</tool_call>', places=list(range(60)))
@example(text='[TOOL_CALLS][{"name": "f", "arguments": {}}]', places=list(range(60)))
def test_however_a_text_is_cut_it_says_the_same(kind, text, places):
    whole = read(PARSERS[kind](), [text])
    assert read(PARSERS[kind](), cut(text, places)) == whole
    assert read(PARSERS[kind](), list(text)) == whole


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(
    arguments=st.lists(st.dictionaries(st.text(max_size=6), json_values, max_size=3), min_size=1, max_size=3),
    indent=st.sampled_from([None, 2]),
    places=cuts,
)
def test_arguments_come_through_as_they_were_written(arguments, indent, places):
    written = [json.dumps(a, indent=indent) for a in arguments]
    forms = {
        "hermes": "\n".join(f'<tool_call>\n{{"name": "f", "arguments": {a}}}\n</tool_call>' for a in written),
        "llama3": "; ".join(f'{{"name": "f", "parameters": {a}}}' for a in written),
        "mistral": "[TOOL_CALLS] [" + ", ".join(f'{{"name": "f", "arguments": {a}}}' for a in written) + "]",
    }
    for kind, text in forms.items():
        content, _, calls = read(PARSERS[kind](), cut(text, places))
        assert content == "" and [a for _, _, a in calls] == written
