"""What a grammar costs a step: python benchmarks/grammar_masks.py [--words FOLDER ...] [--write]

Walks the schemas of tests/unit/serving/real_schemas.py and a text that holds tool calls, token by token, drawing each token at random
among those that the mask admits. Two vocabularies: the bundled model's, and one of 128k tokens: the bundled one and the commonest
words, with and without a blank before them, of the Python files under --words (of Python's own library if not given).

mask: computed on a thread, without the interpreter's lock, while the model computes; a step waits for it 1 ms at most and goes without
the request otherwise, so nobody else waits longer. accept: on the engine's thread, for every token of such a request.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import re
import statistics
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from apportion.serving.structured.sandbox import make_matcher, make_tokenizer, to_grammar

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from run_all import machine

from tests.unit.serving.real_schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[1]
SIZES = (4096, 131_072)
TOKENS = 60  # of each walk
PATIENCE_US = 1000  # engine/step.py's
CITY = json.dumps({"type": "object", "properties": {"city": {"type": "string"}}})
TOOLS = f'start: TEXT calls?\nTEXT: /(?s:.*)/ & ~/(?s:.*<call>.*)/\ncalls: "<call>" %json {CITY}'


def tokenizer_json(size: int, folders: list[Path]) -> dict[str, Any]:
    """The bundled tokenizer.json, grown to `size` tokens by words."""
    tokenizer = json.loads((ROOT / "src/apportion/assets/dense/tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    words: Counter[str] = Counter()
    if size > len(vocab):
        for folder in folders:
            for path in sorted(folder.rglob("*.py"))[:4000]:
                words.update(re.findall(r"[A-Za-z_]{2,}|[0-9]{2,}", path.read_text(encoding="utf-8", errors="ignore")))
    grown = (token for word, _ in words.most_common() for token in (word, f"Ġ{word}"))
    for token in grown:
        if len(vocab) == size:
            break
        vocab.setdefault(token, len(vocab))
    if len(vocab) != size:
        raise SystemExit(f"the words make {len(vocab)} tokens, and {size} are wanted: give more with --words")
    return tokenizer


def walk(matcher: LLMatcher, draw: random.Random, masks_us: list[float], accepts_us: list[float]) -> None:
    for _ in range(TOKENS):
        start = time.perf_counter()
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        masks_us.append((time.perf_counter() - start) * 1e6)
        allowed = [i for i in range(mask.bit_length()) if mask >> i & 1] if mask.bit_count() < 64 else _some(mask, draw)
        start = time.perf_counter()
        matcher.consume_token(draw.choice(allowed))
        accepts_us.append((time.perf_counter() - start) * 1e6)
        if matcher.is_stopped() or matcher.is_error():
            return


def _some(mask: int, draw: random.Random) -> list[int]:
    while True:
        token = draw.randrange(mask.bit_length())
        if mask >> token & 1:
            return [token]


def measure(size: int, folders: list[Path]) -> dict[str, Any]:
    tokenizer: LLTokenizer = make_tokenizer({"json": json.dumps(tokenizer_json(size, folders)), "vocab": size, "eos": [0]})
    draw = random.Random(1)
    masks_us: list[float] = []
    accepts_us: list[float] = []
    compiles_ms: list[float] = []
    grammars = [("json", json.dumps(schema)) for schema in SCHEMAS.values()] + [("grammar", TOOLS)] * 3
    for kind, source in grammars:
        start = time.perf_counter()
        matcher = make_matcher(tokenizer, to_grammar(kind, source))
        compiles_ms.append((time.perf_counter() - start) * 1e3)
        walk(matcher, draw, masks_us, accepts_us)
    late = sum(us > PATIENCE_US for us in masks_us)
    return {
        "vocab": size,
        "masks": len(masks_us),
        "mask_us": spread(masks_us),
        "accept_us": spread(accepts_us),
        "compile_with_first_mask_ms": spread(compiles_ms),
        "masks_beyond_1_ms": late,
    }


def spread(values: list[float]) -> dict[str, float]:
    ranked = sorted(values)
    return {
        "p50": round(statistics.median(ranked), 1),
        "p99": round(ranked[int(0.99 * (len(ranked) - 1))], 1),
        "max": round(ranked[-1], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=Path, nargs="*", default=[Path(sysconfig.get_paths()["stdlib"])], help="folders of Python files")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/grammar_masks-DATE.json")
    given = parser.parse_args()
    command = "python " + " ".join(["benchmarks/grammar_masks.py", *sys.argv[1:]])
    report = {"machine": machine(), "command": command, "sizes": [measure(size, given.words) for size in SIZES]}
    text = json.dumps(report, indent=1)
    print(text)
    if given.write:
        (ROOT / "benchmarks" / "results" / f"grammar_masks-{datetime.date.today()}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
