"""What the combination tests declare, and the models they run."""

from __future__ import annotations

import pytest


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "combination(first, second, result): this test runs `first` together with `second`; docs/compatibility.md lists it"
    )


@pytest.fixture(scope="session")
def stories(shared_data):
    return shared_data("stories260K/hf")
