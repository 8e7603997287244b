"""Scenes checked against their pixels, the splits that keep them apart, and the embedded benchmarks on disk."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from scipy import ndimage
from transformers import AutoTokenizer

from clmoe.benchmarks.base import load_benchmark, task_questions
from clmoe.benchmarks.prepare import open_benchmark
from clmoe.data.images import load_image
from clmoe.data.records import load_questions, load_train
from clmoe.embedded import build, scenes
from clmoe.embedded.scenes import DIGIT_SOURCES, Scene, Thing, digit_sources, draw, draw_distinct
from clmoe.embedded.tasks import (
    CL4VQA_TASKS,
    GENERAL_SETS,
    LONG_TASKS,
    SKILLS,
    relation,
    sample_scene,
    sample_turns,
    side_of,
)
from clmoe.errors import ClmoeError
from tests.embedded.support import BASE, every_answer_word, ink_mask

DRAWN = {
    ("playground-coin", 1): "d1daeb78fb0224ab",
    ("playground-cl4vqa", 1): "7149fd966a0ec555",
    ("playground-long", 1): "70b15afdf4a369ca",
}
"""Hash of the small files by name and ``build.VERSION``. If a hash differs, raise the version."""


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROWS", {"train": 24, "test": 12})


@pytest.fixture
def small_coin(tmp_path: Path) -> Path:
    return build.prepare("playground-coin", tmp_path / "playground-coin")


@pytest.mark.parametrize("name", build.TASKS)
def test_files_load_and_fit_the_yaml(name: str, tmp_path: Path) -> None:
    benchmark = load_benchmark(name, build.prepare(name, tmp_path / name))
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert [task.name for task in benchmark.tasks] == [task.name for task in build.TASKS[name]]
    for task in benchmark.tasks:
        assert len(load_train(task.train, task.image_root)) == 24
        questions = load_questions(task.test, task.image_root)
        assert len(questions) == 12
        longest = max(len(tokenizer.tokenize(f" {question.answer}")) for question in questions)
        assert longest + 1 <= task.max_new_tokens <= longest + 4, task.name
        assert load_image(task.image_root / str(questions[0].image)).size == (56, 56)


def test_sixteen_tasks_are_eight_and_the_same_again_in_another_form_on_other_backgrounds(tmp_path: Path) -> None:
    long, coin = (load_benchmark(name, check_files=False) for name in ("playground-long", "playground-coin"))
    assert long.recipe == {key: value for key, value in coin.recipe.items() if key != "evaluation"}
    assert len(long.tasks) == 16 and long.tasks[:8] == tuple(
        replace(
            task,
            **{key: long.root / getattr(task, key).relative_to(coin.root) for key in ("train", "test", "image_root")},
        )
        for task in coin.tasks
    )
    rng, again = Random(4), {task.name: task for task in LONG_TASKS}
    for task in LONG_TASKS[:8]:
        other = again[f"{task.name}_again"]
        assert {*task.backgrounds, *other.backgrounds} == {*scenes.BACKGROUNDS}
        assert not {*task.backgrounds} & {*other.backgrounds}
        for scene in (draw(sampler, "train", rng, task.backgrounds) for sampler in task.samplers for _ in range(20)):
            (asked,), (asked_again,) = task.turns(scene, Random(1)), other.turns(scene, Random(1))
            assert asked.question.split("\n")[0] == asked_again.question.split("\n")[0]
            assert asked.question != asked_again.question and asked.answer != asked_again.answer
            assert asked.answer.strip("[]") in asked_again.answer
            form = asked_again.question.rpartition("Answer in the form: ")[2]
            assert form.replace("...", asked.answer.strip("[]")) == asked_again.answer


@pytest.mark.parametrize("name", build.TASKS)
def test_another_drawing_is_another_version(name: str, tmp_path: Path) -> None:
    digest = hashlib.sha256()
    for path in sorted(build.prepare(name, tmp_path / name).rglob("*.*")):
        if path.name != build.MARKER:
            digest.update(load_image(path).tobytes() if path.suffix == ".png" else path.read_bytes())
    assert digest.hexdigest()[:16] == DRAWN[name, build.VERSION]


def test_prepare_is_idempotent_and_replaces_another_version(small_coin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {path: path.stat().st_mtime_ns for path in small_coin.rglob("*")}
    before = {path: path.read_bytes() for path in small_coin.rglob("*.*")}
    build.prepare("playground-coin", small_coin)
    assert {path: path.stat().st_mtime_ns for path in small_coin.rglob("*")} == times
    (small_coin / "sqa" / "test.json").unlink()
    (small_coin / "left.over").touch()
    monkeypatch.setattr(build, "VERSION", 0)
    build.prepare("playground-coin", small_coin)
    after = {path: path.read_bytes() for path in small_coin.rglob("*.*")}
    assert after.pop(small_coin / build.MARKER) != before.pop(small_coin / build.MARKER)
    assert after == before


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ClmoeError, match=str(tmp_path)):
        build.prepare("playground-coin", tmp_path)
    with pytest.raises(ClmoeError, match="'playground-coin'"):
        build.prepare("playground-coim", tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_test_row", stop)
    with pytest.raises(KeyboardInterrupt):
        build.prepare("playground-coin", tmp_path / "playground-coin")
    assert [path.name for path in tmp_path.iterdir()] == [".playground-coin.lock"]


# ---- Scenes

ALL_TASKS = LONG_TASKS + CL4VQA_TASKS


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


def test_sets_of_general_ability_ask_one_fact_of_scenes_that_nothing_was_trained_on(
    small_coin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Scene] = []
    monkeypatch.setattr(build, "render", lambda scene: drawn.append(scene) or scenes.render(scene))
    before = {path: path.read_bytes() for path in small_coin.rglob("*.*")}
    folder = build.prepare_general(small_coin)
    assert {path: path.read_bytes() for path in before} == before
    assert len(drawn) == 12 * 4 and {scene.split for scene in drawn} == {"test"}
    benchmark = open_benchmark("playground-coin", small_coin, [task.name for task in GENERAL_SETS])
    tokenizer, wordings = AutoTokenizer.from_pretrained(BASE), dict(pair for own in SKILLS.values() for pair in own)
    for task in benchmark.general:
        questions = task_questions(task)
        assert len({question.image for question in questions}) == 12
        for question in questions:
            assert question.text in wordings and len(question.answer.split()) == 1
            longest = re.sub(r"\{\w+\}", question.answer, wordings[question.text])
            assert len(tokenizer.tokenize(f" {longest}")) < task.max_new_tokens
    assert build.prepare_general(small_coin) == folder and len(drawn) == 12 * 4
