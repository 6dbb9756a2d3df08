"""Trained models on real text: the loss that transformers finds with the same weights."""

from __future__ import annotations

import pytest
import tokenizers
import torch


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_loss_on_text(name, kernels, shared_data, make_driver):
    """Mean negative log-likelihood of 2,560 tokens of WikiText-2 in windows of 256: that of transformers on the same weights."""
    transformers = pytest.importorskip("transformers")
    folder = shared_data(f"models/{name}")
    text = (shared_data("text-wikitext2") / "valid.txt").read_text()[:40_000]
    ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    windows = [ids[first : first + 256] for first in range(0, 2560, 256)]
    driver = make_driver(folder, kernels, max_requests=len(windows))
    ours = driver.step(windows, [0] * len(windows))
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    theirs = reference(torch.tensor(windows)).logits
    assert loss(ours.view(theirs.shape), windows) == pytest.approx(loss(theirs, windows), rel=1e-5)
    assert loss(theirs, windows) < 6.5  # the weights are trained: far from the ln(4096) = 8.3 of a guess


def loss(logits: torch.Tensor, windows: list[list[int]]) -> float:
    targets = torch.tensor(windows)[:, 1:]
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).item()
