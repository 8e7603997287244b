"""Random scenes, one function per kind of image; a draw is repeated until it falls into the right split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from clmoe.benchmarks.playground.lexicon import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, WORDS
from clmoe.benchmarks.playground.scenes import (
    SIDE,
    Handwriting,
    Lettering,
    Pattern,
    Scene,
    Thing,
    digit_sources,
)

EVERY_BACKGROUND = tuple(BACKGROUNDS)
EVERY_COLOUR = tuple(COLOURS)
BLUR_PIXELS = (6, 7, 8, 9)

Sampler = Callable[[Random, str, Sequence[str]], Scene]


def draw(sampler: Sampler, split: str, rng: Random, backgrounds: Sequence[str] = EVERY_BACKGROUND) -> Scene:
    """One scene of a split ('base', 'train' or 'test') on one of the backgrounds."""
    while True:
        scene = sampler(rng, split, backgrounds)
        if scene.split == split:
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
    return Scene(_background(rng, backgrounds), (Thing(rng.choice(SHAPES), rng.choice(EVERY_COLOUR), x, y, size),))


def some_things(rng: Random, split: str, backgrounds: Sequence[str]) -> Scene:
    """One to five equal shapes on a 3 x 3 grid; they never touch."""
    shape, colour, size = rng.choice(SHAPES), rng.choice(EVERY_COLOUR), rng.randint(13, 15)
    cells = rng.sample(range(9), rng.randint(1, 5))
    places = [(9 + 19 * (cell % 3) + rng.randint(-1, 1), 9 + 19 * (cell // 3) + rng.randint(-1, 1)) for cell in cells]
    things = [Thing(shape, colour, x, y, size) for x, y in places]
    return Scene(_background(rng, backgrounds), tuple(sorted(things)))


def two_things(rng: Random, split: str, backgrounds: Sequence[str]) -> Scene:
    """Two shapes, unlike in shape and colour, side by side or one above the other."""
    shapes, colours = rng.sample(SHAPES, 2), rng.sample(EVERY_COLOUR, 2)
    sizes = [rng.randint(18, 23) for _ in range(2)]
    along = (rng.randint(12, 15), rng.randint(41, 44))
    centre = rng.randint(16, SIDE - 16)
    across = [centre + rng.randint(-3, 3) for _ in range(2)]
    places = list(zip(along, across, strict=True))
    if rng.random() < 0.5:
        places = [(y, x) for x, y in places]
    things = [Thing(s, c, x, y, z) for s, c, (x, y), z in zip(shapes, colours, places, sizes, strict=True)]
    return Scene(_background(rng, backgrounds), tuple(sorted(things)))


def one_word(rng: Random, split: str, backgrounds: Sequence[str]) -> Scene:
    """A word of the lexicon in capitals."""
    size = rng.randint(18, 21)
    x, y = 28 + rng.randint(-3, 3), rng.randint(14, 42)
    return Scene(
        _background(rng, backgrounds),
        lettering=Lettering(rng.choice(WORDS), rng.choice(EVERY_COLOUR), x, y, size),
    )


def one_digit(rng: Random, split: str, backgrounds: Sequence[str]) -> Scene:
    """A handwritten digit of the split's own sources."""
    size = rng.randint(36, 48)
    x, y = (28 + rng.randint(-4, 4) for _ in range(2))
    return Scene(_background(rng, backgrounds), handwriting=Handwriting(rng.choice(digit_sources(split)), x, y, size))


def one_pattern(rng: Random, split: str, backgrounds: Sequence[str]) -> Scene:
    """A texture over the whole image."""
    period = rng.randint(10, 16)
    phases = (rng.randrange(period), rng.randrange(period))
    return Scene(
        _background(rng, backgrounds),
        pattern=Pattern(rng.choice(PATTERNS), rng.choice(EVERY_COLOUR), period, *phases),
    )


def _background(rng: Random, backgrounds: Sequence[str]) -> str:
    return rng.choice(tuple(backgrounds))
