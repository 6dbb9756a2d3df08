"""What shape a text must have. Names and meanings are vLLM's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from apportion.core.errors import InvalidParameter

MAX_SOURCE_BYTES = 1 << 20

# Between tokens of JSON: a blank, or a new line and its indentation. A model that would write blanks forever finds no room for it.
JSON_WHITESPACE = r"(\x20|\r?\n[\x20\t]{0,40})"


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one of: json (a JSON schema, as text or mapping), regex, choice (some texts), grammar (Lark or GBNF),
    json_object (any JSON object). `kind` and `source` say which, as text. prefix: Lark rules, of which `prefix` is what the text begins
    with before it takes that shape (a thought, say).

    Errors: InvalidParameter. Whether the text is a schema or a grammar is found out when it is compiled.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    prefix: str | None = None

    def __post_init__(self) -> None:
        shapes = [field.name for field in fields(self) if field.name != "prefix"]
        given = [name for name in shapes if getattr(self, name) is not None and getattr(self, name) is not False]
        if len(given) != 1:
            raise InvalidParameter(f"structured outputs take exactly one of {', '.join(shapes)}, got {' and '.join(given) or 'none'}")
        for name in ("regex", "grammar", "prefix"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise InvalidParameter(f"{name} must be a non-empty string, got {value!r:.80}")
        choice = self.choice
        listed = choice is not None and isinstance(choice, Sequence) and not isinstance(choice, str)
        if choice is not None and not (listed and choice and all(isinstance(text, str) and text for text in choice)):
            raise InvalidParameter(f"choice must be a non-empty list of non-empty strings, got {choice!r:.80}")
        if self.json is not None and not isinstance(self.json, str | Mapping):
            raise InvalidParameter(f"json must be a JSON schema, as text or mapping, got {type(self.json).__name__}")
        if self.json_object not in (None, True, False):
            raise InvalidParameter(f"json_object must be True or False, got {self.json_object!r:.80}")
        if len(self.source) > MAX_SOURCE_BYTES:
            raise InvalidParameter(f"{self.kind} has {len(self.source)} characters; at most {MAX_SOURCE_BYTES} are taken")

    @property
    def kind(self) -> str:
        """json, regex, choice or grammar."""
        return next((name for name in ("regex", "choice", "grammar") if getattr(self, name) is not None), "json")

    @property
    def source(self) -> str:
        """The schema, expression or grammar; of choices, a JSON list."""
        if self.json_object:
            return '{"type": "object"}'
        value = getattr(self, self.kind)
        if isinstance(value, str):
            return value
        try:
            return json.dumps(list(value) if self.kind == "choice" else value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidParameter(f"{self.kind} cannot be written as JSON: {error}") from error
