"""How far a model has moved from a reference on the same text: NLL difference, KL over the whole vocabulary, top-1 agreement.

Whole distributions never cross the executor seam. The reference's workers write theirs into a scratch file, the candidate's workers map
it and return one number a position; a slice of text goes through every model before the next one begins, so that the file stays small.
Exact, for float32 log-probabilities: nothing is cut to the top few.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apportion.core.errors import InvalidParameter
from apportion.core.sampling_params import PromptReference
from apportion.evaluate.likelihood import (
    TOKENS_AT_ONCE,
    Progress,
    WindowScores,
    by_cluster,
    mean_nll,
    perplexity,
    resolve_window,
    score_slice,
    slices,
)
from apportion.evaluate.report import Report
from apportion.evaluate.statistics import Estimate, bootstrap, ratio
from apportion.evaluate.subject import Subject, describe, vocab_of
from apportion.evaluate.text import Window, cut_windows

SCRATCH_BYTES = 1 << 29


@dataclass(slots=True)
class Comparison:
    """The same windows under the reference and under a candidate."""

    reference: list[WindowScores]
    candidate: list[WindowScores]

    def metrics(self, seed: int = 0) -> dict[str, Estimate]:
        """nll_difference: candidate - reference in nats per token, paired. perplexity_ratio: exp of it. kl: mean KL(reference ||
        candidate) in nats. top1_agreement: how often both find the same token most likely. Intervals are paired: each resample
        draws documents (windows of a single document) for both models at once."""
        kls = [_kl_of(s) for s in self.candidate]
        rows = [
            (len(c.nll), (c.nll - r.nll).sum(), kl.sum(), (c.top == r.top).sum())
            for r, c, kl in zip(self.reference, self.candidate, kls, strict=True)
        ]
        clusters = by_cluster([s.window for s in self.candidate], np.array(rows, dtype=np.float64))
        flat = np.concatenate(kls)
        difference, kl, agreement = (bootstrap(clusters, ratio(i, 0), num=len(flat), seed=seed) for i in (1, 2, 3))
        return {
            "nll_difference": difference,
            "perplexity_ratio": perplexity(difference),
            "kl": kl,
            "kl_p99": Estimate(float(np.quantile(flat, 0.99)), num=len(flat)),
            "kl_max": Estimate(float(flat.max()), num=len(flat)),
            "top1_agreement": agreement,
            "nll": mean_nll(self.candidate, seed),
            "nll_reference": mean_nll(self.reference, seed),
        }


def compare(
    reference: Subject,
    candidates: Mapping[str, Subject],
    windows: Sequence[Window],
    *,
    scratch_bytes: int = SCRATCH_BYTES,
    scratch_folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Comparison]:
    """Score every window under the reference and each candidate.

    scratch_bytes: how large the file may get (one window of float32 [tokens, vocabulary] at least). scratch_folder: where, None for the
    system's own. Errors: InvalidParameter when the models do not share tokenizer and vocabulary.
    """
    vocab = vocab_of(reference)
    for name, candidate in candidates.items():
        check_same_tokens(reference, candidate, name)
    row_bytes = vocab * 4
    max_tokens = min(TOKENS_AT_ONCE, max(scratch_bytes // row_bytes, max(len(w.token_ids) for w in windows)))
    theirs: list[WindowScores] = []
    ours: dict[str, list[WindowScores]] = {name: [] for name in candidates}
    handle, path = tempfile.mkstemp(prefix="apportion-reference-", dir=scratch_folder)
    try:
        os.truncate(handle, max_tokens * row_bytes)
        for slice_ in slices(windows, max_tokens, progress):
            first_rows = np.cumsum([0, *(len(w.token_ids) - 1 for w in slice_)]).tolist()
            references = [PromptReference(path, row, vocab) for row in first_rows[:-1]]
            theirs += score_slice(reference, slice_, references)
            references = [PromptReference(path, row, vocab, compare=True) for row in first_rows[:-1]]
            for name, candidate in candidates.items():
                ours[name] += score_slice(candidate, slice_, references)
    finally:
        os.close(handle)
        os.unlink(path)
    return {name: Comparison(theirs, scores) for name, scores in ours.items()}


def comparison_report(
    reference: Subject,
    candidate: Subject,
    documents: Sequence[str],
    *,
    floor: Subject | None = None,
    window: int | None = None,
    stride: int | None = None,
    seed: int = 0,
    scratch_folder: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """What `candidate` loses against `reference` on texts.

    floor: the reference at another float precision, for the A/A run: what rounding alone does. It may be the candidate itself.
    """
    window = min(resolve_window(llm, window) for llm in (reference, candidate, floor or candidate))
    token_ids = [reference.tokenizer.encode(text) for text in documents]
    windows = cut_windows(token_ids, window, stride)
    models = {"candidate": candidate} | ({"floor": floor} if floor is not None and floor is not candidate else {})
    started = time.monotonic()
    found = compare(reference, models, windows, scratch_folder=scratch_folder, progress=progress)
    wall_s = time.monotonic() - started
    metrics = {name: comparison.metrics(seed) for name, comparison in found.items()}
    return Report(
        task="compare",
        subject=describe(candidate),
        reference=describe(reference),
        metrics=metrics["candidate"],
        floor=metrics["candidate"] if floor is candidate else metrics.get("floor", {}),
        loss="nll_difference",
        cells=[{"model": name, **row} for name, comparison in found.items() for row in _quantiles(comparison)],
        settings={"window": window, "stride": stride or window, "num_documents": len(documents), "num_tokens": sum(map(len, token_ids))},
        seeds={"bootstrap": seed},
        wall_s=wall_s,
        num_tokens=sum(len(w.token_ids) for w in windows) * (1 + len(models)),
    )


def _quantiles(comparison: Comparison) -> list[dict[str, float]]:
    """The KL that a fraction of all positions stays below."""
    kl = np.concatenate([_kl_of(s) for s in comparison.candidate])
    return [{"quantile": q, "kl": float(np.quantile(kl, q))} for q in (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)]


def check_same_tokens(reference: Subject, candidate: Subject, name: str = "candidate") -> None:
    """Errors: InvalidParameter unless token ids mean the same to both models."""
    if vocab_of(candidate) != vocab_of(reference):
        raise InvalidParameter(
            f"the {name} has a vocabulary of {vocab_of(candidate)} tokens and the reference one of {vocab_of(reference)}"
        )
    if candidate.tokenizer.backend.get_vocab() != reference.tokenizer.backend.get_vocab():
        raise InvalidParameter(f"the {name} has another tokenizer than the reference: their token ids do not mean the same")


def _kl_of(scores: WindowScores) -> np.ndarray:
    if scores.kl is None:
        raise InvalidParameter("these scores were made without a reference: use compare()")
    return scores.kl
