"""The neutral mixture the base is pre-trained on: captions and namings of every kind of scene.

Each skill has several wordings, and none of them is a wording of a task: no task question, no suffix, no
bracketed option or box. Answers begin with what was asked and go on ("red tint."), so that the base looks at
the image before its first answer word but never answers in a task's format.
"""

from __future__ import annotations

from random import Random

from clmoe.benchmarks.playground.lexicon import (
    ACTION_OF,
    CAUSE_OF,
    CLASS_OF_PATTERN,
    CLASS_OF_SHAPE,
    COLOURS,
    COUNT_WORDS,
    DIGIT_WORDS,
    FRUIT_OF,
    GEM_OF,
    LETTERS,
    SHAPES,
    TYPE_OF,
    WORDS,
)
from clmoe.benchmarks.playground.sampling import (
    BLUR_PIXELS,
    Sampler,
    draw,
    one_digit,
    one_pattern,
    one_thing,
    one_word,
    some_things,
    two_things,
)
from clmoe.benchmarks.playground.scenes import Scene, Thing, digit_value
from clmoe.benchmarks.playground.tasks import relation, side_of

SHARES: tuple[tuple[Sampler, float], ...] = (
    (one_thing, 0.24),
    (some_things, 0.18),
    (two_things, 0.20),
    (one_word, 0.16),
    (one_digit, 0.12),
    (one_pattern, 0.10),
)
BLURRED_SHARE = 0.06
LEGEND_SHARE = 0.04
CHECK_SHARE = 0.15
COORDINATE_STEP = 5  # per cent: finer digits would be noise to a 14-pixel patch

Skill = tuple[tuple[str, str], ...]  # (question, answer) wordings with fields in braces

