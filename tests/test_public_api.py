"""The face: what it exports, what importing it costs, and that it costs nothing until it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import apportion

EXPORTED = {
    "LLM",
    "ApportionError",
    "CompletionOutput",
    "EngineConfig",
    "LaneConfig",
    "Logprob",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
    "quantize",
}


def test_what_is_exported():
    assert set(apportion.__all__) == set(dir(apportion)) == EXPORTED
    assert all(getattr(apportion, name) is not None for name in EXPORTED)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = apportion.Nothing


def test_the_import_is_lazy():
    """Neither the import nor the help text pays for what they do not use (how long they take is a benchmark)."""
    heavy = "any(m in sys.modules for m in ('torch', 'numpy', 'tokenizers', 'transformers', 'rich', 'jinja2'))"
    help_text = "import apportion.cli.main as cli, contextlib, io\nwith contextlib.suppress(SystemExit): cli.main(['--help'])"
    for code in ("import apportion", help_text):
        done = subprocess.run([sys.executable, "-c", f"import sys\n{code}\nsys.exit({heavy})"], check=False, stdout=subprocess.DEVNULL)
        assert done.returncode == 0, code


def test_using_it_imports_no_transformers():
    code = "import sys; from apportion import LLM, SamplingParams; sys.exit('transformers' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
