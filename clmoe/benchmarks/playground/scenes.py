"""A scene is a handful of integers; drawing it gives the image. Nothing here is random.

The parameters decide the scene's split: base pre-training, training and test are disjoint by construction,
whatever seed draws them (`Scene.split`). A handwritten digit is split by the source image it shows.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from clmoe.benchmarks.playground.lexicon import BACKGROUNDS, COLOURS

SIDE = 56  # pixels
OVERSAMPLING = 3
SPLITS = ("base", "train", "test")
SPLIT_SHARES = (10, 4, 2)  # of 16
DIGIT_SOURCES = {"base": 700, "train": 697, "test": 400}  # scikit-learn's load_digits holds 1,797 images


class Thing(NamedTuple):
    """A coloured shape centred at (x, y) pixels, `size` pixels wide and high."""

    shape: str
    colour: str
    x: int
    y: int
    size: int

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2) as shares of the image's side."""
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
    """A texture over the whole image, repeated every `period` pixels, shifted by the phases (pixels)."""

    name: str
    colour: str
    period: int
    phase_x: int
    phase_y: int


@dataclass(frozen=True)
class Scene:
    """What one image shows: things, or one word, digit or pattern, on a background.

    `blur` (pixels) makes the scene unreadable; it is not part of the key, so that a scene and its blurred
    twin share a split.
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
        """The scene's parameters as text: equal keys, equal images up to blur."""
        content = self.lettering or self.handwriting or self.pattern or tuple(sorted(self.things))
        return f"{self.kind}/{self.background}/{content!r}"

    @property
    def split(self) -> str:
        """The only split this scene may appear in: 'base', 'train' or 'test'."""
        if self.handwriting:
            return digit_split(self.handwriting.source)
        bucket = zlib.crc32(self.key.encode()) % sum(SPLIT_SHARES)
        for split, share in zip(SPLITS, SPLIT_SHARES, strict=True):
            bucket -= share
            if bucket < 0:
                return split
        raise AssertionError("the shares cover every bucket")

    def blurred(self, pixels: int) -> Scene:
        """The same scene seen through a blur of this radius."""
        return replace(self, blur=pixels)


@cache
def digit_arrays() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: images [1797, 8, 8] uint8 (0..255) and labels [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target


@cache
def digit_sources(split: str) -> tuple[int, ...]:
    """Ids of the source digits of one split; the shuffle is fixed for ever."""
    order = np.random.RandomState(1797).permutation(sum(DIGIT_SOURCES.values()))
    start = 0
    for name, count in DIGIT_SOURCES.items():
        if name == split:
            return tuple(int(source) for source in order[start : start + count])
        start += count
    raise KeyError(split)


@cache
def _split_of_digits() -> dict[int, str]:
    return {source: split for split in SPLITS for source in digit_sources(split)}


def digit_split(source: int) -> str:
    """The split that owns a source digit."""
    return _split_of_digits()[source]


def digit_value(source: int) -> int:
    """The number a source digit shows, 0 to 9."""
    return int(digit_arrays()[1][source])


def render(scene: Scene) -> Image.Image:
    """Draw a scene.

    Returns:
        RGB image, 56 x 56 pixels; the same bytes for the same scene.
    """
    canvas = Image.new("RGB", (SIDE * OVERSAMPLING,) * 2, BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw_thing(draw, thing)
    if scene.pattern:
        _draw_pattern(draw, scene.pattern)
    if scene.lettering:
        _draw_word(draw, scene.lettering)
    image = canvas.resize((SIDE, SIDE), Image.Resampling.BOX)
    if scene.handwriting:
        _paste_digit(image, scene.handwriting, ink=_ink(scene.background))
    return image.filter(ImageFilter.GaussianBlur(scene.blur)) if scene.blur else image


def _ink(background: str) -> tuple[int, int, int]:
    return (245, 245, 245) if background == "black" else (20, 20, 20)


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y, half = (value * OVERSAMPLING for value in (thing.x, thing.y, thing.size / 2))
    fill = COLOURS[thing.colour]
    if thing.shape == "circle":
        draw.ellipse((x - half, y - half, x + half, y + half), fill=fill)
    elif thing.shape == "square":
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
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
    fill, end, scale = COLOURS[pattern.colour], SIDE * OVERSAMPLING, OVERSAMPLING
    step = pattern.period * scale
    columns = range((pattern.phase_x % pattern.period) * scale - step, end, step)
    rows = range((pattern.phase_y % pattern.period) * scale - step, end, step)
    if pattern.name == "rings":
        x, y = (SIDE // 2 + phase - pattern.period // 2 for phase in (pattern.phase_x, pattern.phase_y))
        for radius in range(pattern.period // 2, SIDE, pattern.period):
            box = tuple(scale * (c + s * radius) for s in (-1, 1) for c in (x, y))
            draw.ellipse(box, outline=fill, width=step // 2)
    if pattern.name in ("columns", "mesh"):
        width = step // 2 if pattern.name == "columns" else step // 4
        for x in columns:
            draw.rectangle((x, 0, x + width, end), fill=fill)
    if pattern.name in ("rows", "mesh"):
        width = step // 2 if pattern.name == "rows" else step // 4
        for y in rows:
            draw.rectangle((0, y, end, y + width), fill=fill)
    if pattern.name in ("tiles", "dots"):
        shape = draw.rectangle if pattern.name == "tiles" else draw.ellipse
        for i, x in enumerate(columns):
            for j, y in enumerate(rows):
                if pattern.name == "dots":
                    shape((x, y, x + step * 0.6, y + step * 0.6), fill=fill)
                elif (i + j) % 2:
                    shape((x, y, x + step - 1, y + step - 1), fill=fill)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * OVERSAMPLING)


def _draw_word(draw: ImageDraw.ImageDraw, lettering: Lettering) -> None:
    centre = (lettering.x * OVERSAMPLING, lettering.y * OVERSAMPLING)
    draw.text(
        centre,
        lettering.word.upper(),
        fill=COLOURS[lettering.colour],
        font=_font(lettering.size),
        anchor="mm",
        stroke_width=1,
        stroke_fill=COLOURS[lettering.colour],
    )


def _paste_digit(image: Image.Image, writing: Handwriting, ink: tuple[int, int, int]) -> None:
    mask = Image.fromarray(digit_arrays()[0][writing.source])
    mask = mask.resize((writing.size, writing.size), Image.Resampling.BICUBIC)
    corner = (writing.x - writing.size // 2, writing.y - writing.size // 2)
    image.paste(ink, (*corner, corner[0] + writing.size, corner[1] + writing.size), mask)
