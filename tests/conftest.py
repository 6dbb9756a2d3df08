"""What tests share: where data outside the repository lies, and the bundled model."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import triton_interpreter

triton_interpreter.choose()
SHARED_DATA = Path(os.environ.get("APPORTION_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def _same_draws_in_every_run():
    """A test that draws without a generator of its own draws the same numbers in every run: it passes always or never."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data():
    """A function from a relative path to the path in ../shared/data; the test is skipped where it is absent."""

    def find(relative: str) -> Path:
        path = SHARED_DATA / relative
        if not path.exists():
            pytest.skip(f"needs {relative} of ../shared/data (or APPORTION_SHARED_DATA)")
        return path

    return find


@pytest.fixture(scope="session")
def bundled_model() -> Path:
    from apportion.assets import DEFAULT_MODEL

    return DEFAULT_MODEL


@pytest.fixture(scope="session")
def mixture_model() -> Path:
    """The trained mixture of experts of the recipes: Qwen3-MoE, sixteen experts in every layer but the first."""
    return Path(__file__).resolve().parents[1] / "recipes" / "models" / "moe"
