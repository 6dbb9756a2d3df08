"""What a grammar may take. A grammar that asks for more is refused, or its request fails; nobody else notices."""

from __future__ import annotations

from dataclasses import dataclass

from llguidance import LLParserLimits

REHEARSED_TOKENS = 4  # some limits show only once tokens come

# A lexer state takes one to two kilobytes, so that one grammar holds at most about 100 MB.
MAX_LEXER_STATES = 50_000


@dataclass(frozen=True, slots=True)
class CompileLimits:
    """Of the process that compiles one grammar. cpu_s: its compute; wall_s: on a machine so busy that it gets hardly any; num_bytes: beside
    what it starts with."""

    cpu_s: float = 2.0
    wall_s: float = 60.0
    num_bytes: int = 512 << 20

    def __str__(self) -> str:
        return f"{self.cpu_s:g} s of compute and {self.num_bytes >> 20} MiB"


def parser_limits() -> LLParserLimits:
    return LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
