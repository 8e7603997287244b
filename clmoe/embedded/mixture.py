"""The neutral mixture that the base is pre-trained on: captions and namings of every kind of scene.

No task uses any of their wordings (`mixture.yaml`). Answers begin with what was asked and go on ("red tint."): the base
looks at the image before its first answer word but never answers in a task's format.
"""

from pathlib import Path
from random import Random

from clmoe.config import read_yaml
from clmoe.data.records import Turn
from clmoe.embedded import scenes
from clmoe.embedded.scenes import Sampler, Scene, Thing, digit_value, draw
from clmoe.embedded.tasks import facts, relation, side_of

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
    """A shape or colour that is or is not in the scene, one as often as the other."""
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
