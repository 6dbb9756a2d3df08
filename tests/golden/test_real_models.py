"""Trained models: the texts that their own projects publish, token for token."""

from __future__ import annotations

import json

import pytest

from apportion.core.sampling_params import SamplingParams
from tests.combinations.harness import Setup, running


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105"])
def test_golden_text(name, kernels, shared_data):
    cases = json.loads((shared_data(name) / "golden.json").read_text())["cases"]
    with running(Setup(model=shared_data(name) / "hf", kernels=kernels)) as run:
        for case in cases:
            params = SamplingParams(temperature=0.0, max_tokens=len(case["output_ids"]), ignore_eos=True)
            (result,) = run.generate([case["prompt_ids"]], params)
            assert list(result.token_ids) == case["output_ids"]
