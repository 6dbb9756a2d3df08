"""AutoFP8's names over ours: `AutoFP8ForCausalLM.from_pretrained / quantize / save_quantized` and `BaseQuantizeConfig`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apportion.compress.quantize import quantize_checkpoint
from apportion.compress.recipe import Recipe
from apportion.core.errors import InvalidParameter


@dataclass(frozen=True, slots=True)
class BaseQuantizeConfig:
    """activation_scheme: 'static' (calibrated) or 'dynamic'. kv_cache_quant_targets: ('k_proj', 'v_proj') for scales of the cache."""

    quant_method: str = "fp8"
    activation_scheme: str = "static"
    ignore_patterns: Sequence[str] = field(default_factory=list)
    kv_cache_quant_targets: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.quant_method != "fp8":
            raise InvalidParameter(f"quant_method is {self.quant_method!r}; known: 'fp8'")
        if self.activation_scheme not in ("static", "dynamic"):
            raise InvalidParameter(f"activation_scheme is {self.activation_scheme!r}; known: 'static', 'dynamic'")
        if self.kv_cache_quant_targets is not None and sorted(self.kv_cache_quant_targets) != ["k_proj", "v_proj"]:
            raise InvalidParameter(f"kv_cache_quant_targets is {tuple(self.kv_cache_quant_targets)!r}; known: ('k_proj', 'v_proj')")


class AutoFP8ForCausalLM:
    """A model to be quantized. The work is done by `save_quantized`, layer by layer: a whole model is never held twice."""

    def __init__(self, model: str, quantize_config: BaseQuantizeConfig) -> None:
        self.config = quantize_config
        self._model = model
        self._tokens: list[list[int]] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, quantize_config: BaseQuantizeConfig) -> AutoFP8ForCausalLM:
        return cls(pretrained_model_name_or_path, quantize_config)

    def quantize(self, calibration_tokens: Any = None) -> None:
        """calibration_tokens: token ids [B, T], or what a transformers tokenizer returns: what its attention_mask hides is left out."""
        if calibration_tokens is None:
            if self.config.activation_scheme == "static" or self.config.kv_cache_quant_targets is not None:
                raise InvalidParameter("static scales need calibration tokens")
            self._tokens = []
            return
        by_name = isinstance(calibration_tokens, Mapping) or hasattr(calibration_tokens, "input_ids")
        ids = calibration_tokens["input_ids"] if by_name else calibration_tokens
        mask = calibration_tokens["attention_mask"] if by_name and "attention_mask" in calibration_tokens else None
        rows = [[int(token) for token in row] for row in ids]
        if mask is not None:
            rows = [[t for t, seen in zip(row, shown, strict=True) if int(seen)] for row, shown in zip(rows, mask, strict=True)]
        self._tokens = [row for row in rows if row]

    def save_quantized(self, save_dir: str | Path) -> None:
        """Write the checkpoint, in AutoFP8's layout. Errors: InvalidParameter before `quantize`, and as quantize_checkpoint."""
        if self._tokens is None:
            raise InvalidParameter("call quantize() before save_quantized()")
        static, kv_cache = self.config.activation_scheme == "static", self.config.kv_cache_quant_targets is not None
        recipe = Recipe.of(
            "fp8_static" if static else "fp8", ignore=("lm_head", *self.config.ignore_patterns), family="fp8", kv_cache=kv_cache
        )
        quantize_checkpoint(self._model, Path(save_dir), recipe, self._tokens)
