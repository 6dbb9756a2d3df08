"""Pictures drawn from latent attributes, with questions that only those attributes answer. Plain numpy.

A picture shows one to four equal shapes in one quarter and a digit in the opposite one. A fifth of the attributes' combinations is held
out: no training picture has them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

SIZE = 64  # pixels a side
SHAPES = ("square", "circle", "triangle", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 40),
    "white": (245, 245, 245),
    "pink": (240, 120, 200),
}
NUMBERS = ("one", "two", "three", "four")
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
_DIGITS = (  # rows of five pixels, as numbers
    (14, 17, 19, 21, 25, 17, 14), (4, 12, 4, 4, 4, 4, 14), (14, 17, 1, 2, 4, 8, 31), (31, 2, 4, 2, 1, 17, 14),
    (2, 6, 10, 18, 31, 2, 2), (31, 16, 30, 1, 1, 17, 14), (6, 8, 16, 30, 17, 17, 14), (31, 1, 2, 4, 8, 8, 8),
    (14, 17, 17, 14, 17, 17, 14), (14, 17, 17, 15, 1, 2, 12),
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """The latent attributes; all but `digit` index the tables above, `count` from 0 for one."""

    shape: int
    colour: int
    count: int
    quarter: int
    digit: int

    @property
    def is_held_out(self) -> bool:
        return (self.shape + 3 * self.colour + 2 * self.count + self.quarter + 3 * self.digit) % 5 == 0

    def render(self, rng: random.Random) -> np.ndarray:
        """float32 [3, SIZE, SIZE] in -1..1; where in its cell a shape stands, its size and the ground's noise are chance."""
        noise = np.random.default_rng(rng.getrandbits(32))
        picture = noise.integers(0, 40, (SIZE, SIZE, 3)).astype(np.float32)
        top, left = divmod(self.quarter, 2)
        colour = list(COLOURS.values())[self.colour]
        for cell in rng.sample(range(4), self.count + 1):
            side = rng.randint(9, 13)
            y = top * 32 + cell // 2 * 16 + rng.randint(1, 15 - side)
            x = left * 32 + cell % 2 * 16 + rng.randint(1, 15 - side)
            picture[y : y + side, x : x + side][mask(SHAPES[self.shape], side)] = colour
        bits = np.array([[row >> (4 - column) & 1 for column in range(5)] for row in _DIGITS[self.digit]], dtype=bool)
        drawn = bits.repeat(3, axis=0).repeat(3, axis=1)
        y, x = (1 - top) * 32 + rng.randint(1, 10), (1 - left) * 32 + rng.randint(1, 15)
        picture[y : y + drawn.shape[0], x : x + drawn.shape[1]][drawn] = 200
        return (picture / 127.5 - 1).transpose(2, 0, 1)

    def questions(self) -> list[tuple[str, str]]:
        """(question, answer) pairs, the caption last."""
        shape, colour, number = SHAPES[self.shape], list(COLOURS)[self.colour], NUMBERS[self.count]
        plural = "" if self.count == 0 else "es" if shape == "cross" else "s"
        return [
            ("Which shape is it?", shape),
            ("Which colour is it?", colour),
            ("How many are there?", number),
            ("Where?", QUARTERS[self.quarter]),
            ("Which digit is it?", str(self.digit)),
            ("What is shown?", f"{number} {colour} {shape}{plural} at the {QUARTERS[self.quarter]} and the digit {self.digit}"),
        ]


def mask(shape: str, side: int) -> np.ndarray:
    """Which of side x side pixels a shape covers."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    if shape == "square":
        return np.ones((side, side), dtype=bool)
    if shape == "circle":
        return x**2 + y**2 <= (side / 2) ** 2
    if shape == "triangle":
        return np.abs(x) <= (y + side / 2) / 2
    return (np.abs(x) <= side / 6) | (np.abs(y) <= side / 6)


def draw(rng: random.Random, *, held_out: bool) -> Scene:
    """A scene of the training's combinations, or of the held-out ones."""
    while True:
        scene = Scene(*(rng.randrange(len(table)) for table in (SHAPES, COLOURS, NUMBERS, QUARTERS, _DIGITS)))
        if scene.is_held_out == held_out:
            return scene
