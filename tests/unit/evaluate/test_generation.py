"""Free-running text: what repeats, what is empty, and a divergence that has a closed form where two distributions are known."""

from __future__ import annotations

import numpy as np
import pytest

from apportion import LLM, SamplingParams
from apportion.core.errors import InvalidParameter
from apportion.evaluate.generation import cut_prompts, generation_report, is_looping, repetition, write
from tests.unit.evaluate.conftest import SMALL


@pytest.mark.parametrize(
    ("tokens", "repeated", "total", "loops"),
    [
        ([1, 2, 3], 0, 0, False),
        (range(100), 0, 97, False),
        ([7] * 70, 66, 67, True),
        ([7] * 63, 59, 60, False),  # too short to tell
        ([*range(50), *([1, 2, 3] * 30)], 84, 137, True),
        ([*([1, 2, 3] * 30), *range(100, 140)], 84, 127, False),  # it got out
        (list(range(33)) * 3, 63, 96, False),  # longer than the longest period
    ],
)
def test_repetition(tokens, repeated, total, loops):
    assert repetition(tokens) == (repeated, total) and is_looping(tokens) == loops


def test_prompts_are_spread_over_the_documents():
    documents = [list(range(100)), list(range(1000, 1005)), list(range(2000, 2100))]
    prompts = cut_prompts(documents, 4, 10)
    assert prompts == [list(range(10)), list(range(50, 60)), list(range(2000, 2010)), list(range(2050, 2060))]
    with pytest.raises(InvalidParameter, match="has 20 pieces of 10 tokens, less than 21 prompts"):
        cut_prompts(documents, 21, 10)
    with pytest.raises(InvalidParameter, match="at least 1"):
        cut_prompts(documents, 0, 10)


def test_a_model_agrees_with_itself(llm, prose):
    report = generation_report(llm, llm, [prose[:6000]], num_prompts=4, prompt_len=16, max_tokens=48)
    metrics = report.metrics
    assert metrics["kl_on_path"].value == pytest.approx(0.0, abs=1e-6) and metrics["judged_nll_difference"].value == 0.0
    assert metrics["same_until"].value == metrics["length"].value and report.loss == "kl_on_path" and len(report.samples) == 4
    assert metrics["judged_nll"].value == metrics["own_nll"].value > 0.5 and metrics["empty"].num == 4
    assert {cell["text_of"] for cell in report.cells} == {"candidate", "judge"}


def test_the_judge_reads_what_was_written(llm, llm_bf16, prose):
    """Scoring a text teacher-forced gives the log-probabilities that its writer had while writing it."""
    prompts = cut_prompts([llm.tokenizer.encode(prose[:5000])], 3, 24)
    texts = write(llm, prompts, max_tokens=40, temperature=1.0, seed=5)
    report = generation_report(llm, llm_bf16, [prose[:5000]], num_prompts=3, prompt_len=24, max_tokens=40, seed=5)
    total = sum(len(t.token_ids) for t in texts)
    assert report.metrics["own_nll"].value == pytest.approx(-sum(t.logprobs.sum() for t in texts) / total, rel=1e-5)
    assert report.metrics["kl_on_path"].value == pytest.approx(0.0, abs=2e-3)
    greedy = generation_report(llm, llm, [prose[:5000]], num_prompts=2, prompt_len=24, max_tokens=8, temperature=0.0)
    assert "kl_on_path" not in greedy.metrics and greedy.loss == "judged_nll_difference"


def test_the_divergence_on_the_path_is_kl(llm, prose):
    """A candidate whose distribution is known: the judge's own at half the temperature, one token after each of many prompts."""

    class Sharper:
        """Samples at temperature 1/2 and reports those log-probabilities, as a model with doubled logits would."""

        def __getattr__(self, name):
            return getattr(llm, name)

        def generate(self, prompts, params):
            sharper = [SamplingParams(temperature=0.5, max_tokens=p.max_tokens, seed=p.seed, logprobs=-1, detokenize=False) for p in params]
            outputs = llm.generate(prompts, sharper)
            for output in outputs:
                [entries] = output.outputs[0].logprobs
                weights = {token: 2 * entry.logprob for token, entry in entries.items()}
                norm = np.logaddexp.reduce(list(weights.values()))
                expected.append(sum(np.exp(w - norm) * (w - norm - entries[t].logprob) for t, w in weights.items()))
                for token, entry in entries.items():
                    entry.logprob = weights[token] - norm
            return outputs

    expected: list[float] = []
    report = generation_report(llm, Sharper(), [prose[:30_000]], num_prompts=200, prompt_len=8, max_tokens=1)
    found = report.metrics["kl_on_path"]
    assert len(expected) == 200 and found.low < np.mean(expected) < found.high and found.high - found.low < np.mean(expected)


def test_what_does_not_fit_is_refused(llm, prose, shared_data):
    with pytest.raises(InvalidParameter, match="prompts of 64 tokens and 99999 of output do not fit"):
        generation_report(llm, llm, [prose], max_tokens=99999)
    with LLM(shared_data("stories260K/hf"), **SMALL) as other, pytest.raises(InvalidParameter, match="vocabulary"):
        generation_report(llm, other, [prose])
