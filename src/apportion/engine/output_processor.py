"""Tokens become text here: per sequence a detokenizer, stop strings and log-probabilities; per request the n sequences as one output.

Implements engine.OutputProcessor. It knows requests and tokenizers; it must not know the scheduler, lanes or models.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from apportion.core.errors import InvalidRequest
from apportion.core.outputs import CompletionOutput, Logprob, PromptLogprobs, RequestMetrics, RequestOutput, SampleLogprobs, SequenceDelta
from apportion.core.request import Request, RequestTimes, RequestUpdate
from apportion.core.schedule import TokenLogprobs
from apportion.processor.detokenizer import Detokenizer
from apportion.processor.tokenizer import Tokenizer


@dataclass(slots=True, eq=False)
class _Group:
    """The n sequences that one prompt asked for."""

    request_id: str
    prompt: str | None
    sequences: list[_Sequence] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Sequence:
    """text_shown: what may be shown so far; it grows only. num_told, num_prompt_told: tokens, prompt positions that `deltas` told."""

    request: Request
    group: _Group
    index: int
    tokenizer: Tokenizer | None
    detokenizer: Detokenizer | None
    logprobs: SampleLogprobs | None
    prompt_logprobs: PromptLogprobs | None
    prompt_kl: list[float] | None
    text_shown: str = ""
    cumulative_logprob: float = 0.0
    num_told: int = 0
    num_prompt_told: int = 0


class OutputProcessor:
    """tokenizers: by model name; a model without one gives tokens and no text."""

    def __init__(self, tokenizers: Mapping[str, Tokenizer]) -> None:
        self._tokenizers = tokenizers
        self._sequences: dict[str, _Sequence] = {}

    def add(self, request_id: str, prompt: str | None, requests: Sequence[Request]) -> None:
        """Expect the sequences of one prompt, in the order of their index. Call before the engine sees them."""
        group = _Group(request_id, prompt)
        for index, request in enumerate(requests):
            params = request.sampling_params
            tokenizer = self._tokenizers.get(request.model)
            if params.detokenize and tokenizer is None and params.stop:
                raise InvalidRequest(f"stop strings need a tokenizer, and model {request.model!r} has none")
            text = tokenizer is not None and params.detokenize
            sequence = _Sequence(
                request=request,
                group=group,
                index=index,
                tokenizer=tokenizer if text else None,
                detokenizer=Detokenizer(tokenizer, request.prompt_token_ids, params) if text and tokenizer else None,
                logprobs=None if params.logprobs is None else [],
                prompt_logprobs=None if params.prompt_logprobs is None else [None],
                prompt_kl=[] if params.prompt_reference is not None and params.prompt_reference.compare else None,
            )
            group.sequences.append(sequence)
            self._sequences[request.request_id] = sequence

    def forget(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._sequences.pop(request.request_id, None)

    def append(
        self, request: Request, token_ids: list[int], logprobs: list[TokenLogprobs], prompt_logprobs: list[TokenLogprobs]
    ) -> str | None:
        """Take in a sequence's news; returns the stop string that ends it, if one does."""
        sequence = self._sequences.get(request.request_id)
        if sequence is None:
            return None  # its caller has gone
        if prompt_logprobs and sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs += [_by_token(entry, sequence.tokenizer) for entry in prompt_logprobs]  # each position is told once
            if sequence.prompt_kl is not None:
                sequence.prompt_kl += [entry.kl for entry in prompt_logprobs if entry.kl is not None]
        if sequence.logprobs is not None:
            for entry in logprobs:
                sequence.logprobs.append(_by_token(entry, sequence.tokenizer))
                sequence.cumulative_logprob += entry.logprobs[0]
        if sequence.detokenizer is None or not token_ids:
            return None
        # A token that ended the sequence by its id is not part of the text, unless the caller wants to see what stopped it.
        by_id = request.finish_reason == "stop" and token_ids[-1] in request.stop_ids
        skip_last = by_id and not request.sampling_params.include_stop_str_in_output
        return sequence.detokenizer.append(token_ids, skip_last=skip_last)

    def outputs(self, updates: Sequence[RequestUpdate], *, finished_only: bool = False) -> list[RequestOutput]:
        """An output for each request among `updates`, as it stands; a request that is finished is told once and forgotten."""
        groups: dict[_Group, None] = {}
        for update in updates:
            sequence = self._sequences.get(update.request.request_id)
            if sequence is not None:
                groups[sequence.group] = None
        told = []
        for group in groups:
            finished = all(s.request.is_finished for s in group.sequences)
            if finished or not finished_only:
                told.append(_output(group, finished))
            if finished:
                self.forget(s.request for s in group.sequences)
        return told

    def deltas(self, updates: Sequence[RequestUpdate], whole: Container[str] = ()) -> list[SequenceDelta]:
        """What is new in each sequence among `updates`; one that is finished is told and forgotten. Those whose request is in `whole`
        are told once, when they are finished."""
        told = []
        for request in dict.fromkeys(update.request for update in updates):
            sequence = self._sequences.get(request.request_id)
            if sequence is None or (not request.is_finished and sequence.group.request_id in whole):
                continue
            told.append(_delta(sequence))
            if request.is_finished:
                del self._sequences[request.request_id]
        return told


