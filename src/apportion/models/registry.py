"""Architecture name (config.json's `architectures`) to the class that spells it: one line each."""

from __future__ import annotations

from apportion.core.registry import Registry
from apportion.models.interface import CausalLM

MODELS: Registry[type[CausalLM]] = Registry(
    "architecture",
    {
        "LlamaForCausalLM": "apportion.models.llama:LlamaForCausalLM",
        "MistralForCausalLM": "apportion.models.llama:LlamaForCausalLM",
        "Qwen2ForCausalLM": "apportion.models.llama:LlamaForCausalLM",
        "Qwen3ForCausalLM": "apportion.models.llama:LlamaForCausalLM",
    },
)
