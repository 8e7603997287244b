"""What is asked about scenes: by the tasks of the embedded benchmarks, and by the mixture that trained the base."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import cast

from clmoe.config import read_yaml
from clmoe.data.records import Turn
from clmoe.embedded import scenes
from clmoe.embedded.scenes import Handwriting, Sampler, Scene, Thing, digit_value, draw

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
    """Colour or shape of what a photo shows, or that this cannot be told."""
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


# ---- playground-long

_FORMS = {
    "sqa": "option {}",
    "text": "word {}",
    "imnet": "object {}",
    "gqa": "{} it is",
    "viz": "it looks {}",
    "box": "{}",  # without brackets: the rule for boxes reads nothing else around them
    "vqa": "answer {}",
    "digits": "number {}",
}
"""Other forms of the answers of playground-coin's tasks."""


def _ask_again(task: TaskSpec, scene: Scene, rng: Random) -> list[Turn]:
    """The task's questions, asking for the answer's other form."""
    form, found = _FORMS[task.name], task.ask(scene, rng)
    asked = [turn.question.removesuffix(WORD_SUFFIX).removesuffix(LETTER_SUFFIX) for turn in found]
    suffix = f"\nAnswer in the form: {form.format('...')}"
    return [Turn(text + suffix, form.format(turn.answer.strip("[]"))) for text, turn in zip(asked, found, strict=True)]


LONG_TASKS = COIN_TASKS + tuple(
    replace(
        task,
        name=f"{task.name}_again",
        ask=partial(_ask_again, task),
        backgrounds=tuple(name for name in scenes.EVERY_BACKGROUND if name not in task.backgrounds),
    )
    for task in COIN_TASKS
)
"""Sixteen: those of playground-coin, and each again in another form and on the backgrounds that it does not use."""

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
    """Only single things have a place; one in three of them is counted, as otherwise most answers would be "1"."""
    single = len(scene.things) == 1
    if (task == "location" and not single) or (task == "count" and single and rng.random() < 2 / 3):
        return []
    known = facts(scene)
    return [Turn(question.format(**known), answer.format(**known)) for question, answer in _POOL_QUESTIONS[task]]


POOL_SAMPLERS = (scenes.one_thing, scenes.some_things)
CL4VQA_TASKS = tuple(TaskSpec(name, POOL_SAMPLERS, partial(_ask_pool, name), max_turns=2) for name in _POOL_QUESTIONS)


# ---- The neutral mixture: captions and namings of every kind of scene
#
# No task uses any of their wordings (`mixture.yaml`). Answers begin with what was asked and go on ("red tint."): the
# base looks at the image before its first answer word but never answers in a task's format.

SHARES: dict[Sampler, float] = {
    scenes.one_thing: 0.24,
    scenes.some_things: 0.18,
    scenes.two_things: 0.20,
    scenes.one_word: 0.16,
    scenes.one_digit: 0.12,
    scenes.one_pattern: 0.10,
}
BLURRED_SHARE = 0.06
LEGEND_SHARE = 0.04
CHECK_SHARE = 0.15
COORDINATE_STEP = 5  # per cent: finer digits would be noise to a 14-pixel patch

SKILLS: dict[str, list[tuple[str, str]]] = read_yaml(Path(__file__).with_name("mixture.yaml"))
"""The wordings of each skill: a question and its answer, with fields in braces."""


def sample_scene(rng: Random) -> Scene:
    """One scene of the base's split."""
    scene = draw(rng.choices(list(SHARES), list(SHARES.values()))[0], "base", rng)
    return scene.blurred(rng) if rng.random() < BLURRED_SHARE else scene


def sample_turns(scene: Scene, rng: Random, count: int) -> list[Turn]:
    """`count` independent questions and answers about a scene of the base's split."""
    if scene.blur:
        return [_fill("unclear", rng) for _ in range(count)]
    pair = len({thing.shape for thing in scene.things}) == 2
    makers = {"word": _word_turn, "digit": _digit_turn, "pattern": _pattern_turn, "things": _group_turn}
    make = _pair_turn if pair else makers[scene.kind]
    return [make(scene, rng) for _ in range(count)]


def _fill(skill: str, rng: Random, **fields: str) -> Turn:
    question, answer = rng.choice(SKILLS[skill])
    return Turn(question.format(**fields), answer.format(**fields))


def _word_turn(scene: Scene, rng: Random) -> Turn:
    assert scene.lettering
    word = scene.lettering.word
    if rng.random() < LEGEND_SHARE:
        return _legend(word, scenes.WORDS, rng)
    skill = rng.choices(("reading", "colour", "ground"), (0.85, 0.1, 0.05))[0]
    return _fill(skill, rng, word=word, colour=scene.lettering.colour, background=scene.background)


def _digit_turn(scene: Scene, rng: Random) -> Turn:
    assert scene.handwriting
    value = digit_value(scene.handwriting.source)
    skill = rng.choices(("handwriting", "ground"), (0.95, 0.05))[0]
    return _fill(skill, rng, digit=scenes.DIGIT_WORDS[value], figure=str(value), background=scene.background)


def _pattern_turn(scene: Scene, rng: Random) -> Turn:
    assert scene.pattern
    name, colour = scene.pattern.name, scene.pattern.colour
    skill = rng.choices(("pattern", "colour", "ground"), (0.65, 0.25, 0.1))[0]
    return _fill(skill, rng, pattern=name, colour=colour, background=scene.background, object=scenes.PATTERNS[name])


