"""What completions and chat completions answer: pieces of OpenAI's objects, made from deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apportion.core.outputs import Logprob, PromptLogprobs, SampleLogprobs, SequenceDelta
from apportion.serving.stream import Stream

LEAST_LOGPROB = -9999.0  # JSON has no infinity


def usage(stream: Stream, *, finished: bool = True) -> dict[str, Any]:
    """Token counts of a whole HTTP request so far."""
    prompt = sum(len(request.prompt_token_ids) for request in stream.requests)
    completion = sum(stream.num_tokens)
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    if finished:
        counts["prompt_tokens_details"] = {"cached_tokens": sum(end.num_cached_tokens for end in stream.ends.values())}
    return counts


def finish_reason(delta: SequenceDelta) -> str | None:
    """As OpenAI has them, and vLLM's "abort"; what failed is an error, not a reason."""
    return delta.finish_reason


class CompletionLogprobs:
    """Makes OpenAI's four lists for one choice; offsets go on from piece to piece."""

    def __init__(self, *, with_top: bool) -> None:
        self._offset = 0
        self._with_top = with_top

    def make(self, token_ids: Sequence[int], entries: SampleLogprobs | PromptLogprobs, texts: Sequence[str]) -> dict[str, Any]:
        """texts: how each token reads by itself."""
        tokens, chosen, tops, offsets = [], [], [], []
        for token_id, entry, text in zip(token_ids, entries, texts, strict=True):
            tokens.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
            chosen.append(None if entry is None else number(entry[token_id]))
            tops.append(None if entry is None or not self._with_top else {named(t, e): number(e) for t, e in reversed(entry.items())})
        return {"text_offset": offsets, "token_logprobs": chosen, "tokens": tokens, "top_logprobs": tops}


def chat_logprobs(delta: SequenceDelta, num_top: int) -> dict[str, Any] | None:
    """`logprobs` of a chat choice."""
    if delta.logprobs is None:
        return None
    content = []
    for token_id, entry in zip(delta.token_ids, delta.logprobs, strict=True):
        ranked = sorted(entry.items(), key=lambda item: item[1].rank or 0)
        content.append({**_chat_token(token_id, entry[token_id]), "top_logprobs": [_chat_token(t, e) for t, e in ranked[:num_top]]})
    return {"content": content}


def prompt_logprobs(entries: PromptLogprobs | None) -> list[Any] | None:
    """vLLM's `prompt_logprobs`: per position, by token id."""
    if entries is None:
        return None
    return [
        entry and {str(t): {"logprob": number(e), "rank": e.rank, "decoded_token": e.decoded_token} for t, e in entry.items()}
        for entry in entries
    ]


def named(token_id: int, entry: Logprob) -> str:
    return entry.decoded_token if entry.decoded_token is not None else f"token_id:{token_id}"


def number(entry: Logprob) -> float:
    return max(entry.logprob, LEAST_LOGPROB)


def _chat_token(token_id: int, entry: Logprob) -> dict[str, Any]:
    text = named(token_id, entry)
    return {"token": text, "logprob": number(entry), "bytes": list(text.encode("utf-8", "replace"))}
