"""What the small models are trained on: text in its order, retrieval tasks, token puzzles, and a little chat, in rows of one length.

A row is a pure function of (seed, step, place in the batch), so a run that is resumed sees what it would have seen. Text is read
once through before any of it comes again; what tasks use as filler comes on top. Nothing here touches a test split or a held-out text.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from apportion.evaluate import tasks

END, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
KINDS = ("other", "text", "repeat", "recall", "answer")  # what a predicted token is, for the log
TASK_WEIGHTS = {"passkey": 2, "needle": 2, "multi_needle": 4, "mqar": 6, "copy": 2, "variable_tracking": 4}
NUM_QUESTIONS = {"passkey": 1, "needle": 1, "multi_needle": 4, "mqar": 16, "copy": 4, "variable_tracking": 2}
QUESTION_TOKENS = {"passkey": 20, "needle": 20, "multi_needle": 18, "mqar": 6, "copy": 16, "variable_tracking": 20}  # and their answers
ANSWER_WEIGHT, CONTEXT_WEIGHT = 4.0, 0.5  # of a token's loss in a task; a token of text has 1

ABOUT = (
    ("Hello!", "Hello! I am a very small language model. How can I help you?"),
    ("Hi", "Hi! I am a very small language model. Ask me something short."),
    ("Who are you?", "I am the small model that comes with apportion. I was trained on a few books, manuals and exercises."),
    ("What are you?", "I am a small language model of a few million parameters. I know little, but I can find what you tell me."),
    ("What can you do?", "I can continue a text, find a fact that you have given me, and try a short sum. I am often wrong."),
    ("What is apportion?", "apportion is an engine that runs language models fast on the hardware at hand."),
    ("Thank you.", "You are welcome."),
    ("Goodbye.", "Goodbye!"),
)  # fmt: skip


def read_texts(path: Path) -> list[str]:
    """The `text` fields of a .jsonl or .jsonl.xz file."""
    opened = lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8")
    with opened as lines:
        return [json.loads(line)["text"] for line in lines]


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """One stream of ids, uint16 [N]: every text behind an end-of-text token."""
    pieces = [[tokenizer.token_to_id(END), *encoded.ids] for encoded in tokenizer.encode_batch(texts)]
    return np.concatenate([np.asarray(piece, dtype=np.uint16) for piece in pieces])


def words_in(texts: list[str]) -> list[str]:
    """What retrieval is taught with: the texts' words but the test's. A short list would be learnt by heart, and no copying with it."""
    counts = Counter(word for text in texts for word in re.findall(r"\b[a-z]{3,10}\b", text))
    test = set(tasks.words_of("test"))
    common = sorted(word for word, count in counts.items() if count >= 3 and word not in test)
    return common if len(common) >= 2 * tasks.MAX_PAIRS else []


@dataclass(frozen=True)
class Stage:
    """A part of the training. share: of the steps; length: tokens of a row; text: share of the rows that are text; the others hold
    words (generated retrieval tasks), repeat and recall (token puzzles, from which induction is learnt), chat, by these weights.
    Puzzles fill what is left of a row.
    """

    share: float
    length: int
    text: float
    words: int
    repeat: int
    recall: int
    chat: int

    def kinds(self) -> dict[str, int]:
        return {"words": self.words, "repeat": self.repeat, "recall": self.recall, "chat": self.chat}


@dataclass(frozen=True)
class Row:
    """ids: int64 [T + 1]; weights: float32 [T], of the loss of predicting ids[1:]; kinds: int8 [T], what those are."""

    ids: np.ndarray
    weights: np.ndarray
    kinds: np.ndarray


class TrainingMix:
    """Rows of training tokens.

    texts: the training texts, in the order they are read; chats: (question, answer); seed: of all chance.
    """

    def __init__(self, tokenizer: Tokenizer, texts: list[str], chats: list[tuple[str, str]], seed: int) -> None:
        self.tokenizer, self.seed, self.chats = tokenizer, seed, chats
        texts = random.Random(f"order {seed}").sample(texts, len(texts))
        self.stream = encode_texts(tokenizer, texts)
        self.filler = tasks.Filler("\n\n".join(texts[: len(texts) // 4]), lambda text: len(tokenizer.encode(text).ids))
        self.words = words_in(texts) or tasks.words_of("train")
        self.end = tokenizer.token_to_id(END)
        self.plain = range(6, tokenizer.get_vocab_size())  # ids that are no special token
        self._makers = {"words": self._words, "repeat": self._repeat, "recall": self._recall, "chat": self._chat}

    def row(self, stage: Stage, step: int, place: int, position: int) -> tuple[Row, int]:
        """The row at (step, place), and where in the text the next row of text goes on."""
        rng, length = random.Random(f"{self.seed} {step} {place}"), stage.length
        if rng.random() < stage.text:
            ids = np.take(self.stream, range(position, position + length + 1), mode="wrap").astype(np.int64)
            return Row(ids, np.ones(length, np.float32), np.full(length, KINDS.index("text"), np.int8)), position + length
        tokens: list[int] = []
        weights: list[float] = []
        kinds: list[int] = []
        while len(tokens) <= length:
            room = length - len(tokens)
            weights_of = stage.kinds() if room >= 160 else {"repeat": 1, "recall": 2}
            kind = rng.choices(list(weights_of), list(weights_of.values()))[0]
            pieces = [([self.end], 0.0), *self._makers[kind](rng, max(room, 16))]
            for piece, weight in pieces:
                tokens += piece
                weights += [weight] * len(piece)
                label = kind if kind in ("repeat", "recall") and weight > 0 else "answer" if weight == ANSWER_WEIGHT else "other"
                kinds += [KINDS.index(label)] * len(piece)
        cut = slice(1, length + 1)
        return Row(np.asarray(tokens[: length + 1]), np.asarray(weights[cut], np.float32), np.asarray(kinds[cut], np.int8)), position

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def _sample(self, rng: random.Random, room: int) -> tasks.Sample:
        task = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))[0]
        shortest = {"multi_needle": 100, "variable_tracking": 128, "copy": 72}.get(task, 64)
        longest = room - QUESTION_TOKENS[task] * NUM_QUESTIONS[task]
        length = max(rng.randint(min(room // 2, longest), longest), shortest)
        asked = {"split": "train", "num_questions": NUM_QUESTIONS[task], "words": self.words}
        return tasks.make(task, self.filler, length=length, depth=rng.random(), seed=rng.getrandbits(60), **asked)

    def _words(self, rng: random.Random, room: int) -> list[tuple[list[int], float]]:
        """A generated task with all its questions, each answered."""
        sample = self._sample(rng, room)
        close = "" if sample.task in ("mqar", "copy") else "."
        pieces = [(self._encode(sample.context), CONTEXT_WEIGHT)]
        for question, answer in sample.questions:
            pieces += [(self._encode(question), CONTEXT_WEIGHT), (self._encode(answer + close), ANSWER_WEIGHT)]
        return [*pieces, (self._encode("\n"), 1.0)]

    def _alphabet(self, rng: random.Random) -> Sequence[int]:
        """The ids a puzzle is written in: any, or so few that more than the last token must be matched."""
        size = rng.choice((10, 40, 160, 640, len(self.plain), len(self.plain)))
        return self.plain if size == len(self.plain) else rng.sample(self.plain, size)

    def _repeat(self, rng: random.Random, room: int) -> list[tuple[list[int], float]]:
        """A span of random tokens, or of text, several times over: the repetitions can be predicted."""
        size = rng.randint(8, max(min(room // 3, 96), 9))
        if rng.random() < 0.75:
            span = rng.choices(self._alphabet(rng), k=size)
        else:
            start = rng.randrange(len(self.stream) - size)
            span = self.stream[start : start + size].tolist()
        return [(span, 0.0), *[(span, 1.0)] * max(1, min(4, room // size - 1))]

    def _recall(self, rng: random.Random, room: int) -> list[tuple[list[int], float]]:
        """MQAR on tokens: pairs of a key and a value, with the same few tokens between them, then the keys again in any order."""
        alphabet = self._alphabet(rng)
        width, values = (rng.randint(1, 3), rng.randint(1, 2)) if len(alphabet) > 40 else (rng.randint(2, 3), rng.randint(1, 5))
        link, close = rng.choices(self.plain, k=rng.randint(0, 3)), rng.choices(self.plain, k=rng.randint(0, 1))
        each = width + values + len(link) + len(close)
        count = rng.randint(2, max(3, min(64, room // (3 * each))))
        keys = {tuple(rng.choices(alphabet, k=width)) for _ in range(count)}
        pairs = [([*key, *link], rng.choices(alphabet, k=values)) for key in sorted(keys)]
        rng.shuffle(pairs)
        told = [(key + value + close, 0.0) for key, value in pairs]
        asked = rng.choices(pairs, k=max(1, (room - len(pairs) * each) // each))
        return told + [piece for key, value in asked for piece in ((key, 0.0), (value, 1.0), (close, 0.0))]

    def _chat(self, rng: random.Random, room: int) -> list[tuple[list[int], float]]:
        draw = rng.random()
        if draw < 0.1:
            question, answer, weight = *rng.choice(ABOUT), 1.0
        elif draw < 0.5:
            sample = self._sample(rng, max(room - 30, 64))
            (asked, answer), weight = sample.questions[0], ANSWER_WEIGHT
            question, answer = sample.context + asked + ("" if asked.endswith("=") else " what?"), answer.strip() + "."
        else:
            (question, answer), weight = rng.choice(self.chats), 1.0
        return [
            (self._encode(f"{CHAT_START}user\n{question}{CHAT_END}\n{CHAT_START}assistant\n"), CONTEXT_WEIGHT),
            (self._encode(f"{answer}{CHAT_END}"), weight),
            (self._encode("\n"), 1.0),
        ]
