"""Models at test size: the bundled one, whole and briefly; and one of random weights where only shapes count."""

from __future__ import annotations

import pytest

from apportion import LLM

SMALL = {"kv_cache_memory": 2**26, "num_threads": 1}


@pytest.fixture(scope="package")
def llm():
    with LLM(dtype="float32", **SMALL) as llm:
        yield llm
        llm.engine.check_integrity()


@pytest.fixture(scope="package")
def llm_bf16():
    with LLM(dtype="bfloat16", max_num_batched_tokens=96, **SMALL) as llm:
        yield llm
        llm.engine.check_integrity()


@pytest.fixture(scope="session")
def prose():
    from apportion.assets import PASSAGE

    return PASSAGE.read_text()
