"""Pages under docs that scripts write: a whole page, or the part of one between its markers."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def with_part(page: Path, name: str, script: str, text: str) -> str:
    """What `page` should hold: `text` between <!-- NAME: written by SCRIPT --> and <!-- NAME: end -->. Exits where these are not there."""
    begin, end = f"<!-- {name}: written by {script} -->", f"<!-- {name}: end -->"
    head, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        sys.exit(f"{page.relative_to(ROOT)} has lost its markers: {begin} and {end}")
    return f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}"


def write_part(page: Path, name: str, script: str, text: str) -> None:
    page.write_text(with_part(page, name, script, text), encoding="utf-8")


def write_or_check(page: Path, script: str, wanted: str) -> int:
    """Write the page, or with --check say whether that is due: the exit status."""
    if sys.argv[1:] != ["--check"]:
        page.write_text(wanted, encoding="utf-8")
        return 0
    if page.read_text(encoding="utf-8") == wanted:
        return 0
    print(f"{page.relative_to(ROOT)} is out of date: run python {script}")
    return 1
