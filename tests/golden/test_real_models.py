"""Trained models: the texts that their own projects publish, token for token."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105"])
def test_golden_text(name, kernels, shared_data, make_driver):
    cases = json.loads((shared_data(name) / "golden.json").read_text())["cases"]
    driver = make_driver(shared_data(name) / "hf", kernels)
    for case in cases:
        expected = case["output_ids"]
        assert driver.generate([case["prompt_ids"]], len(expected)) == [expected]
