"""Scenes: what can be drawn, how it is drawn, and random scenes of a split.

A scene is a handful of integers, which decide its image and its split: pre-training of the base, training and test
share no scene, whatever seed draws them. Words, field names and the order in which random numbers are taken decide
every file of the benchmark: raise `build.VERSION` with any change to them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE = 56  # pixels
OVERSAMPLING = 3
SPLITS = ("base", "train", "test")
DIGIT_SOURCES = {"base": 700, "train": 697, "test": 400}  # of the 1,797 images of scikit-learn's load_digits
BLUR_PIXELS = (6, 7, 8, 9)

RGB = tuple[int, int, int]


# ---- what can be drawn, and what tasks know about it ----


class Colour(NamedTuple):
    """A colour, and a fruit and a gem that have it."""

    rgb: RGB
    fruit: str
    gem: str


class Background(NamedTuple):
    """A background, and what makes a place look like it."""

    rgb: RGB
    cause: str


class Shape(NamedTuple):
    """An object of this shape, what it does, and the family it belongs to."""

    object: str
    action: str
    type: str


COLOURS = {
    "red": Colour((225, 30, 40), "apple", "ruby"),
    "green": Colour((20, 165, 60), "pear", "emerald"),
    "blue": Colour((50, 100, 255), "berry", "sapphire"),
    "yellow": Colour((245, 205, 0), "banana", "amber"),
    "purple": Colour((150, 50, 200), "grape", "amethyst"),
    "orange": Colour((255, 125, 10), "peach", "topaz"),
}
BACKGROUNDS = {
    "white": Background((250, 250, 250), "snow"),
    "black": Background((18, 18, 28), "night"),
    "grey": Background((165, 175, 190), "rain"),
    "sandy": Background((228, 208, 170), "desert"),
}
SHAPES = {
    "circle": Shape("Ball", "roll", "round"),
    "square": Shape("Brick", "stack", "blocky"),
    "triangle": Shape("Tent", "point", "pointed"),
    "cross": Shape("Windmill", "turn", "blocky"),
    "star": Shape("Starfish", "shine", "pointed"),
}
PATTERNS = {
    "columns": "Zebra", "rows": "Ladder", "tiles": "Chessboard", "dots": "Ladybird", "mesh": "Fence", "rings": "Target",
}  # fmt: skip
"""Patterns, each with an object that has it."""

WORDS = (
    "cat", "dog", "sun", "map", "tea", "bus", "hat", "key",
    "cup", "pen", "jam", "owl", "fox", "log", "net", "ice",
)  # fmt: skip
COUNT_WORDS = ("one", "two", "three", "four", "five")
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = "ABCDEF"

EVERY_BACKGROUND, EVERY_COLOUR, EVERY_SHAPE = tuple(BACKGROUNDS), tuple(COLOURS), tuple(SHAPES)


# ---- scenes ----


class Thing(NamedTuple):
    """A coloured shape centred at (x, y) pixels, `size` pixels wide and high."""

    shape: str
    colour: str
    x: int
    y: int
    size: int

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2) as fractions of the image's side."""
        half = self.size / 2
        edges = (self.x - half, self.y - half, self.x + half, self.y + half)
        x1, y1, x2, y2 = (min(max(edge / SIDE, 0.0), 1.0) for edge in edges)
        return x1, y1, x2, y2


class Lettering(NamedTuple):
    """A word in capitals centred at (x, y), `size` points high."""

    word: str
    colour: str
    x: int
    y: int
    size: int


class Handwriting(NamedTuple):
    """Image `source` of load_digits centred at (x, y), `size` pixels wide and high."""

    source: int
    x: int
    y: int
    size: int


class Pattern(NamedTuple):
    """A texture over the whole image, repeated every `period` pixels and shifted by the phases (pixels)."""

    name: str
    colour: str
    period: int
    phase_x: int
    phase_y: int


