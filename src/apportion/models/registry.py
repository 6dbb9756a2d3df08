"""Architecture name (config.json's `architectures`) to the function that spells it: one line each."""

from __future__ import annotations

from collections.abc import Callable

from apportion.core.registry import Registry
from apportion.layers.site import Site
from apportion.models.interface import CausalLM

MODELS: Registry[Callable[[Site], CausalLM]] = Registry(
    "architecture",
    {
        "LlamaForCausalLM": "apportion.models.llama:llama",
        "MistralForCausalLM": "apportion.models.llama:llama",
        "Qwen2ForCausalLM": "apportion.models.llama:llama",
        "Qwen3ForCausalLM": "apportion.models.llama:llama",
        "MixtralForCausalLM": "apportion.models.mixtral:mixtral",
        "Qwen2MoeForCausalLM": "apportion.models.qwen_moe:qwen_moe",
        "Qwen3MoeForCausalLM": "apportion.models.qwen_moe:qwen_moe",
        "DeepseekV2ForCausalLM": "apportion.models.deepseek:deepseek_v2",
    },
)