COLOUR: Skill = (
    ("Name the colour.", "{c} tint."),
    ("Say which color this has.", "{c}, it seems."),
    ("The tint in the image?", "{c} paint."),
    ("What is the tint of the object?", "{c} it is."),
    ("Which color does the shape have?", "{c}, no other."),
    ("Tell the colour of the figure.", "{c} colour."),
    ("Finish this line: the tint is", "{c} here."),
    ("Speak about the colour.", "The colour is {c}."),
)
SHAPE: Skill = (
    ("Name the shape.", "{s} shape."),
    ("Say which form this has.", "{s}, it seems."),
    ("The outline in the image?", "{s} outline."),
    ("What is the form of the object?", "{s} it is."),
    ("Which shape does the figure have?", "{s}, no other."),
    ("Tell the kind of figure shown.", "{s} figure."),
    ("Finish this line: it looks like a", "{s} here."),
    ("Speak about the form.", "The form is a {s}."),
)
BOTH: Skill = (
    ("Describe it.", "{a} {c} {s}."),
    ("Caption this image.", "{c} {s} on {b}."),
    ("What is there to see?", "{c} {s}, {a} of it."),
    ("Name the object with its tint.", "{c} {s} it is."),
    ("Which kind of thing is shown?", "{c} {s} kind."),
    ("Write a line about the shape.", "There is {a} {c} {s} on {b}."),
)
AMOUNT: Skill = (
    ("Name the amount.", "{a} of them."),
    ("Say how much there is to count.", "{a}, it seems."),
    ("The number of things in words?", "{a} in all."),
    ("Count the objects.", "{a} to count."),
    ("What is the amount of shapes?", "{a} pieces."),
    ("Speak about the amount.", "They are {a}."),
)
FIGURE: Skill = (
    ("Name the amount in figures.", "{n} of them."),
    ("The number of things as a figure?", "{n} in all."),
    ("Count the objects and note it.", "{n} to note."),
    ("Note the amount of shapes.", "{n} pieces."),
    ("Write how many as a numeral.", "{n} written."),
)
GROUND: Skill = (
    ("Name the background.", "{b} ground."),
    ("What lies behind the object?", "{b} paint."),
    ("The tint of the background?", "{b}, it seems."),
    ("Tell the color behind the shape.", "{b} it is."),
    ("Speak about the place.", "The place is {b}."),
)
MOOD: Skill = (
    ("What does the background remind you of?", "{cause}, by its look."),
    ("Name a mood for the place.", "{cause} mood."),
    ("This looks as if there were", "{cause} about."),
    ("Why such a place?", "{cause} maybe."),
    ("Say what the background is like.", "{cause}, it seems."),
)
LIKENESS: Skill = (
    ("What fruit comes to mind?", "{fruit}, by its tint."),
    ("Name a fruit for the colour.", "{fruit} tint."),
    ("A fruit of such color?", "{fruit} it is."),
    ("What gem comes to mind?", "{gem}, by its tint."),
    ("Name a gem for the colour.", "{gem} tint."),
    ("A gem of such color?", "{gem} it is."),
)
MANNER: Skill = (
    ("What does such a figure do?", "{action}, it may."),
    ("Name its action.", "{action} action."),
    ("What would the shape do now?", "{action} maybe."),
    ("A thing of this form may", "{action} here."),
    ("Name its type.", "{type} type."),
    ("Is the form round, blocky or pointed?", "{type} form."),
    ("Of which type is this?", "{type}, it seems."),
    ("What object is of this form?", "{class} maybe."),
    ("Name an object like it.", "{class} like."),
    ("What class is the object of?", "{class}, it seems."),
)
PATTERN: Skill = (
    ("Name the pattern.", "{p} pattern."),
    ("What covers the image?", "{c} {p}."),
    ("Describe it.", "{c} {p} on {b}."),
    ("Which pattern does this have?", "{p}, it seems."),
    ("What object is of this pattern?", "{class} maybe."),
    ("Name an object like it.", "{class} like."),
    ("What class is the object of?", "{class}, it seems."),
)
READING: Skill = (
    ("Read it.", "{w} it says."),
    ("What does the image say?", "{w}, it seems."),
    ("Tell the word.", "{w} is the word."),
    ("Which word is printed?", "{w} in print."),
    ("What is to be read?", "{w} to read."),
    ("Read the letters in the image.", "{w} is written."),
    ("Finish this line: the word is", "{w} here."),
    ("Speak about the word.", "The word is {w}."),
    ("Describe it.", "{w} in {c} letters on {b}."),
)
HANDWRITING: Skill = (
    ("Read it.", "{d} it says."),
    ("What does the image say?", "{d}, it seems."),
    ("Tell the digit.", "{d} is the digit."),
    ("Which number is drawn by hand?", "{d} by hand."),
    ("What is to be read?", "{d} to read."),
    ("Speak about the digit.", "The digit is {d}."),
    ("Note the digit as a figure.", "{f} by hand."),
    ("Tell the digit as a numeral.", "{f} is drawn."),
    ("Describe it.", "{d} drawn by hand on {b}."),
)
UNCLEAR: Skill = (
    ("Describe it.", "unanswerable, too much blur."),
    ("Name the colour.", "unanswerable by blur."),
    ("Name the shape.", "unanswerable by blur."),
    ("Is it sharp?", "no, it is a blur."),
    ("What is there to see?", "unanswerable, just blur."),
    ("Read it.", "unanswerable by blur."),
)
PLACE: Skill = (
    ("Where does it sit?", "{side} part."),
    ("Name the place of the object.", "{side} place."),
    ("Which part of the image holds the shape?", "{side}, it seems."),
    ("Finish this line: it is in the part called", "{side} here."),
    ("Speak about where it is.", "It is at the {side}."),
)
COORDINATES: Skill = (
    ("Locate {it}.", "{x1} {y1} to {x2} {y2}."),
    ("Give the edges of {it}.", "left {x1} top {y1} right {x2} bottom {y2}."),
    ("Which region does {it} fill?", "from {x1}, {y1} to {x2}, {y2}."),
    ("Provide the corners of {it}.", "0.{x1} 0.{y1} and 0.{x2} 0.{y2} are the corners."),
    ("Measure {it} in the image.", "x {x1} y {y1} x {x2} y {y2}."),
    ("Where in the image does {it} begin and end?", "at 0.{x1}, 0.{y1} and at 0.{x2}, 0.{y2}."),
)
RELATION: Skill = (
    ("Tell the place of {it}.", "{r} of the other."),
    ("Which side is {it} on?", "{r} side."),
    ("Seen from {other}, find {it}.", "{r} of it."),
    ("How does {it} lie to {other}?", "{r}, it seems."),
    ("Where does {it} lie?", "{r} it is."),
    ("Say where {it} stands.", "{r} it stands."),
    ("Speak about {it}.", "It is {r} of {other}."),
    ("What is {r} of {other}?", "{c} {s} there."),
    ("Which object is {r}?", "{c} {s} it is."),
)


def sample_scene(rng: Random) -> Scene:
    """One scene of the base's split."""
    samplers, shares = zip(*SHARES, strict=True)
    scene = draw(rng.choices(samplers, shares)[0], "base", rng)
    return scene.blurred(rng.choice(BLUR_PIXELS)) if rng.random() < BLURRED_SHARE else scene


def sample_turns(scene: Scene, rng: Random, count: int) -> list[tuple[str, str]]:
    """`count` independent (question, answer) pairs about a scene of the base's split."""
    if scene.blur:
        return [rng.choice(UNCLEAR) for _ in range(count)]
    makers = {"word": _word_turn, "digit": _digit_turn, "pattern": _pattern_turn, "things": _things_turn}
    return [makers[scene.kind](scene, rng) for _ in range(count)]


def _fill(skill: Skill, rng: Random, **fields: str) -> tuple[str, str]:
    question, answer = rng.choice(skill)
    return question.format(**fields), answer.format(**fields)


def _word_turn(scene: Scene, rng: Random) -> tuple[str, str]:
    assert scene.lettering
    word = scene.lettering.word
    if rng.random() < LEGEND_SHARE:
        return _legend(word, list(WORDS), rng)
    skill = rng.choices((READING, COLOUR, GROUND), (0.85, 0.1, 0.05))[0]
    return _fill(skill, rng, w=word, c=scene.lettering.colour, b=scene.background)


