"""Generated retrieval tasks: statements hidden in real text at a chosen depth, and questions that only those statements answer.

Passkey after Mohtashami & Jaggi (2023); needles and variable tracking after RULER (Hsieh et al. 2024), the value asked instead of the
names; associative recall (MQAR) after Zoology (Arora et al. 2023), with words for symbols; copy after the induction heads of Olsson et
al. (2022). The same generators make training samples and tests, from disjoint keys: a word or number belongs to one split for ever, and
the filler is the caller's text (a test uses text that no training saw). Plain Python: it knows no model and no torch.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from apportion.core.errors import InvalidParameter

SPLITS = ("train", "test")
MAX_PAIRS = 64  # of one recall sample: each pair takes two words of the split

# Common nouns. Every other word is the test's.
_NOUNS = """
acorn actor adult alarm album amber anchor angel ankle apple apron arch arena armor arrow artist atlas attic aunt badge
baker balcony ballet bamboo banana banjo banner barber barn barrel basin basket beacon bean beard beaver bell belt bench berry
blanket blossom board boat bone bonnet book border bottle boulder bowl bracelet branch bread brick bridge broom brother brush bubble
bucket buckle bullet bundle butcher butter button cabin cabbage cable cactus cage cake camel camera camp canal candle canoe canvas
captain card cargo carpet carrot cart castle cave cedar ceiling cellar chain chair chalk channel chapel cherry chest chicken chimney
circle citizen clay cliff clock cloth cloud clover coal coast coat cobbler coffee coin collar comet compass copper coral cork corner
cotton couch cousin cradle crane crayon cream creek cricket crown crystal cup curtain cushion dagger dairy daisy dancer desert desk
diamond dish ditch doctor dog doll dolphin donkey door dove dragon drawer dress drum duck eagle earring echo elbow elephant elm
emerald engine eraser fabric falcon farmer feather fence fern ferry fiddle field finger fish flag flame flask flour flower flute
forest fork fossil fountain fox frog frost fruit furnace galaxy garden garlic gate ghost giant ginger glacier glass glove goat
gold goose grape grass gravel guitar hammer hammock harbor harp hat hawk hazel heart hedge helmet hen hero hill honey hood hook
horn horse hotel house iceberg ink insect iris iron island ivory jacket jar jelly jewel judge jungle kettle key kitchen kite
kitten knee knife knight ladder lake lamp lantern lawyer leaf lemon letter library lily lime linen lion lizard lobster lock locket
lumber lunch magnet maple marble market mask meadow medal melon mermaid metal miller mirror mitten monkey moon moss moth motor
mountain mouse museum mustard napkin necklace needle nest nurse oak oasis ocean olive onion orange orchard organ otter oven owl
oyster paddle painter palace palm panda panther paper parade parrot pasture peach pear pearl pebble pelican pencil penguin pepper
piano pigeon pillow pilot pine pirate planet plate plum pocket poet pond poppy porch potato powder prince puddle pumpkin puppy
puzzle quail quarry queen quilt rabbit radio raft raisin raven ribbon rice ring river robe robin rocket roof rope rose ruby ruler
saddle sailor salmon salt sandal scarf school scissors seal shadow shark sheep shell shield ship shirt shovel silk silver skull
sled slipper smoke snail snow soap sofa soldier spider sponge spoon squirrel stable stamp star statue steam stone stove straw
sugar swan sword table tailor temple tent thread throne thunder ticket tiger timber toast tomato tooth torch towel tower trail
train treasure tulip tunnel turkey turtle uncle valley vase velvet village vine violet violin wagon walnut wave weaver whale
wheat wheel whistle willow window wing wizard wolf wool worm yacht zebra
""".split()
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Sample:
    """One text with its questions. `prompt` ends where the answer begins; `answer` starts with its space.

    context: the text that is given; questions: (question, answer) in the order a training sample continues with them, the first of them
    about the statement at `depth` (0: first of the text, 1: last). num_tokens: of context and first question, as the filler counts.
    """

    task: str
    context: str
    questions: tuple[tuple[str, str], ...]
    depth: float
    num_tokens: int

    @property
    def prompt(self) -> str:
        return self.context + self.questions[0][0]

    @property
    def answer(self) -> str:
        return self.questions[0][1]

    def is_answered_by(self, text: str) -> bool:
        """Whether a continuation of `prompt` gives the answer: exactly, and not as the beginning of a longer word or number."""
        text, answer = text.lstrip(), self.answer.strip()
        return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()


class Filler:
    """Real text cut into sentences, each with its length in tokens, to be given out in pieces.

    text: a passage of real prose; count: text -> number of tokens (any tokenizer, or `lambda text: len(text.split())`).
    Errors: InvalidParameter where the text has fewer than two sentences.
    """

    def __init__(self, text: str, count: Callable[[str], int]) -> None:
        self.count = count
        self.sentences = [" ".join(piece.split()) for piece in re.split(r"(?<=[.!?])\s+|\n{2,}", text)]
        self.sentences = [sentence for sentence in self.sentences if any(letter.isalpha() for letter in sentence)]
        if len(self.sentences) < 2:
            raise InvalidParameter("a filler text needs at least two sentences")
        self._lengths = [count(sentence + "\n") for sentence in self.sentences]

    def take(self, rng: random.Random, num_tokens: int) -> list[tuple[str, int]]:
        """Consecutive sentences from a random place (the text is a ring), (sentence, tokens) each, `num_tokens` in all.

        The last sentence is cut between words: the total falls short by less than a word's tokens.
        """
        place, taken = rng.randrange(len(self.sentences)), []
        while num_tokens > 0:
            sentence, length = self.sentences[place], self._lengths[place]
            if length > num_tokens:
                words = sentence.split()
                kept = bisect_right(range(1, len(words) + 1), num_tokens, key=lambda n: self.count(" ".join(words[:n]) + "\n"))
                sentence, length = " ".join(words[:kept]), num_tokens
            if sentence:
                taken.append((sentence, length))
            num_tokens -= length
            place = (place + 1) % len(self.sentences)
        return taken


@dataclass(frozen=True, slots=True)
class _Episode:
    """What a task hides and asks. statements stand in this order in the text; anchor: which one is put at the depth asked for."""

    statements: list[str]
    anchor: int
    questions: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a task's numbers and names come from (the split), and its words."""

    split: str
    words: Sequence[str]


