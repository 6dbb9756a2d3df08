"""Text to score: documents of a file, and the windows that cover them. Knows tokens and files, nothing of models."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.core.errors import InvalidParameter

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive tokens of one document. Those from `num_context` (at least 1) on are scored, the ones before are what they follow.

    start: of the window in its document.
    """

    document: int
    start: int
    token_ids: Sequence[int]
    num_context: int = 1

    @property
    def num_scored(self) -> int:
        return len(self.token_ids) - self.num_context


def read_text(path: Path) -> str:
    """A text file, plain or packed (.gz, .xz). Errors: InvalidParameter naming it."""
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            content: str = file.read()
            return content
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise InvalidParameter(f"{path} cannot be read: {error}") from error


def is_jsonl(path: Path) -> bool:
    return ".jsonl" in path.suffixes[-2:]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file. Lines end with a line feed alone: a text may hold other separators.

    Errors: InvalidParameter naming file and line.
    """
    objects = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise InvalidParameter(f"line {number} of {path} is no JSON: {error}") from error
        if not isinstance(entry, dict):
            raise InvalidParameter(f"line {number} of {path} must be a JSON object")
        objects.append(entry)
    if not objects:
        raise InvalidParameter(f"{path} has no entries")
    return objects


def read_documents(path: Path) -> list[str]:
    """The 'text' of each line of a .jsonl file (also .jsonl.gz, .jsonl.xz); any other file is one document."""
    if not is_jsonl(path):
        return [read_text(path)]
    entries = read_jsonl(path)
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry.get("text"), str):
            raise InvalidParameter(f"entry {number} of {path} has no 'text'")
    return [entry["text"] for entry in entries]


def cut_windows(documents: Iterable[Sequence[int]], window: int, stride: int | None = None) -> list[Window]:
    """Windows of at most `window` tokens, `stride` apart (None: `window`), that score each token once.

    With stride < window a token is scored in the first window that reaches it, after at least window - stride tokens of context. With
    stride == window the first token of a window follows nothing and is not scored. The tail of a document is a shorter window.
    Errors: InvalidParameter for a stride that leaves gaps, and for text that is shorter than one window.
    """
    stride = window if stride is None else stride
    if window < 2:
        raise InvalidParameter(f"window must be at least 2 tokens, got {window}")
    if not 1 <= stride <= window:
        raise InvalidParameter(f"stride must be between 1 and the window of {window} tokens, got {stride}")
    windows: list[Window] = []
    num_tokens = 0
    for index, tokens in enumerate(documents):
        num_tokens += len(tokens)
        end = 0  # of what is scored
        for start in range(0, len(tokens), stride):
            piece = tokens[start : start + window]
            context = max(1, end - start)
            if len(piece) > context:
                windows.append(Window(index, start, piece, context))
            end = start + len(piece)
            if end == len(tokens):
                break
    if num_tokens < window:
        raise InvalidParameter(
            f"the text has {num_tokens} tokens, less than one window of {window}: give a longer text or a shorter window"
        )
    return windows
