"""An interpolated Kneser-Ney n-gram model on tokens: what a model without a memory reaches on a text.

Modified Kneser-Ney of Chen & Goodman (1999), section 3: continuation counts below the highest order, three discounts per order
estimated from the counts of counts, interpolated down to the uniform distribution. numpy only; any vocabulary.

    python recipes/kneser_ney.py --tokenizer src/apportion/assets/dense/tokenizer.json --data ../shared/data/text-train
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from training_mix import encode_texts, read_texts


@dataclass(frozen=True)
class Order:
    """The n-grams of one order, each named by its place in `keys`.

    keys: int64, sorted: (name of its first n-1 tokens) * V + last token. count: of the n-gram (continuations, below the highest order).
    total, freed: per context, by the context's name: its counts summed, and the mass its discounts set free for the order below.
    """

    keys: np.ndarray
    count: np.ndarray
    discount: np.ndarray
    total: np.ndarray
    freed: np.ndarray


def discounts(count: np.ndarray) -> np.ndarray:
    """[4]: what is taken from a count of 0, 1, 2, and 3 or more (equation 26)."""
    n = np.bincount(np.minimum(count, 5), minlength=6).astype(float)
    if not n[1] or not n[2]:
        raise ValueError("the text is too small for Kneser-Ney: no n-gram that occurs once, or none that occurs twice")
    share = n[1] / (n[1] + 2 * n[2])
    return np.array([0.0, *(c - (c + 1) * share * n[c + 1] / n[c] if n[c] else share for c in (1, 2, 3))])


class KneserNey:
    """Fitted to a stream of token ids. `log_probs` gives each token's, from at most order - 1 tokens before it."""

    def __init__(self, ids: np.ndarray, vocab_size: int, order: int = 5) -> None:
        self.vocab_size = vocab_size
        ids = ids.astype(np.int64)
        names = np.zeros(len(ids) + 1, dtype=np.int64)  # of the (n-1)-gram that begins at each position
        grams: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # keys, occurrences, and the name of each n-gram's last n-1 tokens
        for n in range(1, order + 1):
            last = ids[n - 1 :]
            keys, first, inverse, count = np.unique(
                names[: len(last)] * vocab_size + last, return_index=True, return_inverse=True, return_counts=True
            )
            grams.append((keys, count, names[first + 1]))
            names = inverse
        self.orders = []
        for n in range(order):
            keys, count, _ = grams[n]
            if n + 1 < order:
                count = np.bincount(grams[n + 1][2], minlength=len(keys))
            contexts = len(grams[n - 1][0]) if n else 1
            taken = discounts(count)
            context = keys // vocab_size
            total = np.bincount(context, count, contexts)
            self.orders.append(Order(keys, count, taken, total, np.bincount(context, taken[np.minimum(count, 3)], contexts)))

    def log_probs(self, ids: np.ndarray) -> np.ndarray:
        """float64 [N]: log P(ids[i] | up to order - 1 ids before it)."""
        ids = ids.astype(np.int64)
        prob = np.full(len(ids), 1 / self.vocab_size)
        context = np.zeros(len(ids), dtype=np.int64)  # the name of the n-1 tokens before each position, -1: never seen
        for order in self.orders:
            seen = context >= 0
            total = np.where(seen, order.total[context], 0)
            key = context * self.vocab_size + ids
            place = np.minimum(np.searchsorted(order.keys, key), len(order.keys) - 1)
            found = seen & (order.keys[place] == key)
            count = np.where(found, order.count[place], 0)
            rest = np.maximum(count - order.discount[np.minimum(count, 3)], 0)
            known = total > 0
            safe = np.where(known, total, 1)
            prob = np.where(known, rest / safe + order.freed[context] / safe * prob, prob)
            context = np.concatenate(([-1], np.where(found, place, -1)[:-1]))
        return np.log(prob)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True, help="a folder with train.jsonl.xz and val.jsonl.xz")
    parser.add_argument("--order", type=int, default=5)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(args.tokenizer)
    train, held_out = (encode_texts(tokenizer, read_texts(Path(args.data) / f"{part}.jsonl.xz")) for part in ("train", "val"))
    model = KneserNey(train, tokenizer.get_vocab_size(), args.order)
    nll = -model.log_probs(held_out)
    print(f"{args.order}-gram on {len(train):,} tokens: {nll.mean():.4f} nat per token over {len(nll):,} held-out ones")
    for n, order in enumerate(model.orders, 1):
        print(f"  order {n}: {len(order.keys):,} n-grams, discounts {', '.join(f'{d:.3f}' for d in order.discount[1:])}")


if __name__ == "__main__":
    main()
