"""The debug variables, read once. Ten at most; nothing that a user needs daily lives here."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Env:
    """isa: pin the CPU's instruction set ('generic', 'avx2', 'avx512', 'avx512vnni', 'avx512bf16', 'amx').

    log_level: the library logger's level."""

    isa: str | None = os.environ.get("APPORTION_ISA")
    log_level: str = os.environ.get("APPORTION_LOG_LEVEL", "WARNING")


ENV = Env()
