"""Every test and file that docs/claims.md names exists, and every listing's sentence is the source's."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "claims.md").read_text("utf-8")


def test_named_tests_exist():
    named = re.findall(r"`((?:tests|benchmarks|recipes)/[\w/.]+)(?:::(\w+))?`", PAGE)
    assert len(named) > 30
    for path, test in named:
        assert (ROOT / path).is_file(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text("utf-8"), f"{path}::{test}"


def test_quoted_words_are_the_posts(shared_data):
    """What stands in quotation marks is said there, in these words; an ellipsis leaves some out."""
    post = re.sub(r"\s+", " ", shared_data("../seeds/vllm_fp8_blog.txt").read_text("utf-8")).replace("”", '"').replace("’", "'")
    rows = re.findall(r"^\| (.*?) \| ", PAGE.partition("## The papers")[0], re.M)
    pieces = [piece.strip(" .") for row in rows for said in re.findall(r'"(.*)"', row) for piece in said.split(" ... ")]
    assert len(pieces) > 25
    missing = [piece for piece in pieces if piece not in post]
    assert not missing