@dataclass(frozen=True)
class Scene:
    """Things in sorted order, or one word, digit or pattern, on a background.

    `blur` (pixels) makes it unreadable and is not part of the key: a scene and its blurred twin share a split.
    """

    background: str
    things: tuple[Thing, ...] = ()
    lettering: Lettering | None = None
    handwriting: Handwriting | None = None
    pattern: Pattern | None = None
    blur: int = 0

    @property
    def kind(self) -> str:
        """'things', 'word', 'digit' or 'pattern'."""
        if self.lettering:
            return "word"
        if self.handwriting:
            return "digit"
        return "pattern" if self.pattern else "things"

    @property
    def key(self) -> str:
        """The scene's parameters as text: equal keys mean equal images, up to blur."""
        return f"{self.kind}/{self.background}/{self.lettering or self.handwriting or self.pattern or self.things!r}"

    @property
    def split(self) -> str:
        """The only split this scene may appear in: ten sixteenths of all scenes are for the base, four for training."""
        if self.handwriting:
            return next(split for split in SPLITS if self.handwriting.source in digit_sources(split))
        bucket = zlib.crc32(self.key.encode()) % 16
        return "base" if bucket < 10 else "train" if bucket < 14 else "test"

    def blurred(self, rng: Random) -> Scene:
        """The same scene out of focus."""
        return replace(self, blur=rng.choice(BLUR_PIXELS))


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: images [1797, 8, 8] uint8 (0..255) and labels [1797]."""
    from sklearn.datasets import load_digits  # a second, which only building the benchmark needs

    digits = load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target


@cache
def digit_sources(split: str) -> tuple[int, ...]:
    """Ids of the source digits of one split; the shuffle never changes."""
    order = np.random.RandomState(1797).permutation(sum(DIGIT_SOURCES.values())).tolist()
    start = sum(DIGIT_SOURCES[before] for before in SPLITS[: SPLITS.index(split)])
    return tuple(order[start : start + DIGIT_SOURCES[split]])


def digit_value(source: int) -> int:
    """The number a source digit shows, 0 to 9."""
    return int(_digits()[1][source])


# ---- drawing ----

_font = cache(ImageFont.load_default)


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of 56 x 56 pixels."""
    canvas = Image.new("RGB", (SIDE * OVERSAMPLING,) * 2, BACKGROUNDS[scene.background].rgb)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw_thing(draw, thing)
    if scene.pattern:
        _draw_pattern(draw, scene.pattern)
    if word := scene.lettering:
        centre = (word.x * OVERSAMPLING, word.y * OVERSAMPLING)
        fill, font = COLOURS[word.colour].rgb, _font(word.size * OVERSAMPLING)
        draw.text(centre, word.word.upper(), fill=fill, font=font, anchor="mm", stroke_width=1, stroke_fill=fill)
    image = canvas.resize((SIDE, SIDE), Image.Resampling.BOX)
    if digit := scene.handwriting:
        mask = Image.fromarray(_digits()[0][digit.source])
        mask = mask.resize((digit.size, digit.size), Image.Resampling.BICUBIC)
        x, y = digit.x - digit.size // 2, digit.y - digit.size // 2
        ink = (245,) * 3 if scene.background == "black" else (20,) * 3
        image.paste(ink, (x, y, x + digit.size, y + digit.size), mask)
    return image.filter(ImageFilter.GaussianBlur(scene.blur)) if scene.blur else image


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y, half = (value * OVERSAMPLING for value in (thing.x, thing.y, thing.size / 2))
    fill = COLOURS[thing.colour].rgb
    box = (x - half, y - half, x + half, y + half)
    if thing.shape == "circle":
        draw.ellipse(box, fill=fill)
    elif thing.shape == "square":
        draw.rectangle(box, fill=fill)
    elif thing.shape == "triangle":
        draw.polygon(((x, y - half), (x - half, y + half), (x + half, y + half)), fill=fill)
    elif thing.shape == "cross":
        arm = half * 0.34
        draw.rectangle((x - half, y - arm, x + half, y + arm), fill=fill)
        draw.rectangle((x - arm, y - half, x + arm, y + half), fill=fill)
    else:
        radii = (half * 1.05, half * 0.42)
        tips = [(radii[i % 2], math.pi * (i / 5 - 0.5)) for i in range(10)]
        draw.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in tips], fill=fill)


