"""Losses through the engine: those of transformers, whatever the windows, the batch and the way in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from apportion import LLM
from apportion.assets import DEFAULT_MODEL
from apportion.core.errors import InvalidParameter, NumericalError
from apportion.core.outputs import Logprob, RequestOutput
from apportion.evaluate.likelihood import WindowScores, _scores, by_cluster, nll, perplexity_report, score, slices
from apportion.evaluate.text import Window, cut_windows
from tests.unit.evaluate.conftest import SMALL


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bundled", "moe"])
def test_perplexity_is_that_of_transformers(name, dtype, mixture_model, shared_data):
    """5,000 tokens of WikiText-2 test in windows of 256, 192 apart, the whole way through the engine: NLL within 1e-3."""
    transformers = pytest.importorskip("transformers")
    folder = DEFAULT_MODEL if name == "bundled" else mixture_model
    text = (shared_data("text-wikitext2") / "test.txt").read_text()[:16_000]
    with LLM(folder, dtype=dtype, **SMALL) as llm:
        report = perplexity_report(llm, [text], window=256, stride=192)
        ids = llm.tokenizer.encode(text)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    losses, end = [], 0
    for start in range(0, len(ids), 192):
        piece = torch.tensor([ids[start : start + 256]])
        with torch.no_grad():
            each = torch.nn.functional.cross_entropy(reference(piece).logits[0, :-1], piece[0, 1:], reduction="none")
        losses += each[max(1, end - start) - 1 :].tolist()
        end = start + piece.shape[1]
        if end == len(ids):
            break
    found = report.metrics["nll"]
    assert found.num == len(losses) == len(ids) - 1 > 4000
    assert found.value == pytest.approx(np.mean(losses), abs=1e-3)
    assert report.metrics["perplexity"].value == pytest.approx(math.exp(found.value)) and found.low < found.value < found.high
    assert report.metrics["bits_per_byte"].value == pytest.approx(found.value * len(ids) / len(text.encode()) / math.log(2))
    assert report.num_tokens > len(ids) and report.subject["model"] == str(folder)


def test_texts_come_back_in_order_and_alone(llm, prose):
    texts = [prose[:300], prose[300:1500], "A", prose[1500:1600]]
    together = nll(llm, texts)
    assert [len(losses) for losses in together] == [len(llm.tokenizer.encode(text)) - 1 for text in texts]
    for text, losses in zip(texts, together, strict=True):
        if len(losses):
            assert nll(llm, text)[0].tolist() == losses.tolist()
    assert nll(llm, [llm.tokenizer.encode(texts[1])])[0].tolist() == together[1].tolist()


def test_a_window_is_all_the_model_sees(llm, prose):
    ids = llm.tokenizer.encode(prose[:2000])
    whole, cut = nll(llm, [ids])[0], nll(llm, [ids], window=64)[0]
    assert cut[:63].tolist() == whole[:63].tolist()
    assert nll(llm, [ids[64:128]])[0].tolist() == cut[63:126].tolist()


def test_slices_change_nothing(llm, prose, monkeypatch):
    windows = cut_windows([llm.tokenizer.encode(prose[:3000])], 100)
    whole = score(llm, windows)
    told = []
    monkeypatch.setattr("apportion.evaluate.likelihood.TOKENS_AT_ONCE", 250)
    cut = score(llm, windows, lambda done, total: told.append((done, total)))
    total = sum(len(w.token_ids) for w in windows)
    assert told[-1] == (total, total) and len(told) == -(-len(windows) // 2)
    for a, b in zip(whole, cut, strict=True):
        assert a.nll.tolist() == b.nll.tolist() and a.top.tolist() == b.top.tolist()
    assert [len(s) for s in slices(windows[:1], 10)] == [1] and list(slices([], 10)) == []


def test_documents_are_the_clusters(llm, prose):
    report = perplexity_report(llm, [prose[:800], prose[800:1000], prose[1000:2500]], window=64)
    assert report.metrics["nll"].num_clusters == 3
    single = perplexity_report(llm, [prose[:2500]], window=64)
    assert single.metrics["nll"].num_clusters == single.num_tokens // 64 + 1
    rows = by_cluster([Window(d, 0, [1, 2]) for d in (4, 7, 4)], np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert rows.tolist() == [[6.0, 8.0], [3.0, 4.0]]


def test_losses_by_position_add_up(llm, prose):
    report = perplexity_report(llm, [prose[:2500]], window=100, stride=50)
    assert sum(cell["num"] for cell in report.cells) == report.metrics["nll"].num
    total = sum(cell["num"] * cell["nll"] for cell in report.cells)
    assert total / report.metrics["nll"].num == pytest.approx(report.metrics["nll"].value)
    assert report.cells[0]["context_from"] == 1 and report.cells[-1]["context_to"] == 99
    assert report.cells[0]["nll"] > report.cells[-1]["nll"]  # context helps a trained model


def test_what_the_model_cannot_take_is_refused(llm, prose):
    with pytest.raises(InvalidParameter, match="a window of 99999 tokens does not fit: this model takes at most"):
        perplexity_report(llm, [prose], window=99999)
    with pytest.raises(InvalidParameter, match="less than one window"):
        perplexity_report(llm, ["too short"])


def test_a_loss_that_is_no_number_is_an_error():
    output = RequestOutput("0", None, [5, 6], prompt_logprobs=[None, {6: Logprob(float("nan"), 1)}])
    with pytest.raises(NumericalError, match="token 1 of document 3"):
        _scores(Window(3, 0, [5, 6]), output)


def test_the_top_token_is_told_apart_from_the_true_one():
    entries = [None, {6: Logprob(-2.0, 2), 9: Logprob(-0.5, 1)}, {7: Logprob(-0.1, 1)}]
    scores = _scores(Window(0, 0, [5, 6, 7]), RequestOutput("0", None, [5, 6, 7], prompt_logprobs=entries))
    assert isinstance(scores, WindowScores) and scores.nll.tolist() == [2.0, 0.1] and scores.top.tolist() == [9, 7] and scores.kl is None
