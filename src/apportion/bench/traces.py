"""Traces of real serving: when requests came, how long they were, and (Mooncake's) which blocks of their prompts were equal.

Azure's LLM inference traces (Splitwise, ISCA 2024) and BurstGPT are CSV, Mooncake's (FAST 2025) are JSON lines. Knows nothing of
what is sent.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from apportion.core.errors import InvalidParameter

HASH_BLOCK = 512  # tokens that one hash of a Mooncake trace stands for


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """time: seconds since the first entry. lengths: tokens. hash_ids: one for each 512 tokens of the prompt, equal where the tokens
    and all before them are equal; empty where the trace has none."""

    time: float
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path, limit: int | None = None) -> list[TraceEntry]:
    """The first `limit` entries (None: all) in order of time. A .csv file is Azure's or BurstGPT's, a .jsonl file Mooncake's.

    Errors: InvalidParameter that names the file, and the line that cannot be read.
    """
    readers = {".csv": _csv_entry, ".jsonl": _mooncake_entry}
    if path.suffix not in readers:
        raise InvalidParameter(f"{path} is no trace: expected .csv (Azure, BurstGPT) or .jsonl (Mooncake)")
    if not path.is_file():
        raise InvalidParameter(f"there is no trace {path}")
    read, entries = readers[path.suffix], []
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows: Any = csv.DictReader(file) if path.suffix == ".csv" else (line for line in file if line.strip())
        for number, row in enumerate(islice(rows, limit), start=2 if path.suffix == ".csv" else 1):
            try:
                entries.append(read(row))
            except (KeyError, ValueError, TypeError) as error:
                raise InvalidParameter(f"{path}, line {number}: {type(error).__name__}: {error}") from None
    if not entries:
        raise InvalidParameter(f"the trace {path} holds no request")
    entries.sort(key=lambda entry: entry.time)
    start = entries[0].time
    return [TraceEntry(e.time - start, e.input_len, e.output_len, e.hash_ids) for e in entries]


def _csv_entry(row: dict[str, str]) -> TraceEntry:
    if "TIMESTAMP" in row:  # Azure, 2023 and 2024
        stamp = datetime.fromisoformat(row["TIMESTAMP"])
        time = (stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).timestamp()
        return TraceEntry(time, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
    return TraceEntry(float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"]))  # BurstGPT


def _mooncake_entry(line: str) -> TraceEntry:
    row = json.loads(line)
    hashes = tuple(int(i) for i in row.get("hash_ids", ()))
    return TraceEntry(row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]), hashes)
