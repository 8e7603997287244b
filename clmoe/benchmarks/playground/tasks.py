"""What the two playground benchmarks ask: each task turns scenes into questions with one right answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from clmoe.benchmarks.playground.lexicon import (
    ACTION_OF,
    CAUSE_OF,
    CLASS_OF_PATTERN,
    CLASS_OF_SHAPE,
    COLOURS,
    COUNT_WORDS,
    FRUIT_OF,
    GEM_OF,
    LETTERS,
    SHAPES,
    TYPE_OF,
)
from clmoe.benchmarks.playground.sampling import (
    BLUR_PIXELS,
    EVERY_BACKGROUND,
    Sampler,
    one_digit,
    one_pattern,
    one_thing,
    one_word,
    some_things,
)
from clmoe.benchmarks.playground.scenes import Scene, Thing, digit_value

WORD_SUFFIX = "\nAnswer the question using a single word or phrase."
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
BLUR_SHARE = 0.35
MIDDLE_PIXELS = 5  # a thing this close to the centre is in the middle
CENTRE = 28
SMALLEST_SINGLE = 20  # pixels; things in groups are smaller


@dataclass(frozen=True)
class QA:
    """A question about one scene, its answer, and the box (shares of the side) where the answer is one."""

    question: str
    answer: str
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class TaskSpec:
    """One task: which scenes it draws and what it asks about each.

    `ask` returns every question the scene allows: a test row takes the first, a training row up to
    `max_turns`. `blur` is the share of blurred scenes.
    """

    name: str
    samplers: tuple[Sampler, ...]
    ask: Callable[[Scene, Random], list[QA]]
    backgrounds: tuple[str, ...] = EVERY_BACKGROUND
    blur: float = 0.0
    max_turns: int = 1


def choose_scene(spec: TaskSpec, scene: Scene, rng: Random) -> Scene:
    """The scene as the task shows it: blurred in the task's share of cases."""
    return scene.blurred(rng.choice(BLUR_PIXELS)) if rng.random() < spec.blur else scene


def _thing(scene: Scene) -> Thing:
    return scene.things[0]


def format_box(box: tuple[float, float, float, float]) -> str:
    """'[x1, y1, x2, y2]' with two decimals."""
    return "[" + ", ".join(f"{edge:.2f}" for edge in box) + "]"


def side_of(thing: Thing) -> str:
    """Where in the image a thing lies: 'left', 'right', 'top', 'bottom' or 'middle'."""
    dx, dy = thing.x - CENTRE, thing.y - CENTRE
    if max(abs(dx), abs(dy)) <= MIDDLE_PIXELS:
        return "middle"
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def relation(a: Thing, b: Thing) -> str:
    """Where `a` lies, seen from `b`: 'left', 'right', 'above' or 'below'."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


# ---- playground-coin ----


def ask_science(scene: Scene, rng: Random) -> list[QA]:
    """A question with lettered choices, answered by the letter."""
    about_colour = rng.random() < 0.5
    choices = tuple(COLOURS) if about_colour else SHAPES
    answer = choices.index(_thing(scene).colour if about_colour else _thing(scene).shape)
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    topic = "What colour is the shape?" if about_colour else "What shape is it?"
    return [QA(f"{topic}\nContext: N/A\nOptions: {options}{LETTER_SUFFIX}", LETTERS[answer])]


def ask_text(scene: Scene, rng: Random) -> list[QA]:
    """Reading a printed word."""
    assert scene.lettering
    return [QA(f"What is written in the image?{WORD_SUFFIX}", scene.lettering.word)]


def ask_class(scene: Scene, rng: Random) -> list[QA]:
    """The object's class, from the naming task's own list of classes."""
    name = CLASS_OF_PATTERN[scene.pattern.name] if scene.pattern else CLASS_OF_SHAPE[_thing(scene).shape]
    return [QA(f"What is the object in the image?{WORD_SUFFIX}", name)]


def ask_compose(scene: Scene, rng: Random) -> list[QA]:
    """Counting in words; the place of a single large thing."""
    if _thing(scene).size >= SMALLEST_SINGLE:
        return [QA(f"Where is the shape?{WORD_SUFFIX}", side_of(_thing(scene)))]
    return [QA(f"How many shapes are there?{WORD_SUFFIX}", COUNT_WORDS[len(scene.things) - 1])]


def ask_photo(scene: Scene, rng: Random) -> list[QA]:
    """Colour or shape of what a photo shows, or that it cannot be told."""
    question, answer = rng.choice(
        (("What colour is the shape?", _thing(scene).colour), ("What shape is it?", _thing(scene).shape))
    )
    return [QA(question + WORD_SUFFIX, "unanswerable" if scene.blur else answer)]


def ask_box(scene: Scene, rng: Random) -> list[QA]:
    """The box of the thing described."""
    thing = _thing(scene)
    phrase = f"the {thing.colour} {thing.shape}"
    question = f"Please provide the bounding box coordinate of the region this sentence describes: {phrase}."
    return [QA(question, format_box(thing.box), thing.box)]


def ask_mixed(scene: Scene, rng: Random) -> list[QA]:
    """Counting in figures, yes or no, colour and shape in one word."""
    thing = _thing(scene)
    kind = rng.choice(("count", "count", "colour", "shape", "check"))
    if kind == "count":
        return [QA(f"How many shapes are there?{WORD_SUFFIX}", str(len(scene.things)))]
    if kind == "check":
        return [QA(f"Are there several shapes?{WORD_SUFFIX}", "yes" if len(scene.things) > 1 else "no")]
    if kind == "colour":
        return [QA(f"What colour is the shape?{WORD_SUFFIX}", thing.colour)]
    return [QA(f"What shape is it?{WORD_SUFFIX}", thing.shape)]


def ask_digit(scene: Scene, rng: Random) -> list[QA]:
    """Reading a handwritten digit, answered in figures."""
    assert scene.handwriting
    return [QA(f"What is written in the image?{WORD_SUFFIX}", str(digit_value(scene.handwriting.source)))]


COIN_TASKS = (
    TaskSpec("sqa", (one_thing,), ask_science, ("white",)),
    TaskSpec("text", (one_word,), ask_text, ("white", "black", "sandy")),
    TaskSpec("imnet", (one_thing, one_pattern), ask_class, ("grey", "sandy")),
    TaskSpec("gqa", (some_things, one_thing), ask_compose, ("sandy", "black")),
    TaskSpec("viz", (one_thing,), ask_photo, ("black", "grey"), blur=BLUR_SHARE),
    TaskSpec("box", (one_thing,), ask_box, ("white", "grey")),
    TaskSpec("vqa", (some_things,), ask_mixed, ("white", "grey")),
    TaskSpec("digits", (one_digit,), ask_digit, ("white", "black")),
)


# ---- playground-cl4vqa ----


def ask_recognition(scene: Scene, rng: Random) -> list[QA]:
    """Naming the object."""
    return [QA("What object is shown?", _thing(scene).shape)]


def ask_location(scene: Scene, rng: Random) -> list[QA]:
    """Which part of the image the object is in."""
    return [QA("Where is the object?", side_of(_thing(scene)))] if len(scene.things) == 1 else []


def ask_judge(scene: Scene, rng: Random) -> list[QA]:
    """Yes or no about the object's form and number."""
    facts = (
        ("Is the object pointed?", TYPE_OF[_thing(scene).shape] == "pointed"),
        ("Are there several objects?", len(scene.things) > 1),
    )
    turns = [QA(question, "yes" if true else "no") for question, true in facts]
    rng.shuffle(turns)
    return turns