def _digit_turn(scene: Scene, rng: Random) -> tuple[str, str]:
    assert scene.handwriting
    value = digit_value(scene.handwriting.source)
    skill = rng.choices((HANDWRITING, GROUND), (0.95, 0.05))[0]
    return _fill(skill, rng, d=DIGIT_WORDS[value], f=str(value), b=scene.background)


def _pattern_turn(scene: Scene, rng: Random) -> tuple[str, str]:
    assert scene.pattern
    name, colour = scene.pattern.name, scene.pattern.colour
    fields = {"p": name, "c": colour, "b": scene.background, "class": CLASS_OF_PATTERN[name]}
    return _fill(rng.choices((PATTERN, COLOUR, GROUND), (0.65, 0.25, 0.1))[0], rng, **fields)


def _things_turn(scene: Scene, rng: Random) -> tuple[str, str]:
    alike = len({thing.shape for thing in scene.things}) == 1
    return _group_turn(scene, rng) if alike else _pair_turn(scene, rng)


def _group_turn(scene: Scene, rng: Random) -> tuple[str, str]:
    thing, count = scene.things[0], len(scene.things)
    if rng.random() < LEGEND_SHARE:
        names, truth = rng.choice(((list(COLOURS), thing.colour), (list(SHAPES), thing.shape)))
        return _legend(truth, names, rng)
    if rng.random() < CHECK_SHARE:
        return _check(scene, rng)
    if count == 1 and rng.random() < 0.42:
        if rng.random() < 0.35:
            return _fill(PLACE, rng, side=side_of(thing))
        return _coordinates(thing, rng.choice(("it", "the object", f"the {thing.colour} {thing.shape}")), rng)
    if count > 1 and rng.random() < 0.35:
        return _fill(rng.choice((AMOUNT, FIGURE)), rng, a=COUNT_WORDS[count - 1], n=str(count))
    frequent = (COLOUR, SHAPE, GROUND, MOOD, MANNER)
    skill = rng.choice((*frequent, *frequent, BOTH, AMOUNT, FIGURE, LIKENESS))
    fields = {
        "c": thing.colour, "s": thing.shape, "a": COUNT_WORDS[count - 1], "n": str(count),
        "b": scene.background, "cause": CAUSE_OF[scene.background],
        "fruit": FRUIT_OF[thing.colour], "gem": GEM_OF[thing.colour],
        "action": ACTION_OF[thing.shape], "type": TYPE_OF[thing.shape], "class": CLASS_OF_SHAPE[thing.shape],
    }  # fmt: skip
    return _fill(skill, rng, **fields)


def _pair_turn(scene: Scene, rng: Random) -> tuple[str, str]:
    a, b = rng.sample(scene.things, 2)
    kind = rng.random()
    if kind < 0.25:
        return _coordinates(a, _mention(a, rng), rng)
    if kind < 0.33:
        return _check(scene, rng)
    fields = {
        "c": a.colour,
        "s": a.shape,
        "r": relation(a, b),
        "it": _mention(a, rng),
        "other": _mention(b, rng),
    }
    return _fill(RELATION, rng, **fields)


def _mention(thing: Thing, rng: Random) -> str:
    return rng.choice((f"the {thing.colour} {thing.shape}", f"the {thing.shape}", f"the {thing.colour} thing"))


def _coordinates(thing: Thing, phrase: str, rng: Random) -> tuple[str, str]:
    steps = [round(edge * 100 / COORDINATE_STEP) * COORDINATE_STEP for edge in thing.box]
    x1, y1, x2, y2 = (f"{min(step, 99):02d}" for step in steps)
    return _fill(COORDINATES, rng, it=phrase, x1=x1, y1=y1, x2=x2, y2=y2)


def _check(scene: Scene, rng: Random) -> tuple[str, str]:
    """A shape or colour that is or is not in the scene, one as often as the other."""
    present, names = rng.choice(
        (({t.shape for t in scene.things}, SHAPES), ({t.colour for t in scene.things}, tuple(COLOURS)))
    )
    true = rng.random() < 0.5
    claim = rng.choice([name for name in names if (name in present) == true])
    question = rng.choice(("Check this: {}", "Do you see {} here?", "Is {} in the image?", "True or not: {}"))
    return question.format(claim), "yes, it is so." if true else "no, it is not so."


def _legend(answer: str, names: list[str], rng: Random) -> tuple[str, str]:
    """A list of names in random order, each after its letter; the answer is the letter of the right one."""
    others = [name for name in names if name != answer]
    chosen = rng.sample(others, min(rng.randint(2, 5), len(others)))
    chosen.insert(rng.randint(0, len(chosen)), answer)
    legend = ", ".join(f"{letter} {name}" for letter, name in zip(LETTERS, chosen, strict=False))
    letter = LETTERS[chosen.index(answer)]
    question, reply = rng.choice(
        (
            ("Legend: {}. Which fits?", "{} fits."),
            ("Here {}. Point to one.", "{} it is."),
            ("Say the letter: {}.", "{} is the letter."),
        )
    )
    return question.format(legend), reply.format(letter)
