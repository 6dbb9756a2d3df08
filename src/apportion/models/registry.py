"""Architecture name (config.json's `architectures`) to the function that spells it: one line each."""

from __future__ import annotations

from collections.abc import Callable

from apportion.core.registry import Registry
from apportion.layers.site import Site
from apportion.models.interface import CausalLM

# architecture -> (pattern, replacement) by which quantization sections call projections as published checkpoints spell them
SPELLINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "MixtralForCausalLM": (
        (r"\.mlp\.experts\.(\d+)\.gate_proj$", r".block_sparse_moe.experts.\1.w1"),
        (r"\.mlp\.experts\.(\d+)\.up_proj$", r".block_sparse_moe.experts.\1.w3"),
        (r"\.mlp\.experts\.(\d+)\.down_proj$", r".block_sparse_moe.experts.\1.w2"),
        (r"\.mlp\.gate$", r".block_sparse_moe.gate"),
    ),
}

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
