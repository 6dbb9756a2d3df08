"""What a caller may ask of the text that is generated. Field names, defaults and meanings are vLLM's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from apportion.core.errors import InvalidParameter
from apportion.core.structured_outputs import StructuredOutputsParams

MAX_SEED = 2**63 - 1
_SWITCHES = ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens")


@dataclass(frozen=True, slots=True)
class PromptReference:
    """Where a worker keeps, or finds, the log-probabilities of a prompt over the whole vocabulary: a whole distribution is too much to
    send, so models are compared where their logits are made.

    path: an existing file that every worker can map, rows of `vocab` float32. first_row: the row of the prompt's second token (the first
    is not predicted), the others follow. compare: False writes this model's rows, True reads them and reports KL(reference || model).
    """

    path: str
    first_row: int
    vocab: int
    compare: bool = False


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping of one request.

    temperature 0 is greedy. top_k 0 or -1 means all tokens. Penalties follow OpenAI (presence, frequency: over generated tokens) and
    CTRL (repetition: over prompt and generated tokens). seed None draws one; the seed drawn makes the request repeatable when given back.
    logprobs: how many top tokens to report at each position beside the chosen one (-1: the whole vocabulary); None for none.
    stop: strings; stop_token_ids: ids; `include_stop_str_in_output` keeps the matched text. max_tokens None: up to max_model_len.
    prompt_reference: with prompt_logprobs, a file to record whole distributions in or to be compared with.
    truncate_prompt_tokens: keep the last so many tokens of the prompt (-1: as many as max_model_len allows).
    structured_outputs: what shape the text must have (StructuredOutputsParams, or a mapping of its fields).

    Errors: InvalidParameter, naming the field and its limit.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_reference: PromptReference | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    truncate_prompt_tokens: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    priority: int = 0  # smaller runs earlier under the priority policy
    bad_words_token_ids: list[list[int]] = field(default_factory=list)  # made from bad_words by the tokenizer

    def __new__(cls, *_: Any, **fields: Any) -> SamplingParams:
        unknown = [name for name in fields if name not in cls.__dataclass_fields__]
        if unknown:
            raise InvalidParameter(f"unknown sampling parameter {unknown[0]!r}; known: {', '.join(cls.__dataclass_fields__)}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        self.stop = _listed("stop", [self.stop] if isinstance(self.stop, str) else self.stop or ())
        self.stop_token_ids = _listed("stop_token_ids", self.stop_token_ids or ())
        for name in ("allowed_token_ids", "bad_words"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, _listed(name, value))
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise InvalidParameter(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
        if isinstance(self.structured_outputs, Mapping):
            self.structured_outputs = _structured_outputs(self.structured_outputs)
        if self.top_k == -1:
            self.top_k = 0
        self._check()

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    def _check(self) -> None:
        _number("temperature", self.temperature, 0.0, math.inf)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)  # logits are multiplied by it, or divided
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise InvalidParameter(f"{name} must be True or False, got {getattr(self, name)!r}")
        _integer("priority", self.priority, -(2**31), 2**31 - 1)
        _integer("n", self.n, 1, 1024)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        for name in ("max_tokens", "truncate_prompt_tokens"):
            value = getattr(self, name)
            if value is not None and not (name == "truncate_prompt_tokens" and value == -1):
                _integer(name, value, 1, 2**31 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _integer(name, value, -1, 2**31 - 1)
        if self.seed is not None:
            _integer("seed", self.seed, -MAX_SEED, MAX_SEED)
        if self.prompt_reference is not None and self.prompt_logprobs is None:
            raise InvalidParameter("prompt_reference needs prompt_logprobs: it is about the same positions")
        if self.n > 1 and self.is_greedy:
            raise InvalidParameter(f"n is {self.n} and temperature is 0: greedy completions would all be the same")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameter(f"min_tokens ({self.min_tokens}) is greater than max_tokens ({self.max_tokens})")
        if any(not isinstance(s, str) or not s for s in self.stop or ()):
            raise InvalidParameter("stop must be non-empty strings")
        if self.stop and not self.detokenize:
            raise InvalidParameter("stop strings need detokenize=True")
        for name in ("stop_token_ids", "allowed_token_ids"):
            if any(not isinstance(t, int) or isinstance(t, bool) or t < 0 for t in getattr(self, name) or ()):
                raise InvalidParameter(f"{name} must be non-negative integers")
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise InvalidParameter(f"structured_outputs must be StructuredOutputsParams, got {type(self.structured_outputs).__name__}")
        if self.structured_outputs is not None and self.ignore_eos:
            raise InvalidParameter("ignore_eos contradicts structured_outputs: a text that is complete can only end")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidParameter("allowed_token_ids is empty: no token could be sampled")
        for token, bias in (self.logit_bias or {}).items():
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise InvalidParameter(f"logit_bias has the key {token!r}: keys are token ids")
            _number(f"logit_bias[{token}]", bias, -100.0, 100.0)
        if any(not isinstance(w, str) or not w for w in self.bad_words or ()):
            raise InvalidParameter("bad_words must be non-empty strings")


def _listed(name: str, value: object) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise InvalidParameter(f"{name} must be a list, got {value!r}")
    return list(value)


def _structured_outputs(given: Mapping[str, Any]) -> StructuredOutputsParams:
    known = StructuredOutputsParams.__dataclass_fields__
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InvalidParameter(f"unknown field {unknown[0]!r} of structured_outputs; known: {', '.join(known)}")
    return StructuredOutputsParams(**given)


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or math.isnan(value) or math.isinf(value):
        raise InvalidParameter(f"{name} must be a finite number, got {value!r}")
    if value > high or value < low or (open_low and value == low):
        bounds = f"{'greater than' if open_low else 'at least'} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")
        raise InvalidParameter(f"{name} must be {bounds}, got {value!r}")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidParameter(f"{name} must be an integer, got {value!r}")
    if not low <= value <= high:
        raise InvalidParameter(f"{name} must be between {low} and {high}, got {value}")
