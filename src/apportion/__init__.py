"""apportion runs large language models fast on the hardware at hand.

The face: `LLM` and what goes into it and comes out of it. Names resolve on first use, so that the import itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apportion.core.config import EngineConfig, LaneConfig
    from apportion.core.errors import ApportionError
    from apportion.core.outputs import CompletionOutput, Logprob, RequestOutput
    from apportion.core.sampling_params import SamplingParams
    from apportion.llm import LLM

__version__ = "0.1.0"

_HOMES = {
    "LLM": "apportion.llm",
    "SamplingParams": "apportion.core.sampling_params",
    "EngineConfig": "apportion.core.config",
    "LaneConfig": "apportion.core.config",
    "RequestOutput": "apportion.core.outputs",
    "CompletionOutput": "apportion.core.outputs",
    "Logprob": "apportion.core.outputs",
    "ApportionError": "apportion.core.errors",
}

__all__ = [
    "LLM",
    "ApportionError",
    "CompletionOutput",
    "EngineConfig",
    "LaneConfig",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'apportion' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
