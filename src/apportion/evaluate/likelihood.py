"""How surprised a model is by text: negative log-likelihoods in nats, through the engine's prompt log-probabilities."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from apportion.core.errors import InternalError, InvalidParameter, NumericalError
from apportion.core.outputs import RequestOutput
from apportion.core.sampling_params import PromptReference, SamplingParams
from apportion.evaluate.report import Report
from apportion.evaluate.statistics import Estimate, bootstrap, ratio
from apportion.evaluate.subject import Subject, describe, max_model_len, run_batch
from apportion.evaluate.text import Window, cut_windows

TOKENS_AT_ONCE = 1 << 16  # one run of the engine: enough to fill its steps, little enough to hold the results as Python objects
DEFAULT_WINDOW = 2048

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)


@dataclass(slots=True)
class WindowScores:
    """Of the scored tokens of one window, in order. nll: float64, nats. top: int32, the most likely token at each position.

    kl: float64, KL(reference || model) in nats, where a reference was given.
    """

    window: Window
    nll: np.ndarray
    top: np.ndarray
    kl: np.ndarray | None = None


def nll(
    llm: Subject, texts: str | Sequence[str] | Sequence[Sequence[int]], *, window: int | None = None, stride: int | None = None
) -> list[np.ndarray]:
    """Negative log-likelihood in nats of every token of each text (a string, or token ids) but those that begin a window.

    One array per text, in order; exp of the mean over all is the perplexity. Text is tokenized as a prompt is, with the tokenizer's own
    special tokens. window: tokens, None for the model's longest up to 2,048. stride: tokens between windows, None for `window`.
    """
    listed = [texts] if isinstance(texts, str) else list(texts)
    documents = [llm.tokenizer.encode(text) if isinstance(text, str) else list(text) for text in listed]
    length = min(resolve_window(llm, window), max([2, *map(len, documents)]))
    scores = score(llm, cut_windows(documents, length, min(stride, length) if stride else None))
    return [np.concatenate([np.zeros(0), *(s.nll for s in scores if s.window.document == i)]) for i in range(len(documents))]


def resolve_window(llm: Subject, window: int | None) -> int:
    """The window in tokens. Errors: InvalidParameter when the model cannot take it (a prompt leaves room for one token of output)."""
    longest = max_model_len(llm) - 1
    if window is not None and window > longest:
        raise InvalidParameter(f"a window of {window} tokens does not fit: this model takes at most {longest} of a prompt")
    return window or min(DEFAULT_WINDOW, longest)


def score(llm: Subject, windows: Sequence[Window], progress: Progress | None = None) -> list[WindowScores]:
    """Every window, in slices that each fill the engine's steps."""
    found = []
    for slice_ in slices(windows, TOKENS_AT_ONCE, progress):
        found += score_slice(llm, slice_)
    return found


def slices(windows: Sequence[Window], max_tokens: int, progress: Progress | None = None) -> Iterator[list[Window]]:
    """Consecutive windows of together at most max_tokens, at least one."""
    total = sum(len(w.token_ids) for w in windows)
    done = taken = 0
    slice_: list[Window] = []
    for window in windows:
        if slice_ and taken + len(window.token_ids) > max_tokens:
            yield slice_
            done += taken
            if progress:
                progress(done, total)
            slice_, taken = [], 0
        slice_.append(window)
        taken += len(window.token_ids)
    if slice_:
        yield slice_
    if progress:
        progress(total, total)


def score_slice(llm: Subject, windows: Sequence[Window], references: Sequence[PromptReference] | None = None) -> list[WindowScores]:
    """One run of the engine. references: one for each window."""
    params = [
        SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, prompt_logprobs=1, prompt_reference=reference)
        for reference in references or [None] * len(windows)
    ]
    outputs = run_batch(llm, [window.token_ids for window in windows], params)
    return [_scores(window, output) for window, output in zip(windows, outputs, strict=True)]


