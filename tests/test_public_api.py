"""The face: what it exports, what importing it costs, and that it costs nothing until it is used."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import apportion

EXPORTED = {"LLM", "ApportionError", "CompletionOutput", "EngineConfig", "Logprob", "RequestOutput", "SamplingParams", "__version__"}


def test_what_is_exported():
    assert set(apportion.__all__) == set(dir(apportion)) == EXPORTED
    assert all(getattr(apportion, name) is not None for name in EXPORTED)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = apportion.Nothing


def test_the_import_is_lazy():
    code = "import sys, apportion; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'tokenizers', 'transformers', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_using_it_imports_no_transformers():
    code = "import sys; from apportion import LLM, SamplingParams; sys.exit('transformers' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("arguments", "limit_s"), [(["-c", "import apportion"], 0.2), (["-m", "apportion.cli.main", "--help"], 0.4)])
def test_it_is_quick(arguments, limit_s):
    """Above what the interpreter itself takes; the best of several, as other work runs beside the tests."""

    def best(command: list[str]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(arguments) - best(["-c", "pass"]) < limit_s
