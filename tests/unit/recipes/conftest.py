"""Recipes are scripts beside the package: tests import them by name."""

import importlib
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[3] / "recipes"


@pytest.fixture
def recipe(monkeypatch):
    """A function from a recipe's name to its module; recipes import one another as scripts do."""
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module


@pytest.fixture(autouse=True)
def gradients():
    """Workers of other tests turn gradients off in the thread they run in; training wants them."""
    torch = pytest.importorskip("torch")
    with torch.enable_grad():
        yield
