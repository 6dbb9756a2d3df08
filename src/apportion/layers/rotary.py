"""Tables of rotary position embeddings (RoFormer, section 3.4) and their scalings, with the formulas of transformers' modeling_rope_utils.

Kernels rotate by rows of the table, so a scaling costs nothing at run time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apportion.core.model_spec import RopeSpec, yarn_mscale


def cos_sin_table(rope: RopeSpec, num_positions: int) -> Tensor:
    """float32 [num_positions, rotary_dim]: cosines in the first half of the columns, sines in the second."""
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None]
    if rope.scaling == "dynamic":
        angles, factor = angles * dynamic_frequencies(rope, num_positions), 1.0
    else:
        inv_freq, factor = inverse_frequencies(rope)
        angles = angles * inv_freq
    table = torch.empty(num_positions, rope.rotary_dim)
    half = rope.rotary_dim // 2
    torch.cos(angles, out=table[:, :half])
    torch.sin(angles, out=table[:, half:])
    return table.mul_(factor) if factor != 1.0 else table


def inverse_frequencies(rope: RopeSpec) -> tuple[Tensor, float]:
    """The angle per position of each pair of channels, [rotary_dim / 2], and the factor on cosines and sines."""
    inv_freq = _frequencies(rope.theta, rope.rotary_dim)
    if rope.scaling == "linear":
        return inv_freq / rope.parameters["factor"], 1.0
    if rope.scaling == "llama3":
        return _llama3(inv_freq, rope.parameters), 1.0
    if rope.scaling == "yarn":
        return _yarn(rope)
    return inv_freq, 1.0


def dynamic_frequencies(rope: RopeSpec, num_positions: int) -> Tensor:
    """Dynamic NTK scaling, [num_positions, rotary_dim / 2]: position p turns by the base for a context of p + 1 tokens.

    That is what transformers does when tokens come one by one. There a prompt that is longer than the original context is rotated by its
    final length; here each position has its own base, so that a token's key never depends on how a prompt was cut into steps.
    """
    factor, original = rope.parameters["factor"], int(rope.parameters["original_max_position_embeddings"])
    dim = rope.rotary_dim
    context = torch.arange(1, num_positions + 1).clamp(min=original)
    base = rope.theta * ((factor * context / original) - (factor - 1)) ** (dim / (dim - 2))
    return _frequencies(base[:, None], dim)


def _frequencies(base: float | Tensor, dim: int) -> Tensor:
    exponents: Tensor = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return 1.0 / (base**exponents)


def _llama3(inv_freq: Tensor, p: dict[str, float]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    original = p["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    longest, shortest = original / p["low_freq_factor"], original / p["high_freq_factor"]
    scaled = torch.where(wavelength > longest, inv_freq / p["factor"], inv_freq)
    smooth = (original / wavelength - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"])
    between = (1 - smooth) * scaled / p["factor"] + smooth * scaled
    return torch.where((wavelength < shortest) | (wavelength > longest), scaled, between)


def _yarn(rope: RopeSpec) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071): interpolate slow pairs, keep fast ones, ramp between; cosines and sines grow by the attention factor."""
    p, dim = rope.parameters, rope.rotary_dim
    original = p["original_max_position_embeddings"]

    def turning_point(rotations: float) -> float:
        """The pair that turns `rotations` times over the original context."""
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = turning_point(p.get("beta_fast") or 32), turning_point(p.get("beta_slow") or 1)
    if p.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / ((high if high != low else high + 0.001) - low)).clamp(0, 1)
    frequencies = rope.theta ** (torch.arange(0, dim, 2).float() / dim)
    kept = 1 - ramp
    return 1.0 / (p["factor"] * frequencies) * (1 - kept) + 1.0 / frequencies * kept, yarn_attention_factor(p)


def yarn_attention_factor(p: dict[str, float]) -> float:
    if "attention_factor" in p:
        return p["attention_factor"]
    if p.get("mscale") and p.get("mscale_all_dim"):
        return yarn_mscale(p["factor"], p["mscale"]) / yarn_mscale(p["factor"], p["mscale_all_dim"])
    return yarn_mscale(p["factor"])
