"""What the two embedded benchmarks ask: each task turns scenes into questions that have one right answer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import cast

from clmoe.data.records import Turn
from clmoe.embedded import scenes
from clmoe.embedded.scenes import Handwriting, Sampler, Scene, Thing, digit_value

WORD_SUFFIX = "\nAnswer the question using a single word or phrase."
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
MIDDLE_PIXELS = 5  # a thing this close to the centre is in the middle
SMALLEST_SINGLE = 20  # pixels; things in groups are smaller


@dataclass(frozen=True)
class TaskSpec:
    """Which scenes a task draws, a fraction `blur` of them blurred, and every question that it asks about one.

    A test row takes the first question, a training row up to `max_turns`.
    """

    name: str
    samplers: tuple[Sampler, ...]
    ask: Callable[[Scene, Random], list[Turn]]
    backgrounds: tuple[str, ...] = scenes.EVERY_BACKGROUND
    blur: float = 0.0
    boxes: bool = False
    max_turns: int = 1

    def turns(self, scene: Scene, rng: Random) -> list[Turn]:
        """The task's questions about a scene, in random order."""
        turns = self.ask(scene, rng)
        rng.shuffle(turns)
        return turns


def side_of(thing: Thing) -> str:
    """Where in the image a thing lies: 'left', 'right', 'top', 'bottom' or 'middle'."""
    dx, dy = thing.x - scenes.SIDE // 2, thing.y - scenes.SIDE // 2
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


def facts(scene: Scene) -> dict[str, str]:
    """What can be said about one thing, or several that are alike, by the name of the fact."""
    thing, count = scene.things[0], len(scene.things)
    colour, shape = scenes.COLOURS[thing.colour], scenes.SHAPES[thing.shape]
    return {
        "colour": thing.colour, "fruit": colour.fruit, "gem": colour.gem,
        "shape": thing.shape, "object": shape.object, "action": shape.action, "type": shape.type,
        "pointed": "yes" if shape.type == "pointed" else "no", "side": side_of(thing),
        "amount": scenes.COUNT_WORDS[count - 1], "figure": str(count), "several": "yes" if count > 1 else "no",
        "background": scene.background, "cause": scenes.BACKGROUNDS[scene.background].cause,
    }  # fmt: skip


# ---- playground-coin ----


def _ask_science(scene: Scene, rng: Random) -> list[Turn]:
    """A question with lettered choices, answered by the letter."""
    (thing,) = scene.things
    about_colour = rng.random() < 0.5
    choices = scenes.EVERY_COLOUR if about_colour else scenes.EVERY_SHAPE
    answer = choices.index(thing.colour if about_colour else thing.shape)
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(scenes.LETTERS, choices, strict=False))
    topic = "What colour is the shape?" if about_colour else "What shape is it?"
    return [Turn(f"{topic}\nContext: N/A\nOptions: {options}{LETTER_SUFFIX}", scenes.LETTERS[answer])]


def _ask_written(scene: Scene, rng: Random) -> list[Turn]:
    """Reading a printed word, or a handwritten digit, which is answered in figures."""
    written = scene.lettering.word if scene.lettering else str(digit_value(cast(Handwriting, scene.handwriting).source))
    return [Turn(f"What is written in the image?{WORD_SUFFIX}", written)]


def _ask_class(scene: Scene, rng: Random) -> list[Turn]:
    """The object's class, from the naming task's own list of classes."""
    name = scenes.PATTERNS[scene.pattern.name] if scene.pattern else scenes.SHAPES[scene.things[0].shape].object
    return [Turn(f"What is the object in the image?{WORD_SUFFIX}", name)]


def _ask_compose(scene: Scene, rng: Random) -> list[Turn]:
    """Counting in words; the place of a single large thing."""
    thing = scene.things[0]
    if thing.size >= SMALLEST_SINGLE:
        return [Turn(f"Where is the shape?{WORD_SUFFIX}", side_of(thing))]
    return [Turn(f"How many shapes are there?{WORD_SUFFIX}", scenes.COUNT_WORDS[len(scene.things) - 1])]


