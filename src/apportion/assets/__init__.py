"""Data that ships with the package: the bundled default model (see dense/README.md for its source and licence)."""

from pathlib import Path

DEFAULT_MODEL = Path(__file__).parent / "dense"