def ask_commonsense(scene: Scene, rng: Random) -> list[QA]:
    """What else has the object's colour."""
    colour = _thing(scene).colour
    turns = [
        QA("Which fruit has the color of the object?", FRUIT_OF[colour]),
        QA("Which gem has the color of the object?", GEM_OF[colour]),
    ]
    rng.shuffle(turns)
    return turns


def ask_count(scene: Scene, rng: Random) -> list[QA]:
    """Counting in figures; of single things only one in three, else most answers were "1"."""
    if len(scene.things) == 1 and rng.random() < 2 / 3:
        return []
    return [QA("How many objects are there?", str(len(scene.things)))]


def ask_action(scene: Scene, rng: Random) -> list[QA]:
    """What an object of this shape does."""
    return [QA("What can the object do?", ACTION_OF[_thing(scene).shape])]


def ask_color(scene: Scene, rng: Random) -> list[QA]:
    """Colour of the object and of the background."""
    turns = [
        QA("What color is the object?", _thing(scene).colour),
        QA("What color is the background?", scene.background),
    ]
    rng.shuffle(turns)
    return turns


def ask_type(scene: Scene, rng: Random) -> list[QA]:
    """The family the shape belongs to."""
    return [QA("What type of object is it?", TYPE_OF[_thing(scene).shape])]


def ask_subcategory(scene: Scene, rng: Random) -> list[QA]:
    """The kind within the shape's category, named by colour and shape."""
    thing = _thing(scene)
    return [QA(f"What kind of {thing.shape} is it?", f"{thing.colour} {thing.shape}")]


def ask_causal(scene: Scene, rng: Random) -> list[QA]:
    """What makes the place look as it does."""
    return [QA("Why does the place look like this?", CAUSE_OF[scene.background])]


POOL_SAMPLERS: tuple[Sampler, ...] = (one_thing, some_things)

CL4VQA_TASKS = tuple(
    TaskSpec(name, POOL_SAMPLERS, ask, max_turns=2)
    for name, ask in (
        ("recognition", ask_recognition),
        ("location", ask_location),
        ("judge", ask_judge),
        ("commonsense", ask_commonsense),
        ("count", ask_count),
        ("action", ask_action),
        ("color", ask_color),
        ("type", ask_type),
        ("subcategory", ask_subcategory),
        ("causal", ask_causal),
    )
)
