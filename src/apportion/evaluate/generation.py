"""Free-running text, judged: a model writes on from a prompt and the full-precision model says how likely it finds that text.

Errors that stay small under teacher forcing add up when a model reads its own output; and what a likelihood alone would praise, text
that repeats itself, is counted beside it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apportion.core.errors import InvalidParameter
from apportion.core.sampling_params import SamplingParams
from apportion.evaluate.compare import check_same_tokens
from apportion.evaluate.likelihood import Progress, WindowScores, score
from apportion.evaluate.report import Report
from apportion.evaluate.statistics import Estimate, bootstrap, ratio, wilson
from apportion.evaluate.subject import Subject, describe, max_model_len, run_batch
from apportion.evaluate.text import Window

NGRAM = 4
LOOP_LEN, LONGEST_PERIOD = 64, 32  # a text loops when its last LOOP_LEN tokens repeat with a period of at most LONGEST_PERIOD


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model wrote after a prompt. logprobs: its own, of each token; ended: by its end token."""

    prompt: Sequence[int]
    token_ids: Sequence[int]
    text: str
    logprobs: np.ndarray
    ended: bool


def write(llm: Subject, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float, seed: int) -> list[Continuation]:
    """Continue every prompt; prompt i draws from seed + i, so that two models meet the same chance."""
    params = [SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed + i, logprobs=0) for i in range(len(prompts))]
    found = []
    for output in run_batch(llm, prompts, params):
        [completion] = output.outputs
        logprobs = [entries[token].logprob for token, entries in zip(completion.token_ids, completion.logprobs or [], strict=True)]
        ended = completion.finish_reason == "stop"
        found.append(Continuation(output.prompt_token_ids, completion.token_ids, completion.text, np.array(logprobs), ended))
    return found


