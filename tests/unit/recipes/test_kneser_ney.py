"""The n-gram yardstick against a hand-made case, a dictionary of the definition, and the axioms."""

from collections import Counter
from functools import cache

import numpy as np
import pytest


@pytest.fixture
def kneser_ney(recipe):
    return recipe("kneser_ney")


def by_definition(ids: list[int], vocab_size: int, order: int):
    """P(w | h) straight from Chen & Goodman's equations 24 to 27, with dictionaries."""
    counts = {n: Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)) for n in range(1, order + 1)}
    for n in range(1, order):
        counts[n] = Counter(gram[1:] for gram in set(zip(*(ids[i:] for i in range(n + 1)), strict=False)))

    def taken(n: int, count: int) -> float:
        of = Counter(counts[n].values())
        share = of[1] / (of[1] + 2 * of[2])
        c = min(count, 3)
        return (c - (c + 1) * share * of[c + 1] / of[c] if of[c] else share) if c else 0.0

    @cache
    def prob(history: tuple[int, ...], word: int) -> float:
        n = len(history) + 1
        below = prob(history[1:], word) if history else 1 / vocab_size
        followers = {gram[-1]: count for gram, count in counts[n].items() if gram[:-1] == history}
        if not followers:
            return below
        count, total = followers.get(word, 0), sum(followers.values())
        freed = sum(taken(n, c) for c in followers.values())
        return max(count - taken(n, count), 0) / total + freed / total * below

    return prob


@pytest.mark.parametrize("order", [1, 2, 3])
def test_equals_the_definition(kneser_ney, order):
    rng = np.random.default_rng(3)
    ids, held_out = rng.zipf(1.6, 900) % 97, rng.zipf(1.6, 60) % 101
    model, expected = kneser_ney.KneserNey(ids, 101, order), by_definition(ids.tolist(), 101, order)
    prob = np.exp(model.log_probs(held_out))
    words = held_out.tolist()
    for i, word in enumerate(words):
        assert prob[i] == pytest.approx(expected(tuple(words[max(0, i - order + 1) : i]), word), rel=1e-9)


def test_a_case_done_by_hand(kneser_ney):
    """a b a c a b c: bigrams ab 2, ba, ac, ca, bc 1: n1 4, n2 1, share 4/6, D1 1 - 4/3 * 1/4 = 2/3, D2 2 (no bigram occurs 3 times).

    Continuations: a 2 (b, c), b 1 (a), c 2 (a, b): n1 1, n2 2, share 1/5, D1 1 - 2/5 * 2 = 1/5, D2 2; the unigram mass set free is
    (2 + 1/5 + 2) / 5. P(b) = (1 - 1/5) / 5 + 21/25 / 3 = 11/25; P(b | a) = 0 + (2 + 2/3) / 3 * 11/25 = 88/225.
    """
    model = kneser_ney.KneserNey(np.array([0, 1, 0, 2, 0, 1, 2]), 3, 2)
    assert model.orders[1].discount.tolist() == pytest.approx([0, 2 / 3, 2, 2 / 3])
    assert model.orders[0].discount.tolist() == pytest.approx([0, 1 / 5, 2, 1 / 5])
    assert np.exp(model.log_probs(np.array([1]))) == pytest.approx([11 / 25])
    assert np.exp(model.log_probs(np.array([0, 1])))[1] == pytest.approx(88 / 225)
    with pytest.raises(ValueError, match="too small"):
        kneser_ney.KneserNey(np.array([0, 1, 0, 1]), 2, 2)


def test_probabilities_of_any_history_sum_to_one(kneser_ney):
    ids = np.random.default_rng(5).zipf(1.6, 500) % 60
    model = kneser_ney.KneserNey(ids, 64, 3)
    for history in ([0, 1], [1, 1], [62, 1], [62, 62], [2]):
        total = sum(np.exp(model.log_probs(np.array([*history, word])))[-1] for word in range(64))
        assert total == pytest.approx(1.0, rel=1e-12)
