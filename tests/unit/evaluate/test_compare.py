"""Two models on one text: the engine's KL against one computed from whole logits, and what must come out as nothing."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from apportion import LLM
from apportion.core.errors import InvalidParameter
from apportion.evaluate.compare import Comparison, compare, comparison_report
from apportion.evaluate.likelihood import score
from apportion.evaluate.text import cut_windows
from tests.unit.evaluate.conftest import SMALL


@pytest.fixture(scope="module")
def windows(llm, prose):
    return cut_windows([llm.tokenizer.encode(text) for text in (prose[:900], prose[900:1300], prose[1300:2600])], 128, 96)


def test_kl_is_that_of_whole_distributions(llm, windows, bundled_model, tmp_path):
    """Against transformers, with a candidate that is far off: the same weights under noise."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(bundled_model, dtype=torch.float32, attn_implementation="eager").eval()
    noisy = transformers.AutoModelForCausalLM.from_pretrained(bundled_model, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    noisy.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model / name, tmp_path)
    with LLM(tmp_path, dtype="float32", max_num_batched_tokens=50, **SMALL) as candidate:
        found = compare(llm, {"noisy": candidate}, windows)["noisy"]
    for window, scores in zip(windows, found.candidate, strict=True):
        ids = torch.tensor([window.token_ids])
        with torch.no_grad():
            p, q = (model(ids).logits[0, :-1].double().log_softmax(-1)[window.num_context - 1 :] for model in (reference, noisy))
        expected = (p.exp() * (p - q)).sum(-1)
        assert scores.kl == pytest.approx(expected.numpy(), abs=2e-4) and scores.top.tolist() == q.argmax(-1).tolist()
    assert found.metrics()["kl"].value > 0.01


def test_a_model_is_no_distance_from_itself(llm, windows):
    """Bit for bit: on the CPU a token's numbers do not depend on the batch."""
    metrics = compare(llm, {"self": llm}, windows)["self"].metrics()
    assert metrics["kl"].value == metrics["kl_max"].value == metrics["nll_difference"].value == 0.0
    assert metrics["top1_agreement"].value == 1.0 and metrics["perplexity_ratio"].value == 1.0


def test_a_small_scratch_file_changes_nothing_and_is_removed(llm, llm_bf16, windows, tmp_path):
    whole = compare(llm, {"c": llm_bf16}, windows, scratch_folder=tmp_path)["c"]
    cut = compare(llm, {"c": llm_bf16}, windows, scratch_bytes=1, scratch_folder=tmp_path)["c"]
    assert list(tmp_path.iterdir()) == []
    for a, b in zip(whole.candidate, cut.candidate, strict=True):
        assert a.kl.tolist() == b.kl.tolist() and a.nll.tolist() == b.nll.tolist() and len(a.kl) == a.window.num_scored
    alone = score(llm_bf16, windows)
    assert [s.nll.tolist() for s in alone] == [s.nll.tolist() for s in whole.candidate]


def test_workers_of_their_own_give_the_same(llm, windows):
    """The file is what processes share; with two ranks both write the same rows."""
    with LLM(dtype="float32", tensor_parallel_size=2, kernels="reference", **SMALL | {"num_threads": 2}) as ranks:
        other_way = compare(ranks, {"c": llm}, windows[:3])["c"]
    this_way = compare(llm, {"c": llm}, windows[:3])["c"]
    for a, b in zip(other_way.candidate, this_way.candidate, strict=True):
        assert a.kl == pytest.approx(b.kl, abs=1e-6)


def test_the_floor_is_what_rounding_does(llm, llm_bf16, prose):
    report = comparison_report(llm, llm_bf16, [prose[:1500], prose[1500:3000]], floor=llm_bf16, window=128)
    assert report.loss == "nll_difference" and report.floor == report.metrics and report.reference["engine"]["dtype"] == "float32"
    assert 0 < report.metrics["kl"].value < 1e-3 and report.metrics["top1_agreement"].value > 0.98
    again = comparison_report(llm, llm, [prose[:1500], prose[1500:3000]], floor=llm_bf16, window=128)
    assert again.floor == report.metrics and again.metrics["kl"].value == 0.0
    assert report.subject["weight_bytes"] < report.reference["weight_bytes"]
    quantiles = [cell["kl"] for cell in report.cells if cell["model"] == "candidate"]
    assert quantiles == sorted(quantiles) and quantiles[-1] == report.metrics["kl_max"].value


def test_pairing_narrows_the_interval(llm, llm_bf16, windows):
    metrics = compare(llm, {"c": llm_bf16}, windows)["c"].metrics()
    own, paired = metrics["nll"], metrics["nll_difference"]
    assert paired.high - paired.low < (own.high - own.low) / 10
    assert paired.value == pytest.approx(own.value - metrics["nll_reference"].value)


def test_models_of_other_tokens_are_refused(llm, shared_data):
    with (
        LLM(shared_data("stories260K/hf"), **SMALL) as other,
        pytest.raises(InvalidParameter, match="vocabulary of 512 tokens and the ref"),
    ):
        compare(llm, {"candidate": other}, cut_windows([list(range(50))], 50))


def test_scores_without_a_reference_have_no_kl(llm, windows):
    scores = score(llm, windows[:2])
    with pytest.raises(InvalidParameter, match="without a reference"):
        Comparison(scores, scores).metrics()
    assert np.concatenate([s.nll for s in scores]).min() > 0
