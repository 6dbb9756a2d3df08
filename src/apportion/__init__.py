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
    from apportion.core.pooling_params import PoolingParams
    from apportion.core.sampling_params import SamplingParams
    from apportion.core.structured_outputs import StructuredOutputsParams
    from apportion.llm import LLM
    from apportion.quantization import quantize

__version__ = "0.1.0"

_HOMES = {
    "LLM": "apportion.llm",
    "SamplingParams": "apportion.core.sampling_params",
    "StructuredOutputsParams": "apportion.core.structured_outputs",
    "PoolingParams": "apportion.core.pooling_params",
    "EngineConfig": "apportion.core.config",
    "LaneConfig": "apportion.core.config",
    "RequestOutput": "apportion.core.outputs",
    "CompletionOutput": "apportion.core.outputs",
    "Logprob": "apportion.core.outputs",
    "ApportionError": "apportion.core.errors",
    "quantize": "apportion.quantization",
}

__all__ = [
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
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'apportion' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
