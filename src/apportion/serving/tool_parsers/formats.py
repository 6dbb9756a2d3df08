"""How each family of models writes tool calls: a parser that reads them, and a grammar that admits nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apportion.core.errors import Unsupported
from apportion.core.registry import Registry
from apportion.core.structured_outputs import JSON_WHITESPACE
from apportion.processor.tokenizer import Tokenizer
from apportion.serving.tool_parsers.machine import CallMachine
from apportion.serving.transforms import TextTransform

PARSERS: Registry[type[CallMachine]] = Registry(
    "tool parser",
    {
        "hermes": "apportion.serving.tool_parsers.hermes:HermesParser",
        "llama3_json": "apportion.serving.tool_parsers.llama3:Llama3Parser",
        "mistral": "apportion.serving.tool_parsers.mistral:MistralParser",
    },
)


@dataclass(frozen=True, slots=True)
class FunctionTool:
    """parameters: a JSON schema. strict: the arguments must follow it, also where the model decides freely to call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False

    def for_template(self) -> dict[str, Any]:
        """As OpenAI writes a tool, which is what chat templates expect."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


@dataclass(frozen=True, slots=True)
class _Layout:
    """A call is before, the name, between, the arguments, after; calls stand between opening and closing, parted by separator.

    mark: what all begins with, and what tells the first call from text; "" where only the beginning of the text does.
    """

    mark: str
    opening: str
    before: str
    between: str
    after: str
    separator: str
    closing: str


HERMES = _Layout("<tool_call>", "", '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n", "")
LLAMA3 = _Layout("", "", '{"name": "', '", "parameters": ', "}", "; ", "")
MISTRAL = _Layout("[TOOL_CALLS]", "[TOOL_CALLS][", '{"name": "', '", "arguments": ', "}", ", ", "]")
MISTRAL_ARGS = _Layout("[TOOL_CALLS]", "", "[TOOL_CALLS]", "[ARGS]", "", "", "")

MARKS = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3_json": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
}
REASONING_PARSERS = ("auto", "none", "think")

FREE = r"/(?s:.*)/"


class ToolFormat:
    """tokenizer: marks that are tokens of it are written as such. Errors: Unsupported for an unknown name."""

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self._parser = PARSERS.get(name)
        self._tokens = {text: token for token, text in tokenizer.added_tokens.items()}
        mistral = MISTRAL_ARGS if "[ARGS]" in self._tokens else MISTRAL
        self._layout = {"hermes": HERMES, "llama3_json": LLAMA3, "mistral": mistral}[name]

    @classmethod
    def of(cls, tokenizer: Tokenizer, template: str) -> ToolFormat:
        """What the model of this tokenizer and chat template was trained to write, as far as these tell."""
        known = set(tokenizer.added_tokens.values())
        if "[TOOL_CALLS]" in known or "[TOOL_CALLS]" in template:
            return cls("mistral", tokenizer)
        if "<|python_tag|>" in known and "<tool_call>" not in template:
            return cls("llama3_json", tokenizer)
        return cls("hermes", tokenizer)

    @property
    def marks(self) -> tuple[str, ...]:
        """What the parser looks for in the text."""
        return MARKS[self.name]

    def make_parser(self, tools: Sequence[FunctionTool]) -> TextTransform:
        return self._parser(frozenset(tool.name for tool in tools))

    def required(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        """Lark: one call at least, and nothing else."""
        return f"start: {self._text(self._layout.mark)} begun\n{self._calls(tools, parallel, enforce=True)}"

    def allowed(self, tools: Sequence[FunctionTool], *, parallel: bool) -> str:
        """Lark: any text, or text and then calls, whose arguments follow the schemas of strict tools."""
        mark = self._layout.mark
        calls = self._calls(tools, parallel, enforce=False)
        if not mark:
            return f"start: begun | TEXT\nTEXT: /([^{{\\s](?s:.*))?/\n{calls}"
        # Text that turns out to lead to calls ends as soon as the mark is there, be it spelt or a token.
        spelt = re.escape(mark).replace("/", chr(92) + "/")
        by_token = f"| TEXT <[{self._tokens[mark]}]>" if mark in self._tokens else ""
        terminals = f"TEXT: {FREE} & ~/(?s:.*{spelt}.*)/\nlead[lazy]: /(?s:.*){spelt}/\n"
        return f"start: TEXT | (lead {by_token}) begun\n{terminals}{calls}"

    def _calls(self, tools: Sequence[FunctionTool], parallel: bool, enforce: bool) -> str:
        """The rule `begun`: calls, without the mark that the first of them begins with."""
        layout = self._layout
        before = layout.before if layout.opening else layout.before.removeprefix(layout.mark)
        again = layout.before.removesuffix(before)
        more = f"({self._text(layout.separator + again)} body)*" if parallel else ""
        rules = [
            f"begun: {self._text(layout.opening.removeprefix(layout.mark))} body {more} {self._text(layout.closing)}",
            "body: " + " | ".join(f"body_{i}" for i in range(len(tools))),
        ]
        for i, tool in enumerate(tools):
            head, tail = self._text(f"{before}{tool.name}{layout.between}"), self._text(layout.after)
            rules.append(f"body_{i}: {head} %json {_schema(tool, enforce)} {tail}")
        return "\n".join(rules)

    def _text(self, text: str) -> str:
        return lark_text(text, self._tokens)


def lark_text(text: str, tokens: dict[str, int]) -> str:
    """Text as a Lark expression. What is a token may come as that or spelt out. tokens: text to id, of added tokens."""
    marks = sorted((mark for mark in tokens if mark in text), key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, marks)) + ")", text) if marks else [text]
    return " ".join(f"(<[{tokens[p]}]> | {json.dumps(p)})" if p in tokens else json.dumps(p, ensure_ascii=False) for p in parts if p)


def _schema(tool: FunctionTool, enforce: bool) -> str:
    """Arguments are an object. Keywords that no grammar can follow are an error of a strict tool and passed over elsewhere."""
    if not enforce and not tool.strict:
        return '{"type": "object"}'
    schema = dict(tool.parameters or {"type": "object", "properties": {}, "additionalProperties": False})
    schema.setdefault("type", "object")
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": JSON_WHITESPACE, "lenient": not tool.strict}})


def check_parsers(tool_parser: str, reasoning_parser: str) -> None:
    """Errors: Unsupported for a name that is not known."""
    if tool_parser != "auto":
        PARSERS.get(tool_parser)
    if reasoning_parser not in REASONING_PARSERS:
        raise Unsupported(f"unknown reasoning parser {reasoning_parser!r}; known: {', '.join(REASONING_PARSERS)}")