def _by_token(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    return {
        token: Logprob(logprob, rank, tokenizer.token_text(token) if tokenizer else None)
        for token, logprob, rank in zip(entry.token_ids, entry.logprobs, entry.ranks, strict=True)
    }


def _output(group: _Group, finished: bool) -> RequestOutput:
    first = group.sequences[0]
    return RequestOutput(
        request_id=group.request_id,
        prompt=group.prompt,
        prompt_token_ids=first.request.prompt_token_ids,
        outputs=[_completion(index, sequence) for index, sequence in enumerate(group.sequences)],
        prompt_logprobs=first.prompt_logprobs,
        prompt_kl=first.prompt_kl,
        finished=finished,
        metrics=_metrics([s.request.times for s in group.sequences], finished),
        num_cached_tokens=first.request.num_cached_tokens,
        embedding=first.request.embedding,
    )


def _delta(sequence: _Sequence) -> SequenceDelta:
    request = sequence.request
    tokens = request.token_ids[request.num_prompt_tokens + sequence.num_told :]
    delta = SequenceDelta(
        request_id=sequence.group.request_id,
        index=sequence.index,
        text=sequence.detokenizer.take(request.is_finished) if sequence.detokenizer else "",
        token_ids=tokens,
        logprobs=None if sequence.logprobs is None else sequence.logprobs[sequence.num_told :],
        prompt_logprobs=None if sequence.prompt_logprobs is None else sequence.prompt_logprobs[sequence.num_prompt_told :],
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        error=request.error,
    )
    sequence.num_told += len(tokens)
    sequence.num_prompt_told += len(delta.prompt_logprobs or ())
    return delta


def _completion(index: int, sequence: _Sequence) -> CompletionOutput:
    request = sequence.request
    if sequence.detokenizer is not None:
        sequence.text_shown += sequence.detokenizer.take(request.is_finished)
    return CompletionOutput(
        index=index,
        text=sequence.text_shown,
        token_ids=request.output_token_ids,
        cumulative_logprob=None if sequence.logprobs is None else sequence.cumulative_logprob,
        logprobs=sequence.logprobs,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        error=request.error,
        seed=None if request.sampling_params.is_greedy else request.sampling_params.seed,
    )


def _metrics(times: Sequence[RequestTimes], finished: bool) -> RequestMetrics:
    """Of all sequences together: the first beginning, the last end."""

    def known(values: Iterable[float | None]) -> list[float]:
        return [value for value in values if value is not None]

    return RequestMetrics(
        arrival_time=times[0].arrival_s,
        first_scheduled_time=min(known(t.first_scheduled_s for t in times), default=None),
        first_token_time=min(known(t.first_token_s for t in times), default=None),
        last_token_time=max(known(t.last_token_s for t in times), default=None),
        finished_time=max(known(t.finished_s for t in times), default=None) if finished else None,
    )