def _group_turn(scene: Scene, rng: Random) -> Turn:
    """About one thing, or several that are alike."""
    thing, count = scene.things[0], len(scene.things)
    if rng.random() < LEGEND_SHARE:
        return _legend(*rng.choice(((thing.colour, scenes.EVERY_COLOUR), (thing.shape, scenes.EVERY_SHAPE))), rng)
    if rng.random() < CHECK_SHARE:
        return _check(scene, rng)
    if count == 1 and rng.random() < 0.42:
        if rng.random() < 0.35:
            return _fill("place", rng, side=side_of(thing))
        return _coordinates(thing, rng.choice(("it", "the object", f"the {thing.colour} {thing.shape}")), rng)
    if count > 1 and rng.random() < 0.35:
        skill = rng.choice(("amount", "figure"))
    else:
        frequent = ("colour", "shape", "ground", "mood", "manner")
        skill = rng.choice((*frequent, *frequent, "both", "amount", "figure", "likeness"))
    return _fill(skill, rng, **facts(scene))


def _pair_turn(scene: Scene, rng: Random) -> Turn:
    """About one of two unlike things."""
    a, b = rng.sample(scene.things, 2)
    kind = rng.random()
    if kind < 0.25:
        return _coordinates(a, _mention(a, rng), rng)
    if kind < 0.33:
        return _check(scene, rng)
    phrases = {"it": _mention(a, rng), "other": _mention(b, rng)}
    return _fill("relation", rng, colour=a.colour, shape=a.shape, relation=relation(a, b), **phrases)


def _mention(thing: Thing, rng: Random) -> str:
    return rng.choice((f"the {thing.colour} {thing.shape}", f"the {thing.shape}", f"the {thing.colour} thing"))


def _coordinates(thing: Thing, phrase: str, rng: Random) -> Turn:
    steps = [round(edge * 100 / COORDINATE_STEP) * COORDINATE_STEP for edge in thing.box]
    x1, y1, x2, y2 = (f"{min(step, 99):02d}" for step in steps)
    return _fill("coordinates", rng, it=phrase, x1=x1, y1=y1, x2=x2, y2=y2)


def _check(scene: Scene, rng: Random) -> Turn:
    """A shape or colour that is or is not in the scene, equally often."""
    shapes, colours = {thing.shape for thing in scene.things}, {thing.colour for thing in scene.things}
    present, names = rng.choice(((shapes, scenes.EVERY_SHAPE), (colours, scenes.EVERY_COLOUR)))
    true = rng.random() < 0.5
    claim = rng.choice([name for name in names if (name in present) == true])
    return _fill("check", rng, claim=claim, verdict="yes, it is so" if true else "no, it is not so")


def _legend(answer: str, names: tuple[str, ...], rng: Random) -> Turn:
    """A list of names in random order, each after its letter; the answer is the letter of the right one."""
    others = [name for name in names if name != answer]
    chosen = rng.sample(others, min(rng.randint(2, 5), len(others)))
    chosen.insert(rng.randint(0, len(chosen)), answer)
    legend = ", ".join(f"{letter} {name}" for letter, name in zip(scenes.LETTERS, chosen, strict=False))
    return _fill("legend", rng, legend=legend, letter=scenes.LETTERS[chosen.index(answer)])


# ---- General ability: what the mixture taught the base, asked about scenes that it was never trained on

_GENERAL: dict[str, dict[Sampler, tuple[str, ...]]] = {
    "naming": {scenes.one_thing: ("colour", "shape", "ground"), scenes.one_pattern: ("pattern",)},
    "counting": {scenes.some_things: ("amount", "figure")},
    "reading": {scenes.one_word: ("reading",), scenes.one_digit: ("handwriting",)},
    "linking": {scenes.one_thing: ("mood", "likeness", "manner")},
}
"""Skills of the mixture by kind of image."""
_FIELD = re.compile(r"\{(\w+)\}")


def _ask_general(skills: dict[str, tuple[str, ...]], scene: Scene, rng: Random) -> list[Turn]:
    """One of the skills' wordings whose answer states one fact; that fact is the expected answer."""
    known = {"word": scene.lettering.word} if scene.lettering else {}
    if scene.handwriting:
        value = digit_value(scene.handwriting.source)
        known = {"digit": scenes.DIGIT_WORDS[value], "figure": str(value)}
    if scene.pattern:
        known = {"pattern": scene.pattern.name, "object": scenes.PATTERNS[scene.pattern.name]}
    known = known or facts(scene)
    asked = [(question, _FIELD.findall(answer)) for skill in skills[scene.kind] for question, answer in SKILLS[skill]]
    question, (fact,) = rng.choice([pair for pair in asked if len(pair[1]) == 1])
    return [Turn(question, known[fact])]


_KINDS: dict[Sampler, str] = {scenes.one_pattern: "pattern", scenes.one_word: "word", scenes.one_digit: "digit"}
GENERAL_SETS = tuple(
    TaskSpec(
        name, tuple(skills), partial(_ask_general, {_KINDS.get(kind, "things"): own for kind, own in skills.items()})
    )
    for name, skills in _GENERAL.items()
)
