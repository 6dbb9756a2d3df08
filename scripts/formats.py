"""Write the tables of docs/quantization.md: formats by methods by devices, as the code has them.

python scripts/formats.py          write them between the page's markers
python scripts/formats.py --check  exit with status 1 if they are not up to date
"""

from __future__ import annotations

import sys

import torch
from pages import ROOT, with_part, write_or_check

from apportion.compress.recipe import METHODS, THEIR_PRESETS, Recipe
from apportion.compress.recipe import PRESETS as OFFLINE
from apportion.core.errors import InvalidParameter, Unsupported
from apportion.core.kv_spec import KV_FORMATS
from apportion.core.number_format import Scheme
from apportion.kernels.cpu.formats import obstacle
from apportion.kernels.dispatch import Capability, implementations
from apportion.kernels.reference.number_formats import quantize
from apportion.quant.checkpoint import PRESETS as ONLINE
from apportion.quant.checkpoint import READERS, online
from apportion.quant.schemes.gguf import TYPES
from apportion.quant.writing import FAMILIES, tensors_of

PAGE = ROOT / "docs" / "quantization.md"
SCRIPT = "scripts/formats.py"
DTYPE = "bfloat16"  # of the model whose schemes the tables spell


def schemes() -> dict[str, list[str]]:
    """Every scheme that has a name of its own, with its names: those of --scheme and quantization=, then a recipe's."""
    found: dict[str, list[str]] = {}
    for preset, spelt in {**OFFLINE, **{k: v.replace("{scale}", "{tag}") for k, v in ONLINE.items()}, **THEIR_PRESETS}.items():
        names = found.setdefault(spelt.format(tag="_bf16"), [])
        if preset not in names:
            names.append(preset)
    return found


def method_cell(scheme: str, method: str) -> str:
    """'yes', 'text' where it needs calibration text, or nothing where it has no meaning."""
    recipe = Recipe.of(scheme, method)
    try:
        chosen = recipe.schemes(["layer"], ["layer", "lm_head"], DTYPE)
    except InvalidParameter:
        return ""
    return "text" if recipe.needs_tokens(chosen) else "yes"


def online_cell(scheme: str) -> str:
    try:
        online(scheme, DTYPE)
    except InvalidParameter:
        return ""
    return "yes"


def file_families(scheme: str) -> str:
    weight, found = Scheme.parse(scheme).weight, []
    for family in FAMILIES:
        try:
            tensors_of("layer", quantize(torch.ones(256, 256), weight), family)
        except Unsupported:
            continue
        found.append(family)
    return ", ".join(found)


def backends() -> dict[str, Capability]:
    """One capability for each package of kernels: instruction sets and vendors differ in speed alone."""
    return dict(sorted({i.backend: i.capability for i in implementations()}.items()))  # no preference of this machine


def device_cell(scheme: str, backend: str, capability: Capability) -> str:
    if not capability.quantized:
        return ""
    return "dequantized" if backend == "cpu" and obstacle(scheme) else "yes"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def tables() -> str:
    kernels = backends()
    text = row("scheme", "names", "bits", "while loading", *METHODS, "written to", *kernels) + row(
        *["---"] * (5 + len(METHODS) + len(kernels))
    )
    for scheme, names in schemes().items():
        methods = [method_cell(scheme, method) for method in METHODS]
        devices = [device_cell(scheme, backend, capability) for backend, capability in kernels.items()]
        bits = f"{Scheme.parse(scheme).weight.bits_per_weight():.2f}"
        text += row(f"`{scheme}`", ", ".join(names), bits, online_cell(scheme), *methods, file_families(scheme), *devices)
    text += "\n" + row("cached keys and values", "bytes each", *kernels) + row(*["---"] * (2 + len(kernels)))
    for name, kv in KV_FORMATS.items():
        text += row(f"`{name}`", str(kv.element_bytes), *("yes" if name in capability.kv_dtypes else "" for capability in kernels.values()))
    families = [f"`{name}`" for name in READERS] + [f"GGUF {', '.join(TYPES)}"]
    return f"{text}\nRead from checkpoints: {', '.join(families)}.\n"


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, SCRIPT, with_part(PAGE, "formats", SCRIPT, tables())))
