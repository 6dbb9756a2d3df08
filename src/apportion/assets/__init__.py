"""Data that ships with the package: the bundled default model (see dense/README.md for its source and licence), a passage of
prose, and the look of report pages (report.css).

passage.txt: pages of The Wonderful Wizard of Oz (L. Frank Baum, 1900) and Alice's Adventures in Wonderland (Lewis Carroll, 1865), public
domain; no bundled model is trained on them.
"""

from pathlib import Path

DEFAULT_MODEL = Path(__file__).parent / "dense"
PASSAGE = Path(__file__).parent / "passage.txt"
REPORT_CSS = Path(__file__).parent / "report.css"
