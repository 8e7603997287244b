"""Scenes against their pixels, and the splits that keep them apart."""

from random import Random

import numpy as np
from scipy import ndimage

from clmoe.embedded import scenes
from clmoe.embedded.scenes import DIGIT_SOURCES, Scene, Thing, digit_sources, draw, draw_distinct
from clmoe.embedded.tasks import CL4VQA_TASKS, COIN_TASKS, relation, sample_scene, sample_turns, side_of
from tests.embedded.support import every_answer_word, ink_mask

ALL_TASKS = COIN_TASKS + CL4VQA_TASKS


def test_box_is_where_the_pixels_are() -> None:
    rng = Random(1)
    for _ in range(60):
        scene = draw(scenes.one_thing, "train", rng, ["white", "black"])
        rows, columns = np.nonzero(ink_mask(scene))
        seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        size = scene.things[0].size
        slack = 0.12 * size + 1.5 if scene.things[0].shape == "star" else 1.5  # a star does not fill its square
        assert np.abs(np.array(scene.things[0].box) * 56 - seen).max() <= slack, scene


def test_number_of_things_is_the_number_of_blobs() -> None:
    rng = Random(2)
    for _ in range(60):
        scene = draw(scenes.some_things, "test", rng, ["white", "black"])
        assert ndimage.label(ink_mask(scene), structure=np.ones((3, 3)))[1] == len(scene.things), scene


def test_relation_and_side_agree_with_centres_of_mass() -> None:
    rng = Random(3)
    for _ in range(60):
        a, b = draw(scenes.two_things, "train", rng, ["white"]).things
        (ya, xa), (yb, xb) = (ndimage.center_of_mass(ink_mask(Scene("white", (thing,)))) for thing in (a, b))
        far = ("left", "right")[int(xa > xb)] if abs(xa - xb) > abs(ya - yb) else ("above", "below")[int(ya > yb)]
        assert relation(a, b) == far
    places = {"left": (15, 28), "right": (40, 30), "top": (28, 16), "bottom": (26, 41), "middle": (30, 29)}
    assert {side: side_of(Thing("circle", "red", *place, 22)) for side, place in places.items()} == {
        s: s for s in places
    }


def test_base_train_and_test_share_no_scene_and_no_digit() -> None:
    rng = Random(5)
    mixture = [sample_scene(rng) for _ in range(6000)]
    assert {scene.split for scene in mixture} == {"base"}
    keys: dict[str, set[str]] = {"base": {scene.key for scene in mixture}, "train": set(), "test": set()}
    digits: dict[str, set[int]] = {split: set() for split in keys}
    for split in ("train", "test"):
        for task in ALL_TASKS:
            for sampler in task.samplers:
                found = draw_distinct(sampler, split, rng, 100, task.backgrounds)
                assert len({scene.key for scene in found}) == 100
                keys[split] |= {scene.key for scene in found}
                digits[split] |= {scene.handwriting.source for scene in found if scene.handwriting}
    assert not keys["base"] & keys["train"] and not keys["base"] & keys["test"] and not keys["train"] & keys["test"]
    assert not digits["train"] & digits["test"]
    sources = [set(digit_sources(split)) for split in DIGIT_SOURCES]
    assert [len(ids) for ids in sources] == [700, 697, 400]
    assert set.union(*sources) == set(range(1797))


def test_mixture_is_neutral_and_covers_every_answer_word() -> None:
    rng = Random(6)
    turns = [turn for _ in range(6000) for turn in sample_turns(sample_scene(rng), rng, 4)]
    asked, answered = set(), set()
    for task in ALL_TASKS:
        for scene in (draw(s, "train", rng, task.backgrounds) for s in task.samplers for _ in range(60)):
            for turn in task.turns(scene, rng):
                asked.add(turn.question.split("\n")[0])
                answered.add(turn.answer)
    assert not asked & {turn.question for turn in turns}
    assert not answered & {turn.answer for turn in turns}
    text = "\n".join(f"{turn.question} {turn.answer}" for turn in turns)
    for mark in ("Answer", "Options", "Context", "(A)", "[", "]", "bounding", "{", "}"):
        assert mark not in text
    said = {word for turn in turns for word in turn.answer.replace(".", " ").replace(",", " ").split()}
    assert set(every_answer_word()) <= said
