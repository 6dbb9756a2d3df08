"""Messages to a prompt, by the checkpoint's own jinja2 template.

Templates come from strangers: they run in jinja2's immutable sandbox, with the helpers that templates on the hub expect
(`raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, loop controls, the `generation` tag) and no others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from apportion.core.errors import InvalidRequest

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled template. special_tokens: names such as bos_token to their text, in reach of the template.

    Errors: InvalidRequest when the template cannot be compiled, refuses the messages, or the messages have no role.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        if not isinstance(source, str) or not source:
            raise InvalidRequest(f"a chat template is jinja2 text, got {source!r}")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise InvalidRequest(f"the chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`; `variables` (such as enable_thinking) are handed to the template as they are."""
        if not messages:
            raise InvalidRequest("a chat needs at least one message")
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise InvalidRequest(f"message {i} of the chat has no role: a message is a mapping with 'role' and 'content'")
        names = {**self._special_tokens, **variables}
        try:
            return self._template.render(
                messages=[_plain(message) for message in messages],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **names,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:  # what a template can do to itself
            raise InvalidRequest(f"the chat template refused these messages: {error}") from error


class GenerationTag(Extension):
    """`{% generation %}` marks assistant text for training; here it is transparent."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _plain(message: Message) -> dict[str, Any]:
    """OpenAI's list of text parts becomes one string: a text model's template expects that."""
    content = message.get("content")
    if isinstance(content, list):
        kinds = {part.get("type") for part in content if isinstance(part, Mapping)}
        if kinds - {"text"} or not all(isinstance(part, Mapping) for part in content):
            raise InvalidRequest(
                f"this model takes text alone; a message has parts of type {', '.join(sorted(map(str, kinds - {'text'})))}"
            )
        return {**message, "content": "\n".join(str(part.get("text", "")) for part in content)}
    return dict(message)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
