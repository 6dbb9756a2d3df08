"""What tests share: where data outside the repository lies, and the bundled model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import triton_interpreter

triton_interpreter.choose()
SHARED_DATA = Path(os.environ.get("APPORTION_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


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
