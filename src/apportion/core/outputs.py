"""What a request gives back, in vLLM's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """One token at one position. rank: 1 is the most likely; decoded_token: how it reads by itself."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


SampleLogprobs = list[dict[int, Logprob]]
PromptLogprobs = list[dict[int, Logprob] | None]  # the first prompt token has none


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request in seconds: *_time are readings of one monotonic clock, time_in_queue is a duration."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None

    @property
    def time_in_queue(self) -> float | None:
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class CompletionOutput:
    """One of the n completions of a request.

    finish_reason: "stop", "length", "abort" or "error", None while it runs. stop_reason: the string or token id that stopped
    it, None for the end-of-sequence token. error: with finish_reason "error", the sentence that says why. seed: what the
    tokens were drawn with; the same request with this seed and n=1 gives them again. None when greedy.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    seed: int | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """One request: its prompt and its completions, in the order of their index.

    prompt_kl: KL(reference || model) in nats at each prompt token but the first, with SamplingParams.prompt_reference.compare.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    prompt_kl: list[float] | None = None
    finished: bool = False
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    embedding: list[float] | None = None  # of a request for hidden states, once it is finished


@dataclass(slots=True)
class EmbeddingOutput:
    embedding: list[float]


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """The vector of one prompt. error: why there is none; `outputs.embedding` is then empty."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0
    error: str | None = None


@dataclass(slots=True)
class SequenceDelta:
    """What is new in one of the n sequences of a request since it was last told. Concatenated, the pieces are its CompletionOutput.

    prompt_logprobs: of the positions of the prompt that were computed meanwhile; the first position has none.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: SampleLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def join(self, then: SequenceDelta) -> SequenceDelta:
        """Append what came next, here; returns this delta."""
        self.text += then.text
        self.token_ids += then.token_ids
        if then.logprobs is not None:
            self.logprobs = (self.logprobs or []) + then.logprobs
        if then.prompt_logprobs is not None:
            self.prompt_logprobs = (self.prompt_logprobs or []) + then.prompt_logprobs
        self.finish_reason, self.stop_reason, self.error = then.finish_reason, then.stop_reason, then.error
        return self
