"""Text to token ids and back, from a checkpoint folder.

`tokenizer.json` is read by the `tokenizers` library alone. Only where there is none is the folder converted through
transformers, which is imported for that and for nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from apportion.core.errors import CheckpointError, InvalidRequest

if TYPE_CHECKING:
    from apportion.processor.chat_template import ChatTemplate

OLD_FILES = ("tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "sentencepiece.bpe.model")


class Tokenizer:
    """Encoding and decoding with the special-token rules of tokenizer_config.json.

    bos_token, eos_token: strings or None. vocab_size: ids the tokenizer knows, added tokens included (a model may pad its own higher).
    Errors: CheckpointError when the folder has no tokenizer or a broken one.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None, template: str | None = None) -> None:
        self.backend = backend
        self.config = config or {}
        self._template = template
        self.bos_token = _content(self.config.get("bos_token"))
        self.eos_token = _content(self.config.get("eos_token"))
        backend.no_truncation()
        backend.no_padding()
        self._apply_special_token_switches()

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder, or of a single tokenizer.json."""
        path = Path(folder)
        if path.is_file():
            return cls(_read_tokenizer_json(path))
        config_file = path / "tokenizer_config.json"
        config = _read_json(config_file) if config_file.is_file() else {}
        file = path / "tokenizer.json"
        backend = _read_tokenizer_json(file) if file.is_file() else _convert(path)
        template_file = path / "chat_template.jinja"
        template = template_file.read_text(encoding="utf-8") if template_file.is_file() else _default_template(config.get("chat_template"))
        return cls(backend, config, template)

    def save(self, folder: Path) -> None:
        """Write files that `from_folder` reads without transformers."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({**self.config, "chat_template": self._template}), encoding="utf-8")

    @cached_property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        return self.backend.token_to_id(self.bos_token) if self.bos_token else None

    @property
    def eos_token_id(self) -> int | None:
        return self.backend.token_to_id(self.eos_token) if self.eos_token else None

    @cached_property
    def added_tokens(self) -> dict[int, str]:
        """Tokens outside the learned vocabulary: id to text."""
        return {i: token.content for i, token in self.backend.get_added_tokens_decoder().items()}

    @property
    def chat_template_text(self) -> str | None:
        """The jinja2 text of this checkpoint's chat template, if it has one."""
        return self._template

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The compiled template of this checkpoint. Errors: InvalidRequest when it has none."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template: pass chat_template=, or use generate with a plain prompt")
        return self.compile_template(self._template)

    def compile_template(self, source: str) -> ChatTemplate:
        """A template of the caller's own, with this tokenizer's special tokens in reach."""
        from apportion.processor.chat_template import ChatTemplate  # jinja2 is not needed to complete a prompt

        specials = {name: _content(value) for name, value in self.config.items() if name.endswith("_token")}
        return ChatTemplate(source, {name: value for name, value in specials.items() if value is not None})

    def with_chat_template(self, source: str) -> Tokenizer:
        """The same tokenizer with another chat template. Errors: InvalidRequest when it does not compile."""
        self.compile_template(source)
        return Tokenizer(self.backend, self.config, source)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise InvalidRequest(f"the text holds half a surrogate pair and cannot be encoded: {text[:40]!a}") from error
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """How one token reads by itself, special tokens shown (for log-probabilities)."""
        return self.decode([token_id], skip_special_tokens=False)

    def bad_words_token_ids(self, words: Sequence[str]) -> list[list[int]]:
        """The token sequences that spell each word, at the start of a text and after a space."""
        sequences: list[list[int]] = []
        for word in words:
            for spelling in (word.lstrip(), " " + word.lstrip()):
                ids = self.encode(spelling, add_special_tokens=False)
                if ids and ids not in sequences:
                    sequences.append(ids)
        return sequences

    def _apply_special_token_switches(self) -> None:
        """An explicit add_bos_token / add_eos_token in the config overrules tokenizer.json, as in transformers 5."""
        if "add_bos_token" not in self.config and "add_eos_token" not in self.config:
            return
        template, specials = ["$A"], []
        for name, place in (("bos", 0), ("eos", 2)):
            token = self.bos_token if name == "bos" else self.eos_token
            token_id = self.backend.token_to_id(token) if token else None
            if self.config.get(f"add_{name}_token") and token_id is not None:
                template.insert(place, f"{token}:0")
                specials.append((token, token_id))
        self.backend.post_processor = TemplateProcessing(single=" ".join(template), special_tokens=specials)


def _content(token: Any) -> str | None:
    """A special token stands in the config as a string or as a serialized AddedToken."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _default_template(value: Any) -> str | None:
    """`chat_template` is a string, or a list of named ones of which 'default' is meant."""
    if isinstance(value, list):
        return next((entry["template"] for entry in value if entry.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, it holds a {type(content).__name__}")
    return content


def _read_tokenizer_json(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every defect of the file
        raise CheckpointError(f"{file} is not a tokenizer that the tokenizers library {tokenizers.__version__} reads: {error}") from error


def _convert(folder: Path) -> tokenizers.Tokenizer:
    if not any((folder / name).is_file() for name in OLD_FILES):
        raise CheckpointError(f"no tokenizer in {folder}: expected tokenizer.json, or one of {', '.join(OLD_FILES)}")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CheckpointError(
            f"{folder} has no tokenizer.json, and converting older files needs: pip install transformers sentencepiece"
        ) from error
    try:
        converted = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        backend: tokenizers.Tokenizer = converted.backend_tokenizer
    except Exception as error:  # whatever the conversion meets, the folder is what cannot be used
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder} has no tokenizer.json and transformers cannot convert its tokenizer files: {reason}") from error
    return backend