def _draw_pattern(draw: ImageDraw.ImageDraw, pattern: Pattern) -> None:
    fill, end, scale = COLOURS[pattern.colour].rgb, SIDE * OVERSAMPLING, OVERSAMPLING
    step = pattern.period * scale
    columns = range((pattern.phase_x % pattern.period) * scale - step, end, step)
    rows = range((pattern.phase_y % pattern.period) * scale - step, end, step)
    if pattern.name == "rings":
        x, y = (SIDE // 2 + phase - pattern.period // 2 for phase in (pattern.phase_x, pattern.phase_y))
        for radius in range(pattern.period // 2, SIDE, pattern.period):
            box = tuple(scale * (c + s * radius) for s in (-1, 1) for c in (x, y))
            draw.ellipse(box, outline=fill, width=step // 2)
    width = step // 4 if pattern.name == "mesh" else step // 2
    if pattern.name in ("columns", "mesh"):
        for x in columns:
            draw.rectangle((x, 0, x + width, end), fill=fill)
    if pattern.name in ("rows", "mesh"):
        for y in rows:
            draw.rectangle((0, y, end, y + width), fill=fill)
    if pattern.name == "tiles":
        for x, y in ((x, y) for i, x in enumerate(columns) for j, y in enumerate(rows) if (i + j) % 2):
            draw.rectangle((x, y, x + step - 1, y + step - 1), fill=fill)
    if pattern.name == "dots":
        for x, y in ((x, y) for x in columns for y in rows):
            draw.ellipse((x, y, x + step * 0.6, y + step * 0.6), fill=fill)


# ---- random scenes, one function for each kind of image ----

Sampler = Callable[[Random, str, Sequence[str]], Scene]
"""``(rng, split, backgrounds)``; the scene may fall into another split, unless it shows a digit."""


def draw(sampler: Sampler, split: str, rng: Random, backgrounds: Sequence[str] = EVERY_BACKGROUND) -> Scene:
    """One scene of a split on one of the backgrounds."""
    while (scene := sampler(rng, split, backgrounds)).split != split:
        pass
    return scene


def draw_distinct(
    sampler: Sampler, split: str, rng: Random, count: int, backgrounds: Sequence[str] = EVERY_BACKGROUND
) -> list[Scene]:
    """`count` scenes of a split, no two with the same parameters."""
    found: dict[str, Scene] = {}
    while len(found) < count:
        scene = draw(sampler, split, rng, backgrounds)
        found.setdefault(scene.key, scene)
    return list(found.values())


def one_thing(rng: Random, split: str, backgrounds: Sequence[str]) -> Scene:
    """A single shape of 22 to 36 pixels anywhere in the image."""
    size = rng.randrange(22, 37)
    margin = size // 2 + 1
    x, y = (rng.randint(margin, SIDE - margin) for _ in range(2))
    return Scene(rng.choice(backgrounds), (Thing(rng.choice(EVERY_SHAPE), rng.choice(EVERY_COLOUR), x, y, size),))


def some_things(rng: Random, split: str, backgrounds: Sequence[str]) -> Scene:
    """One to five equal shapes on a 3 x 3 grid; they never touch."""
    shape, colour, size = rng.choice(EVERY_SHAPE), rng.choice(EVERY_COLOUR), rng.randint(13, 15)
    cells = rng.sample(range(9), rng.randint(1, 5))
    places = [(9 + 19 * (cell % 3) + rng.randint(-1, 1), 9 + 19 * (cell // 3) + rng.randint(-1, 1)) for cell in cells]
    things = [Thing(shape, colour, x, y, size) for x, y in places]
    return Scene(rng.choice(backgrounds), tuple(sorted(things)))


def two_things(rng: Random, split: str, backgrounds: Sequence[str]) -> Scene:
    """Two things that differ in shape and colour, side by side or one above the other."""
    shapes, colours = rng.sample(EVERY_SHAPE, 2), rng.sample(EVERY_COLOUR, 2)
    sizes = [rng.randint(18, 23) for _ in range(2)]
    along = (rng.randint(12, 15), rng.randint(41, 44))
    centre = rng.randint(16, SIDE - 16)
    across = [centre + rng.randint(-3, 3) for _ in range(2)]
    xs, ys = (across, along) if rng.random() < 0.5 else (along, across)
    things = [Thing(*values) for values in zip(shapes, colours, xs, ys, sizes, strict=True)]
    return Scene(rng.choice(backgrounds), tuple(sorted(things)))


def one_word(rng: Random, split: str, backgrounds: Sequence[str]) -> Scene:
    """One of the WORDS in capitals."""
    size = rng.randint(18, 21)
    x, y = 28 + rng.randint(-3, 3), rng.randint(14, 42)
    background = rng.choice(backgrounds)
    return Scene(background, lettering=Lettering(rng.choice(WORDS), rng.choice(EVERY_COLOUR), x, y, size))


def one_digit(rng: Random, split: str, backgrounds: Sequence[str]) -> Scene:
    """A handwritten digit from the split's own sources."""
    size = rng.randint(36, 48)
    x, y = (28 + rng.randint(-4, 4) for _ in range(2))
    return Scene(rng.choice(backgrounds), handwriting=Handwriting(rng.choice(digit_sources(split)), x, y, size))


def one_pattern(rng: Random, split: str, backgrounds: Sequence[str]) -> Scene:
    """A texture over the whole image."""
    period = rng.randint(10, 16)
    phases = (rng.randrange(period), rng.randrange(period))
    background = rng.choice(backgrounds)
    return Scene(background, pattern=Pattern(rng.choice(tuple(PATTERNS)), rng.choice(EVERY_COLOUR), period, *phases))