def _scores(window: Window, output: RequestOutput) -> WindowScores:
    positions = (output.prompt_logprobs or [])[window.num_context :]
    if len(positions) != window.num_scored:
        raise InternalError(f"the engine scored {len(positions)} of {window.num_scored} tokens")
    losses = np.empty(len(positions))
    top = np.empty(len(positions), np.int32)
    for i, (token, entries) in enumerate(zip(window.token_ids[window.num_context :], positions, strict=True)):
        if entries is None:
            raise InternalError("a scored token has no log-probability")
        losses[i] = -entries[token].logprob
        top[i] = next(reversed(entries))  # the token itself comes first
    if not np.isfinite(losses).all():
        place = window.start + window.num_context + int(np.flatnonzero(~np.isfinite(losses))[0])
        raise NumericalError(f"the model gives token {place} of document {window.document} no finite log-probability")
    kl = None if output.prompt_kl is None else np.array(output.prompt_kl[window.num_context - 1 :])
    return WindowScores(window, losses, top, kl)


def by_cluster(windows: Sequence[Window], rows_WK: np.ndarray) -> np.ndarray:
    """Sums over what is resampled together [C, K]: the windows of a document, or each window by itself where there is one document."""
    documents, index = np.unique([w.document for w in windows], return_inverse=True)
    if len(documents) == 1:
        return rows_WK
    clusters_CK = np.zeros((len(documents), rows_WK.shape[1]))
    np.add.at(clusters_CK, index, rows_WK)
    return clusters_CK


def mean_nll(scores: Sequence[WindowScores], seed: int = 0) -> Estimate:
    """Nats per scored token."""
    rows_WK = np.array([(s.nll.sum(), len(s.nll)) for s in scores])
    return bootstrap(by_cluster([s.window for s in scores], rows_WK), ratio(), num=int(rows_WK[:, 1].sum()), seed=seed)


def perplexity(mean: Estimate) -> Estimate:
    """exp of a mean NLL; an interval goes through any increasing function."""

    def exp(x: float | None) -> float | None:
        return None if x is None else math.exp(x)

    return Estimate(exp(mean.value), exp(mean.low), exp(mean.high), mean.level, mean.method, mean.num, mean.num_clusters)


def perplexity_report(
    llm: Subject,
    documents: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Perplexity of texts, with bits per byte so that models of different tokenizers can be set side by side."""
    window = resolve_window(llm, window)
    token_ids = [llm.tokenizer.encode(text) for text in documents]
    windows = cut_windows(token_ids, window, stride)
    started = time.monotonic()
    scores = score(llm, windows, progress)
    wall_s = time.monotonic() - started
    mean = mean_nll(scores, seed)
    num_bytes, num_tokens = sum(len(text.encode()) for text in documents), sum(map(len, token_ids))
    scale = num_tokens / num_bytes / math.log(2)
    bits = [None if x is None else x * scale for x in (mean.value, mean.low, mean.high)]
    return Report(
        task="ppl",
        subject=describe(llm),
        metrics={
            "nll": mean,
            "perplexity": perplexity(mean),
            "bits_per_byte": Estimate(*bits, mean.level, mean.method, mean.num, mean.num_clusters),
        },
        cells=by_position(scores),
        settings={
            "window": window,
            "stride": stride or window,
            "num_documents": len(documents),
            "num_tokens": num_tokens,
            "num_bytes": num_bytes,
        },
        seeds={"bootstrap": seed},
        wall_s=wall_s,
        num_tokens=sum(len(w.token_ids) for w in windows),
    )


def by_position(scores: Sequence[WindowScores]) -> list[dict[str, float]]:
    """Mean NLL by how many tokens come before in the window, in ranges that double."""
    length = max(len(s.window.token_ids) for s in scores)
    sums, counts = np.zeros(length), np.zeros(length, np.int64)
    for s in scores:
        sums[s.window.num_context : len(s.window.token_ids)] += s.nll
        counts[s.window.num_context : len(s.window.token_ids)] += 1
    edges = [1 << i for i in range(length.bit_length())]
    rows = []
    for first, stop in zip(edges, [*edges[1:], length], strict=True):
        if num := int(counts[first:stop].sum()):
            rows.append(
                {"context_from": first, "context_to": min(stop, length) - 1, "nll": float(sums[first:stop].sum() / num), "num": num}
            )
    return rows
