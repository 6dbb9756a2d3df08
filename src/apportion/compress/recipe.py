"""What is done to which projections: a recipe, from a few words or from a YAML file in llm-compressor's terms.

It knows names, schemes and methods; it must not know tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from apportion.core.errors import InvalidParameter, Unsupported
from apportion.core.number_format import Scheme
from apportion.quant.schemes.compressed_tensors import activation_format, target_pattern, weight_format
from apportion.quant.section import Section, kv_cache_format, names_pattern
from apportion.quant.writing import FAMILIES

# What `--scheme` takes beside schemes' own names; {tag}: of the model's dtype, in which the scales of groups are kept.
PRESETS = {
    "fp8": "e4m3_channel@e4m3_token", "fp8_dynamic": "e4m3_channel@e4m3_token", "fp8_static": "e4m3_tensor@e4m3_static",
    "fp8_block": "e4m3_b128x128@e4m3_g128", "w8a8": "int8_channel@int8_token", "int8": "int8_channel@int8_token", "w8a16": "int8_channel",
    "w4a16": "int4_g128{tag}", "w4a16_asym": "int4_g128_zp{tag}", "w3a16": "int3_g128{tag}", "w2a16": "int2_g64_zp{tag}",
}  # fmt: skip
# What llm-compressor means by its presets' names, which is not always the same.
THEIR_PRESETS = {
    "FP8": PRESETS["fp8_static"], "FP8_DYNAMIC": PRESETS["fp8"], "FP8_BLOCK": PRESETS["fp8_block"], "W8A8": PRESETS["w8a8"],
    "INT8": PRESETS["w8a8"], "W4A16_ASYM": PRESETS["w4a16_asym"], "W4AFP8": "int4_g128{tag}@e4m3_token",
    **{f"W{bits}A16": f"int{bits}_g128{{tag}}" for bits in range(2, 9)},
    **{f"W{bits}A8": f"int{bits}_g128{{tag}}@int8_token" for bits in range(2, 8)},
}  # fmt: skip
TAGS = {"float32": "", "bfloat16": "_bf16", "float16": "_f16"}
METHODS = {"rtn": ("", "nearest"), "gptq": ("", "gptq"), "awq": ("awq", "clipped"), "smoothquant": ("smoothquant", "nearest")}
DAMPING = 0.01  # GPTQ's, of the mean curvature
STRENGTH = 0.5  # SmoothQuant's alpha


@dataclass(frozen=True, slots=True)
class Step:
    """What becomes of the projections that `targets` names ("Linear": all) and `ignore` does not. rounding: 'nearest', 'gptq', or
    'clipped' (to nearest, ranges narrowed where that costs less). scheme: may hold {tag}."""

    scheme: str
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()
    rounding: str = "nearest"
    damping: float = DAMPING

    def takes(self, *names: str) -> bool:
        """names: by which the one projection goes."""
        ignored = names_pattern(self.ignore)
        named = any(target == "Linear" or re.match(target_pattern(target), name) for target in self.targets for name in names)
        return named and not (ignored and any(re.match(ignored, name) for name in names))


@dataclass(frozen=True, slots=True)
class Recipe:
    """steps: the first that takes a projection has it. moving: what first moves scales from inputs into the norms before them, '',
    'awq' or 'smoothquant' (with `strength`). family: of the files written. kv_cache: calibrate scales for a float8 KV cache."""

    steps: tuple[Step, ...]
    moving: str = ""
    strength: float = STRENGTH
    family: str = "compressed-tensors"
    kv_cache: bool = False

    @classmethod
    def of(cls, scheme: str, method: str = "rtn", ignore: Sequence[str] = ("lm_head",), **rest: Any) -> Recipe:
        """One scheme for all. scheme: a name of PRESETS or of a scheme. Errors: InvalidParameter for a method that is not known."""
        if method not in METHODS:
            raise InvalidParameter(f"unknown method {method!r}; known: {', '.join(METHODS)}")
        moving, rounding = METHODS[method]
        return cls((Step(PRESETS.get(scheme.lower(), scheme), ignore=tuple(ignore), rounding=rounding),), moving, **rest)

    @property
    def method(self) -> str:
        """A name of METHODS, or all that is done: 'smoothquant+gptq'."""
        roundings = dict.fromkeys(step.rounding for step in self.steps)
        simple = next((name for name, (moving, rounding) in METHODS.items() if (self.moving, [rounding]) == (moving, [*roundings])), None)
        return simple or "+".join([*filter(None, [self.moving]), *("rtn" if r == "nearest" else r for r in roundings)])

    @property
    def needs_hessian(self) -> bool:
        return self.moving == "awq" or any(step.rounding != "nearest" for step in self.steps)

    def needs_tokens(self, schemes: Mapping[str, tuple[Scheme, Step]]) -> bool:
        static = any(scheme.activation is not None and scheme.activation.scale == "static" for scheme, _ in schemes.values())
        return self.needs_hessian or bool(self.moving) or self.kv_cache or static

    def schemes(
        self, names: Sequence[str], linears: Sequence[str], dtype: str, published: Callable[[str], str] = str
    ) -> dict[str, tuple[Scheme, Step]]:
        """The scheme and step of each projection that is quantized. names: of those that can be; linears: of all that the checkpoint
        has; published: what a recipe may call them, too. Errors: InvalidParameter for what has no meaning together, and for an entry that
        names no linear."""
        if self.family not in FAMILIES:
            raise InvalidParameter(f"unknown format {self.family!r}; known: {', '.join(FAMILIES)}")
        parsed = [(self._parsed(step, dtype), step) for step in self.steps]
        for step in self.steps:
            for entry in {*step.targets, *step.ignore} - {"Linear"}:
                pattern = names_pattern([entry]) if entry in step.ignore else target_pattern(entry)
                if not any(re.match(pattern, spelt) for name in {*names, *linears} for spelt in (name, published(name))):
                    raise InvalidParameter(f"the recipe names {entry!r}, and no linear of the model is called so")
        found = {}
        for name in names:
            if (taken := next((pair for pair in parsed if pair[1].takes(name, published(name))), None)) is not None:
                found[name] = taken
        return found

    def _parsed(self, step: Step, dtype: str) -> Scheme:
        scheme = Scheme.parse(step.scheme.format(tag=TAGS[dtype]))
        if self.family == "fp8" and scheme.weight.scale == "channel":  # its files have one scale for a tensor
            scheme = Scheme(replace(scheme.weight, scale="tensor", block=(0, 0)), scheme.activation)
        if self.moving == "smoothquant" and scheme.activation is None:
            raise InvalidParameter(f"smoothquant moves outliers of inputs, which {scheme.name} does not round")
        return scheme


def read_recipe(path: Path, family: str = "compressed-tensors") -> Recipe:
    """A recipe of stages and modifiers: SmoothQuantModifier, AWQModifier, GPTQModifier, QuantizationModifier, with llm-compressor's fields.
    What names its targets comes before what takes all linears.

    Errors: InvalidParameter for a file that cannot be read; Unsupported or CheckpointError naming the key that is not understood.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidParameter(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    recipe = Recipe((), family=family)
    for name, fields in _modifiers(Section(content, str(path))):
        if name not in MODIFIERS:
            raise Unsupported(f"{fields.path} is no modifier that is known: {', '.join(MODIFIERS)}")
        if name in ("SmoothQuantModifier", "AWQModifier") and (recipe.moving or recipe.steps):
            raise Unsupported(f"{fields.path} moves scales, which one modifier may do, before any other rounds")
        recipe = MODIFIERS[name](recipe, fields)
        fields.close()
    if not recipe.steps:
        raise InvalidParameter(f"recipe {path} quantizes nothing: it has no {', '.join(list(MODIFIERS)[1:])} with a scheme")
    named_first = sorted(recipe.steps, key=lambda step: "Linear" in step.targets)
    return replace(recipe, steps=tuple(named_first))


def _modifiers(section: Section) -> Iterator[tuple[str, Section]]:
    """In order, whether they stand alone, in `.._modifiers`, or in the `.._modifiers` of a `.._stage`."""
    for key, value in section.parts():
        part = Section(value, f"{section.path}: {key}")
        if key.endswith("_stage"):
            part.choice("run_type", ("oneshot",), "oneshot")
            yield from _modifiers(part)
        elif key.endswith("_modifiers"):
            yield from _modifiers(part)
        else:
            yield key, part


def _smooth(recipe: Recipe, fields: Section) -> Recipe:
    return replace(recipe, moving="smoothquant", strength=_share(fields, "smoothing_strength", STRENGTH))


def _awq(recipe: Recipe, fields: Section) -> Recipe:
    fields.choice("duo_scaling", (False,), False)
    fields.choice("n_grid", (20,), 20)
    return _steps(replace(recipe, moving="awq"), fields, "clipped", DAMPING)


def _gptq(recipe: Recipe, fields: Section) -> Recipe:
    fields.choice("block_size", (128,), 128)
    fields.choice("sequential_update", (True,), True)
    fields.choice("actorder", ("static", "weight"), "static")
    fields.take("offload_hessians")
    return _steps(recipe, fields, "gptq", _share(fields, "dampening_frac", DAMPING))


def _nearest(recipe: Recipe, fields: Section) -> Recipe:
    return _steps(recipe, fields, "nearest", DAMPING)


MODIFIERS = {"SmoothQuantModifier": _smooth, "AWQModifier": _awq, "GPTQModifier": _gptq, "QuantizationModifier": _nearest}


def _steps(recipe: Recipe, fields: Section, rounding: str, damping: float) -> Recipe:
    """The recipe with what a modifier's `scheme` or `config_groups` ask for."""
    ignore, targets = tuple(_names(fields, "ignore")), tuple(_names(fields, "targets")) or ("Linear",)
    preset, groups, steps = fields.take("scheme"), fields.part("config_groups"), []
    if preset is not None:
        if not isinstance(preset, str) or preset.upper() not in THEIR_PRESETS:
            raise Unsupported(f"{fields.path}.scheme is {preset!r}; known: {', '.join(THEIR_PRESETS)}")
        steps.append(Step(THEIR_PRESETS[preset.upper()], targets, ignore, rounding, damping))
    for key, value in [] if groups is None else groups.parts():
        group = Section(value, f"{fields.path}.config_groups.{key}")
        weights, inputs = group.part("weights"), group.part("input_activations")
        if weights is None:
            raise Unsupported(f"{group.path}.weights is null; activations alone cannot be quantized")
        steps.append(Step(_scheme(weights, inputs), tuple(_names(group, "targets")) or targets, ignore, rounding, damping))
        group.close()
    return replace(recipe, steps=(*recipe.steps, *steps), kv_cache=recipe.kv_cache or kv_cache_format(fields) is not None)


def _scheme(weights: Section, inputs: Section | None) -> str:
    weights.choice("observer", ("minmax", "memoryless_minmax", "static_minmax"), "minmax")
    fmt = weight_format(weights, "")
    if fmt.permuted:
        raise Unsupported(f"{weights.path}.actorder is 'group'; known: 'static', 'weight', which need no order in the file")
    name = fmt.name + ("{tag}" if fmt.scale == "group" else "")
    return name if inputs is None else f"{name}@{activation_format(inputs).name}"


def _names(fields: Section, key: str) -> list[str]:
    value = fields.take(key, [])
    return Section({key: [value] if isinstance(value, str) else value}, fields.path).words(key)


def _share(fields: Section, key: str, default: float) -> float:
    value = fields.take(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise Unsupported(f"{fields.path}.{key} is {value!r}; it is a number from 0 to 1")
    return float(value)
