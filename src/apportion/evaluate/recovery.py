"""What a compressed model keeps of its original's abilities: score / score over retrieval and questions, item by item."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from apportion.core.errors import InvalidParameter
from apportion.evaluate.answers import Answer, Item, accuracy, ask, by_task
from apportion.evaluate.likelihood import Progress
from apportion.evaluate.report import Report
from apportion.evaluate.statistics import Estimate, Statistic, bootstrap, ratio
from apportion.evaluate.subject import Subject, describe


def recovery(original: Sequence[Answer], candidate: Sequence[Answer], statistic: Statistic | None = None, seed: int = 0) -> Estimate:
    """Right answers of the candidate over those of the original, on the same items; pairs are resampled together.

    1: nothing is lost; above 1 happens by chance. None where the original answers nothing right.
    """
    if [a.item for a in original] != [a.item for a in candidate]:
        raise InvalidParameter("recovery needs the answers of both models to the same items, in the same order")
    pairs = np.array([(c.is_right, o.is_right) for c, o in zip(candidate, original, strict=True)], dtype=np.float64)
    return bootstrap(pairs, statistic or ratio(), num=len(pairs), seed=seed)


def recovery_report(
    original: Subject, candidate: Subject, items: Sequence[Item], *, seed: int = 0, progress: Progress | None = None
) -> Report:
    """Overall and for each task, with both scores. score_lost: 1 - recovery, the loss."""
    started = time.monotonic()
    theirs, ours = ask(original, items, progress), ask(candidate, items, progress)
    wall_s = time.monotonic() - started
    metrics = {
        "recovery": recovery(theirs, ours, seed=seed),
        "score_lost": recovery(theirs, ours, lambda totals: 1 - ratio()(totals), seed),
        "score": accuracy(ours),
        "score_original": accuracy(theirs),
    }
    cells, notes = [], []
    for (task, their), own in zip(by_task(theirs).items(), by_task(ours).values(), strict=True):
        kept = recovery(their, own, seed=seed)
        metrics[f"recovery_{task}"] = kept
        cells.append(
            {"task": task, "score": accuracy(own).as_dict(), "score_original": accuracy(their).as_dict(), "recovery": kept.as_dict()}
        )
        if not any(answer.is_right for answer in their):
            notes.append(f"{task}: the original answers none of {len(their)} items right, so nothing can be said of what is kept")
    return Report(
        task="recovery",
        subject=describe(candidate),
        reference=describe(original),
        metrics=metrics,
        loss="score_lost",
        cells=cells,
        notes=notes,
        settings={"num_items": len(items), "tasks": list(by_task(ours))},
        seeds={"bootstrap": seed},
        samples=[{**o.as_row(), "text_original": t.text, "right_original": t.is_right} for o, t in zip(ours, theirs, strict=True)],
        wall_s=wall_s,
        num_tokens=2 * sum(len(item.prompt) for item in items),
    )