def _ask_photo(scene: Scene, rng: Random) -> list[Turn]:
    """Colour or shape of what a photo shows, or that it cannot be told."""
    (thing,) = scene.things
    question, answer = rng.choice((("What colour is the shape?", thing.colour), ("What shape is it?", thing.shape)))
    return [Turn(question + WORD_SUFFIX, "unanswerable" if scene.blur else answer)]


def _ask_box(scene: Scene, rng: Random) -> list[Turn]:
    """The box of the thing described: '[x1, y1, x2, y2]' with two decimals."""
    (thing,) = scene.things
    asked = "Please provide the bounding box coordinate of the region this sentence describes: "
    return [Turn(f"{asked}the {thing.colour} {thing.shape}.", f"[{', '.join(f'{edge:.2f}' for edge in thing.box)}]")]


def _ask_mixed(scene: Scene, rng: Random) -> list[Turn]:
    """Counting in figures (twice as often as the others), yes or no, colour and shape in one word."""
    count = ("How many shapes are there?", "figure")
    colour, shape = ("What colour is the shape?", "colour"), ("What shape is it?", "shape")
    question, fact = rng.choice((count, count, colour, shape, ("Are there several shapes?", "several")))
    return [Turn(question + WORD_SUFFIX, facts(scene)[fact])]


COIN_TASKS = (
    TaskSpec("sqa", (scenes.one_thing,), _ask_science, ("white",)),
    TaskSpec("text", (scenes.one_word,), _ask_written, ("white", "black", "sandy")),
    TaskSpec("imnet", (scenes.one_thing, scenes.one_pattern), _ask_class, ("grey", "sandy")),
    TaskSpec("gqa", (scenes.some_things, scenes.one_thing), _ask_compose, ("sandy", "black")),
    TaskSpec("viz", (scenes.one_thing,), _ask_photo, ("black", "grey"), blur=0.35),
    TaskSpec("box", (scenes.one_thing,), _ask_box, ("white", "grey"), boxes=True),
    TaskSpec("vqa", (scenes.some_things,), _ask_mixed, ("white", "grey")),
    TaskSpec("digits", (scenes.one_digit,), _ask_written, ("white", "black")),
)


# ---- playground-cl4vqa ----

_POOL_QUESTIONS = {
    "recognition": [("What object is shown?", "{shape}")],
    "location": [("Where is the object?", "{side}")],
    "judge": [("Is the object pointed?", "{pointed}"), ("Are there several objects?", "{several}")],
    "commonsense": [
        ("Which fruit has the color of the object?", "{fruit}"),
        ("Which gem has the color of the object?", "{gem}"),
    ],
    "count": [("How many objects are there?", "{figure}")],
    "action": [("What can the object do?", "{action}")],
    "color": [("What color is the object?", "{colour}"), ("What color is the background?", "{background}")],
    "type": [("What type of object is it?", "{type}")],
    "subcategory": [("What kind of {shape} is it?", "{colour} {shape}")],
    "causal": [("Why does the place look like this?", "{cause}")],
}
"""Questions and answers of each task, with `facts` in braces."""


def _ask_pool(task: str, scene: Scene, rng: Random) -> list[Turn]:
    """Only single things have a place; of them one in three is counted, else most answers would be "1"."""
    single = len(scene.things) == 1
    if (task == "location" and not single) or (task == "count" and single and rng.random() < 2 / 3):
        return []
    known = facts(scene)
    return [Turn(question.format(**known), answer.format(**known)) for question, answer in _POOL_QUESTIONS[task]]


POOL_SAMPLERS = (scenes.one_thing, scenes.some_things)
CL4VQA_TASKS = tuple(TaskSpec(name, POOL_SAMPLERS, partial(_ask_pool, name), max_turns=2) for name in _POOL_QUESTIONS)