def cut_prompts(documents: Sequence[Sequence[int]], num_prompts: int, prompt_len: int) -> list[list[int]]:
    """Pieces of prompt_len tokens from places spread evenly over all documents. Errors: InvalidParameter where there are too few."""
    if num_prompts < 1 or prompt_len < 1:
        raise InvalidParameter(f"num_prompts and prompt_len must be at least 1, got {num_prompts} and {prompt_len}")
    pieces = [list(tokens[i : i + prompt_len]) for tokens in documents for i in range(0, len(tokens) - prompt_len + 1, prompt_len)]
    if len(pieces) < num_prompts:
        raise InvalidParameter(f"the text has {len(pieces)} pieces of {prompt_len} tokens, less than {num_prompts} prompts")
    return [pieces[i * len(pieces) // num_prompts] for i in range(num_prompts)]


def repetition(token_ids: Sequence[int]) -> tuple[int, int]:
    """(4-grams that stood in the text before, 4-grams)."""
    grams = [tuple(token_ids[i : i + NGRAM]) for i in range(len(token_ids) - NGRAM + 1)]
    return len(grams) - len(set(grams)), len(grams)


def is_looping(token_ids: Sequence[int]) -> bool:
    """Whether the text ends in the same few tokens over and over."""
    tail = list(token_ids[-LOOP_LEN:])
    return len(tail) == LOOP_LEN and any(tail[period:] == tail[:-period] for period in range(1, LONGEST_PERIOD + 1))


def generation_report(
    judge: Subject,
    candidate: Subject,
    documents: Sequence[str],
    *,
    num_prompts: int = 32,
    prompt_len: int = 64,
    max_tokens: int = 512,
    temperature: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """The candidate's text and the judge's own, from the same prompts and seeds, both scored by the judge.

    judged_nll: nats per token of the candidate's text; judged_nll_difference: against own_nll, that of the judge's text, paired by prompt.
    repetition: 4-grams that stood in the same text before; looping: texts that end in a cycle; empty: texts of nothing visible; ended: by
    the end token; each also of the judge's (own_*). same_until: tokens from the start in which both agree. At temperature 1
    kl_on_path is the mean of log candidate - log judge on the candidate's text: an unbiased estimate of its KL to the judge per token.
    """
    check_same_tokens(judge, candidate)
    longest = min(max_model_len(judge), max_model_len(candidate)) - 1
    if prompt_len + max_tokens > longest:
        raise InvalidParameter(
            f"prompts of {prompt_len} tokens and {max_tokens} of output do not fit: these models take {longest} to be scored"
        )
    prompts = cut_prompts([judge.tokenizer.encode(text) for text in documents], num_prompts, prompt_len)
    started = time.monotonic()
    ours, theirs = (write(llm, prompts, max_tokens=max_tokens, temperature=temperature, seed=seed) for llm in (candidate, judge))
    scores = score(judge, [Window(i, 0, [*c.prompt, *c.token_ids], prompt_len) for i, c in enumerate([*ours, *theirs])], progress)
    wall_s = time.monotonic() - started
    judged = {s.window.document: s for s in scores}
    ours_judged, theirs_judged = ([judged[i] for i in range(n, n + num_prompts)] for n in (0, num_prompts))
    metrics = _likelihoods(ours, ours_judged, theirs_judged, temperature, seed) | _shapes(ours, seed)
    metrics |= {f"own_{name}": estimate for name, estimate in _shapes(theirs, seed).items()}
    metrics["same_until"] = _per_prompt([_common_len(a.token_ids, b.token_ids) for a, b in zip(ours, theirs, strict=True)], seed)
    return Report(
        task="generate",
        subject=describe(candidate),
        reference=describe(judge),
        metrics=metrics,
        loss="kl_on_path" if "kl_on_path" in metrics else "judged_nll_difference",
        settings={"num_prompts": num_prompts, "prompt_len": prompt_len, "max_tokens": max_tokens, "temperature": temperature},
        seeds={"first_prompt": seed, "bootstrap": seed},
        samples=[_row(c, s, judge) for c, s in zip(ours, ours_judged, strict=True)],
        cells=_by_position(ours_judged, theirs_judged, max_tokens),
        wall_s=wall_s,
        num_tokens=sum(len(c.token_ids) for c in [*ours, *theirs]) + sum(len(s.window.token_ids) for s in scores),
    )


def _likelihoods(
    ours: Sequence[Continuation], judged: Sequence[WindowScores], own: Sequence[WindowScores], temperature: float, seed: int
) -> dict[str, Estimate]:
    sums = np.array([(a.nll.sum(), len(a.nll), b.nll.sum(), len(b.nll)) for a, b in zip(judged, own, strict=True)], dtype=np.float64)
    tokens, own_tokens = int(sums[:, 1].sum()), int(sums[:, 3].sum())
    found = {
        "judged_nll": bootstrap(sums, ratio(0, 1), num=tokens, seed=seed),
        "own_nll": bootstrap(sums, ratio(2, 3), num=own_tokens, seed=seed),
        "judged_nll_difference": bootstrap(sums, lambda t: ratio(0, 1)(t) - ratio(2, 3)(t), num=tokens, seed=seed),
    }
    if temperature == 1.0:
        path = np.array([(c.logprobs.sum() + s.nll.sum(), len(s.nll)) for c, s in zip(ours, judged, strict=True)])
        found["kl_on_path"] = bootstrap(path, ratio(), num=tokens, seed=seed)
    return found


def _shapes(texts: Sequence[Continuation], seed: int) -> dict[str, Estimate]:
    """What can be said without a judge."""
    count = len(texts)
    repeated = np.array([repetition(c.token_ids) for c in texts], dtype=np.float64)
    return {
        "repetition": bootstrap(repeated, ratio(), num=int(repeated[:, 1].sum()), seed=seed),
        "looping": wilson(sum(is_looping(c.token_ids) for c in texts), count),
        "empty": wilson(sum(not c.text.strip() for c in texts), count),
        "ended": wilson(sum(c.ended for c in texts), count),
        "length": _per_prompt([len(c.token_ids) for c in texts], seed),
    }


def _per_prompt(values: Sequence[float], seed: int) -> Estimate:
    return bootstrap(np.array([(value, 1) for value in values], dtype=np.float64), ratio(), num=len(values), seed=seed)


def _common_len(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _by_position(judged: Sequence[WindowScores], own: Sequence[WindowScores], max_tokens: int) -> list[dict[str, float | str | int]]:
    """Judged NLL in sixteenths of the output: whether a model drifts as it reads more of itself."""
    rows: list[dict[str, float | str | int]] = []
    width = max(1, max_tokens // 16)
    for name, scores in (("candidate", judged), ("judge", own)):
        for first in range(0, max_tokens, width):
            losses = np.concatenate([s.nll[first : first + width] for s in scores])
            if len(losses):
                rows.append({"text_of": name, "position": first, "nll": float(losses.mean()), "num": len(losses)})
    return rows


def _row(continuation: Continuation, scores: WindowScores, judge: Subject) -> dict[str, object]:
    return {
        "prompt": judge.tokenizer.decode(continuation.prompt),
        "text": continuation.text,
        "num_tokens": len(continuation.token_ids),
        "judged_nll": float(scores.nll.mean()),
        "ended": continuation.ended,
        "looping": is_looping(continuation.token_ids),
    }