def words_of(split: str) -> list[str]:
    """The words a split may use; no word is in both."""
    return _NOUNS[SPLITS.index(split) :: 2]


def _number(rng: random.Random, split: str, digits: int = 5) -> str:
    """A number of the split: those that leave 0 divided by 4 are the test's."""
    number = rng.randrange(10 ** (digits - 1) // 4, 10**digits // 4) * 4
    return str(number if split == "test" else number + rng.randint(1, 3))


def _name(rng: random.Random, split: str) -> str:
    """Three capital letters; the last says whose it is."""
    half = len(_LETTERS) // 2
    last = _LETTERS[half:] if split == "test" else _LETTERS[:half]
    return rng.choice(_LETTERS) + rng.choice(_LETTERS) + rng.choice(last)


def passkey(rng: random.Random, source: _Source, length: int, num_questions: int) -> _Episode:
    key = _number(rng, source.split)
    statement = f"The pass key is {key}. Remember it. {key} is the pass key."
    return _Episode([statement], 0, [("What is the pass key? The pass key is", f" {key}")] * num_questions)


def _needles(rng: random.Random, source: _Source, count: int, num_questions: int) -> _Episode:
    facts = [(word, _number(rng, source.split)) for word in rng.sample(source.words, count)]
    asked = rng.sample(range(count), min(num_questions, count))
    questions = [(f"The secret number of the {facts[i][0]} is", f" {facts[i][1]}") for i in asked]
    return _Episode([f"The secret number of the {word} is {number}." for word, number in facts], asked[0], questions)


def needle(rng: random.Random, source: _Source, length: int, num_questions: int) -> _Episode:
    return _needles(rng, source, 1, num_questions)


def multi_needle(rng: random.Random, source: _Source, length: int, num_questions: int) -> _Episode:
    """Four needles of one form; one is asked."""
    return _needles(rng, source, 4, num_questions)


def mqar(rng: random.Random, source: _Source, length: int, num_questions: int) -> _Episode:
    """Pairs of words, one pair for 16 tokens of the length (32 of them at 512), 4 to MAX_PAIRS."""
    count = min(max(length // 16, 4), MAX_PAIRS)
    words = rng.sample(source.words, 2 * count)
    pairs = list(zip(words[:count], words[count:], strict=True))
    asked = rng.sample(range(count), min(num_questions, count))
    return _Episode([f"{key} = {value}" for key, value in pairs], asked[0], [(f"{pairs[i][0]} =", f" {pairs[i][1]}") for i in asked])


def copy(rng: random.Random, source: _Source, length: int, num_questions: int) -> _Episode:
    """A list of words in no order; its first words are given again, and the next four asked."""
    words = rng.sample(source.words, min(max(length // 16, 8), 24))
    starts = [rng.randrange(len(words) - 7) for _ in range(num_questions)]
    questions = [(" ".join(words[i : i + 4]), " " + " ".join(words[i + 4 : i + 8])) for i in starts]
    return _Episode([" ".join(words)], 0, questions)


def variable_tracking(rng: random.Random, source: _Source, length: int, num_questions: int) -> _Episode:
    """Two chains of three variables, interleaved: a number is assigned, then handed on twice; the value of a chain's last one is asked."""
    names: list[str] = []
    while len(names) < 6:
        name = _name(rng, source.split)
        names += [name] * (name not in names)
    chains, values = (names[:3], names[3:]), (_number(rng, source.split), _number(rng, source.split))
    pending = [
        [f"VAR {chain[0]} = {value}", f"VAR {chain[1]} = VAR {chain[0]}", f"VAR {chain[2]} = VAR {chain[1]}"]
        for chain, value in zip(chains, values, strict=True)
    ]
    order = [0] * 3 + [1] * 3
    rng.shuffle(order)
    asked = rng.randrange(2)
    anchor = order.index(asked)
    questions = [(f"The value of VAR {chains[i][2]} is", f" {values[i]}") for i in (asked, 1 - asked)]
    return _Episode([pending[chain].pop(0) for chain in order], anchor, questions[:num_questions])


TASKS: dict[str, Callable[[random.Random, _Source, int, int], _Episode]] = {
    "passkey": passkey,
    "needle": needle,
    "multi_needle": multi_needle,
    "mqar": mqar,
    "copy": copy,
    "variable_tracking": variable_tracking,
}


def _positions(rng: random.Random, episode: _Episode, depth: float) -> list[float]:
    """Where each statement goes (0..1, in order): the anchor at `depth`, those before it before, those after it after."""
    before = sorted(rng.uniform(0, depth) for _ in range(episode.anchor))
    after = sorted(rng.uniform(depth, 1) for _ in range(len(episode.statements) - episode.anchor - 1))
    return [*before, depth, *after]


def _hide(statements: Sequence[str], positions: Sequence[float], filler: Sequence[tuple[str, int]]) -> str:
    """The lines of the text: each statement before the first sentence that begins at or behind its position."""
    ends = list(accumulate((tokens for _, tokens in filler), initial=0))
    slots: list[list[str]] = [[] for _ in range(len(filler) + 1)]
    for statement, position in zip(statements, positions, strict=True):
        target = position * ends[-1]
        slot = bisect_right(ends, target) - 1
        slots[slot if target - ends[slot] <= ends[min(slot + 1, len(filler))] - target else slot + 1].append(statement)
    lines = [line for place, (sentence, _) in enumerate(filler) for line in (*slots[place], sentence)] + slots[-1]
    return "\n".join(lines) + "\n"


def make(
    task: str,
    filler: Filler,
    *,
    length: int,
    depth: float,
    seed: int,
    split: str = "test",
    num_questions: int = 1,
    words: Sequence[str] | None = None,
) -> Sample:
    """One sample of at most `length` tokens in context and first question (short of it by at most a few).

    depth: 0..1, where the asked statement stands in the filler (with several questions: the first one's). seed: with the other arguments,
    all of the chance there is. num_questions: more than one for training, at most what the task has statements for.
    words: to draw from in place of the split's own (a training has more of them to teach; 2 * MAX_PAIRS at least).
    Errors: InvalidParameter for an unknown task or split, a depth outside 0..1, or a length that the statements alone exceed.
    """
    if task not in TASKS:
        raise InvalidParameter(f"unknown retrieval task {task!r}: one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise InvalidParameter(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    if not 0 <= depth <= 1:
        raise InvalidParameter(f"depth is {depth}, and lies between 0 and 1")
    if num_questions < 1:
        raise InvalidParameter(f"num_questions is {num_questions}, and must be at least 1")
    rng = random.Random(f"{task} {length} {depth} {seed} {split}")
    episode = TASKS[task](rng, _Source(split, words or words_of(split)), length, num_questions)
    bare = filler.count("\n".join(episode.statements) + "\n" + episode.questions[0][0])
    if bare > length:
        raise InvalidParameter(f"{task} needs {bare} tokens for its statements and question; the length is {length}")
    sentences = filler.take(rng, length - bare)
    context = _hide(episode.statements, _positions(rng, episode, depth), sentences)
    questions = tuple(("\n" * (place > 0) + question, answer) for place, (question, answer) in enumerate(episode.questions))
    return Sample(task, context, questions, depth, filler.count(context + questions[0][0]))
