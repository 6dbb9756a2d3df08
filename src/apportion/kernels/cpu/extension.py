"""The compiled module `_cpu`, or the reason why it is absent. An installation without a compiler has none (pyproject.toml)."""

from __future__ import annotations

from typing import Any

from apportion.core.env import ENV
from apportion.core.errors import InvalidParameter, Unsupported

try:
    from apportion.kernels.cpu import _cpu

    ABSENT: str | None = None
except ImportError as error:
    _cpu = None
    ABSENT = f"the compiled CPU kernels cannot be imported ({error}); run `make ext` or reinstall with a C++20 compiler and CMake"


def available() -> bool:
    return _cpu is not None


def load() -> Any:
    """The module, its instruction set pinned by APPORTION_ISA where that is set.

    Raises Unsupported where it is not built and InvalidParameter where the pinned set is unknown or this processor lacks it.
    """
    if _cpu is None:
        raise Unsupported(f"{ABSENT}.")
    if ENV.isa and _cpu.features()["isa"] != ENV.isa:
        try:
            _cpu.select_isa(ENV.isa)
        except ValueError as error:
            raise InvalidParameter(f"APPORTION_ISA: {error}") from None
    return _cpu


def features() -> dict[str, Any]:
    """{'isa': chosen set or None, 'sets': {name: {'available': bool, 'reason': str}}, 'absent': reason or None}, for `doctor`."""
    if _cpu is None:
        return {"isa": None, "sets": {}, "absent": ABSENT}
    return {**load().features(), "absent": None}
