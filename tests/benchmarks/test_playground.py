"""The playground: scenes against their pixels, disjoint splits, files on disk, packing, the shipped base."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from scipy import ndimage

from clmoe.benchmarks.base import load_benchmark
from clmoe.benchmarks.playground import build, lexicon, sampling
from clmoe.benchmarks.playground.mixture import sample_scene, sample_turns
from clmoe.benchmarks.playground.packing import TurnPacker
from clmoe.benchmarks.playground.pretrain import (
    PretrainRecipe,
    frozen_features,
    mixture_hash,
    normalise,
    packed_loss,
    tokenizer_texts,
)
from clmoe.benchmarks.playground.scenes import (
    DIGIT_SOURCES,
    Scene,
    Thing,
    digit_sources,
    digit_value,
    render,
)
from clmoe.benchmarks.playground.tasks import CL4VQA_TASKS, COIN_TASKS, relation, side_of
from clmoe.benchmarks.playground.vision_targets import PATCH_KINDS, vision_targets
from clmoe.data.images import load_image, preprocess
from clmoe.data.prompts import SYSTEM, encode_prompt, encode_training
from clmoe.data.records import TrainRecord, Turn, load_questions, load_train
from clmoe.errors import ClmoeError
from clmoe.model.tiny import TinySizes, build_tiny

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = REPOSITORY / "playground" / "base"
SMALL = TinySizes(
    vision_hidden=32, vision_layers=2, vision_heads=2, vision_ffn=64,
    text_hidden=32, text_layers=2, text_heads=2, text_ffn=48,
)  # fmt: skip
ALL_TASKS = COIN_TASKS + CL4VQA_TASKS


def ink_mask(scene: Scene) -> np.ndarray:
    """Pixels [56, 56] that differ clearly from the background."""
    pixels = np.asarray(render(scene)).astype(int)
    return np.abs(pixels - np.array(lexicon.BACKGROUNDS[scene.background])).sum(-1) > 90


# ---- scenes ----


def test_box_is_where_the_pixels_are() -> None:
    rng = Random(1)
    for _ in range(60):
        scene = sampling.draw(sampling.one_thing, "train", rng, ["white", "black"])
        rows, columns = np.nonzero(ink_mask(scene))
        seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        size = scene.things[0].size
        slack = 0.12 * size + 1.5 if scene.things[0].shape == "star" else 1.5  # a star does not fill its square
        assert np.abs(np.array(scene.things[0].box) * 56 - seen).max() <= slack, scene


def test_number_of_things_is_the_number_of_blobs() -> None:
    rng = Random(2)
    for _ in range(60):
        scene = sampling.draw(sampling.some_things, "test", rng, ["white", "black"])
        assert ndimage.label(ink_mask(scene), structure=np.ones((3, 3)))[1] == len(scene.things), scene


def test_relation_and_side_agree_with_centres_of_mass() -> None:
    rng = Random(3)
    for _ in range(60):
        a, b = sampling.draw(sampling.two_things, "train", rng, ["white"]).things
        (ya, xa), (yb, xb) = (ndimage.center_of_mass(ink_mask(Scene("white", (thing,)))) for thing in (a, b))
        far = ("left", "right")[int(xa > xb)] if abs(xa - xb) > abs(ya - yb) else ("above", "below")[int(ya > yb)]
        assert relation(a, b) == far
    places = {"left": (15, 28), "right": (40, 30), "top": (28, 16), "bottom": (26, 41), "middle": (30, 29)}
    for side, (x, y) in places.items():
        assert side_of(Thing("circle", "red", x, y, 22)) == side


def test_patch_labels_name_what_the_patch_shows() -> None:
    rng = Random(10)
    scenes = [sampling.draw(sampling.one_thing, "base", rng, ["white"]) for _ in range(40)]
    targets = vision_targets(scenes)
    for scene, kinds, boxes in zip(scenes, targets["kind"], targets["box"], strict=True):
        ink = ink_mask(scene).reshape(4, 14, 4, 14).mean((1, 3)).flatten()
        thing = scene.things[0]
        assert {PATCH_KINDS[kind] for kind in kinds if kind > 0} == {f"{thing.colour} {thing.shape}"}
        assert all(kinds[patch] > 0 for patch in np.nonzero(ink > 0.5)[0])
        assert not ink[(kinds == 0).numpy()].max(initial=0) > 0.25
        assert torch.allclose(boxes[kinds > 0], torch.tensor(thing.box))


def test_same_scene_same_bytes_and_blur_keeps_the_split() -> None:
    scene = sampling.draw(sampling.one_word, "base", Random(4))
    assert render(scene).tobytes() == render(scene).tobytes()
    assert scene.blurred(7).split == scene.split and scene.blurred(7).key == scene.key
    assert render(scene.blurred(7)).tobytes() != render(scene).tobytes()


# ---- splits ----


def test_base_train_and_test_share_no_scene_and_no_digit() -> None:
    rng = Random(5)
    keys: dict[str, set[str]] = {
        "base": {sample_scene(rng).key for _ in range(6000)},
        "train": set(),
        "test": set(),
    }
    digits: dict[str, set[int]] = {split: set() for split in keys}
    for split in ("train", "test"):
        for task in ALL_TASKS:
            for sampler in task.samplers:
                scenes = sampling.draw_distinct(sampler, split, rng, 100, task.backgrounds)
                assert len({scene.key for scene in scenes}) == 100
                keys[split] |= {scene.key for scene in scenes}
                digits[split] |= {scene.handwriting.source for scene in scenes if scene.handwriting}
    assert not keys["base"] & keys["train"] and not keys["base"] & keys["test"] and not keys["train"] & keys["test"]
    assert not digits["train"] & digits["test"]
    sources = [set(digit_sources(split)) for split in DIGIT_SOURCES]
    assert [len(ids) for ids in sources] == [700, 697, 400]
    assert set.union(*sources) == set(range(1797))


def test_images_on_disk_differ_between_train_and_test(small_coin: Path) -> None:
    for task in COIN_TASKS:
        hashes = {
            split: {
                hashlib.sha256(path.read_bytes()).digest()
                for path in (small_coin / task.name / "images" / split).iterdir()
            }
            for split in ("train", "test")
        }
        assert hashes["train"] and hashes["test"]
        if task.blur == 0:  # two blurred scenes may look alike
            assert not hashes["train"] & hashes["test"], task.name


# ---- files ----


@pytest.fixture
def small_specs(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {name: replace(spec, train_rows=24, test_rows=12) for name, spec in build.SPECS.items()}
    monkeypatch.setattr(build, "SPECS", small)


@pytest.fixture
def small_coin(small_specs: None, tmp_path: Path) -> Path:
    return build.prepare("playground-coin", tmp_path / "playground-coin")


@pytest.mark.parametrize("name", ["playground-coin", "playground-cl4vqa"])
def test_files_load_and_fit_the_yaml(name: str, small_specs: None, tmp_path: Path) -> None:
    build.prepare(name, tmp_path / name)
    benchmark = load_benchmark(name, tmp_path / name)
    assert [task.name for task in benchmark.tasks] == [task.name for task in build.SPECS[name].tasks]
    for task in benchmark.tasks:
        assert len(load_train(task.train, task.image_root)) == 24
        assert len(load_questions(task.test, task.image_root)) == 12


def test_one_image_has_several_turns_and_several_questions(small_specs: None, tmp_path: Path) -> None:
    folder = build.prepare("playground-cl4vqa", tmp_path / "playground-cl4vqa")
    judge = load_train(folder / "judge" / "train.json", folder / "images")
    assert all(len(record.turns) == 2 for record in judge)
    color = load_train(folder / "color" / "train.json", folder / "images")
    assert {record.image for record in judge} & {record.image for record in color}


def test_same_question_other_format(small_coin: Path) -> None:
    answers: dict[tuple[str, str], set[str]] = {}
    for task in COIN_TASKS:
        for row in json.loads((small_coin / task.name / "train.json").read_text()):
            question = row["conversations"][0]["value"].split("\n")[1]
            answers.setdefault((question, task.name), set()).add(row["conversations"][1]["value"])
    count = "How many shapes are there?"
    assert answers[count, "gqa"] <= set(lexicon.COUNT_WORDS) and answers[count, "vqa"] <= set("12345")
    colour = "What colour is the shape?"
    assert answers[colour, "sqa"] <= set("ABCDEF") and "unanswerable" in answers[colour, "viz"]
    written = "What is written in the image?"
    assert answers[written, "text"] <= set(lexicon.WORDS) and answers[written, "digits"] <= set("0123456789")


def test_prepare_is_idempotent_and_replaces_an_older_version(small_coin: Path) -> None:
    def stamps() -> dict[Path, tuple[int, str]]:
        files = (path for path in small_coin.rglob("*") if path.is_file())
        return {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}

    before = stamps()
    build.prepare("playground-coin", small_coin)
    assert stamps() == before
    (small_coin / build.MARKER).write_text('{"config_hash": "of an older generator"}')
    (small_coin / "sqa" / "test.json").unlink()
    (small_coin / "stray").write_text("left over")
    build.prepare("playground-coin", small_coin)
    after = stamps()
    assert {path: digest for path, (_, digest) in after.items()} == {
        path: digest for path, (_, digest) in before.items()
    }


def test_a_folder_of_somebody_else_is_refused_and_left_alone(small_specs: None, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ClmoeError, match="not written by the playground"):
        build.prepare("playground-coin", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_other_sizes_are_another_benchmark(small_coin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(build.SPECS["playground-coin"], test_rows=5)
    assert not build.is_complete(small_coin, spec)
    monkeypatch.setattr(build, "SPECS", {"playground-coin": spec})
    build.prepare("playground-coin", small_coin)
    assert len(json.loads((small_coin / "box" / "test.json").read_text())) == 5


def test_an_interrupted_build_leaves_nothing(
    small_specs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_test_row", stop)
    with pytest.raises(KeyboardInterrupt):
        build.prepare("playground-coin", tmp_path / "playground-coin")
    assert list(tmp_path.iterdir()) == []


def test_unknown_benchmark_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ClmoeError, match="playground-coin"):
        build.prepare("playground-coim", tmp_path)


# ---- mixture ----


def test_mixture_is_neutral_and_covers_every_answer_word() -> None:
    rng = Random(6)
    turns = [turn for _ in range(6000) for turn in sample_turns(sample_scene(rng), rng, 4)]
    asked, answered = set(), set()
    for task in ALL_TASKS:
        for scene in (sampling.draw(s, "train", rng, task.backgrounds) for s in task.samplers for _ in range(60)):
            for qa in task.ask(scene, rng):
                asked.add(qa.question.split("\n")[0])
                answered.add(qa.answer)
    assert not asked & {question for question, _ in turns}
    assert not answered & {answer for _, answer in turns}
    text = "\n".join(f"{question} {answer}" for question, answer in turns)
    for mark in ("Answer", "Options", "Context", "(A)", "[", "]", "bounding"):
        assert mark not in text
    said = {word for _, answer in turns for word in answer.replace(".", " ").replace(",", " ").split()}
    assert set(lexicon.every_answer_word()) <= said


# ---- packing ----


@pytest.fixture(scope="module")
def small_model() -> tuple:
    model, processor = build_tiny(tokenizer_texts(0), seed=3, sizes=SMALL)
    return model, processor


@torch.no_grad()
def test_packed_loss_equals_one_turn_at_a_time(small_model: tuple) -> None:
    model, processor = small_model
    rng = Random(7)
    scenes = [sample_scene(rng) for _ in range(3)]
    rows = [sample_turns(scene, rng, count) for scene, count in zip(scenes, (3, 1, 2), strict=True)]
    pixels = torch.stack([torch.from_numpy(np.array(render(scene))).permute(2, 0, 1) for scene in scenes])
    batch = TurnPacker(processor.tokenizer, SMALL.image_tokens).pack(rows, budget=1000)
    packed, _ = packed_loss(model, frozen_features(model, pixels), batch)
    total, tokens = 0.0, 0
    for image, turns in zip(pixels, rows, strict=True):
        for turn in turns:
            ids, labels = encode_training(TrainRecord("r", "i", (Turn(*turn),)), processor.tokenizer, 16, 500)
            out = model(
                input_ids=torch.tensor([ids]),
                pixel_values=normalise(image[None]),
                labels=torch.tensor([labels]),
            )
            count = sum(label != -100 for label in labels)
            total, tokens = total + out.loss.item() * count, tokens + count
    assert packed.item() == pytest.approx(total / tokens, abs=1e-5)


def test_a_row_keeps_to_its_budget(small_model: tuple) -> None:
    packer = TurnPacker(small_model[1].tokenizer, SMALL.image_tokens)
    turns = [("Name the colour.", "red tint.")] * 8
    lengths = [packer.pack([turns[:n]], budget=1000).input_ids.shape[1] for n in (1, 2, 3)]
    assert packer.pack([turns], budget=lengths[1]).input_ids.shape[1] == lengths[1]
    assert packer.pack([turns], budget=1).input_ids.shape[1] == lengths[0]


def test_tiny_is_seeded_and_matches_the_library_s_inputs(small_model: tuple) -> None:
    model, processor = small_model
    again, _ = build_tiny(tokenizer_texts(0), seed=3, sizes=SMALL)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    image = render(sampling.draw(sampling.one_digit, "test", Random(8)))
    pixels = preprocess(image, processor.image_processor)
    assert torch.equal(pixels, normalise(torch.from_numpy(np.array(image)).permute(2, 0, 1)))
    text = f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"
    theirs = processor(images=image, text=text, return_tensors="pt")["input_ids"][0].tolist()
    assert encode_prompt("What is it?", True, processor.tokenizer, SMALL.image_tokens) == theirs


# ---- the shipped base ----


@pytest.fixture(scope="module")
def base() -> tuple:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(BASE).eval(), AutoProcessor.from_pretrained(BASE)


def test_base_is_small_and_is_what_the_recipe_builds(base: tuple) -> None:
    model, _ = base
    record = json.loads((BASE / "recipe.json").read_text())
    assert record["config_hash"] == PretrainRecipe().digest()
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters()) <= 1_900_000
    assert (BASE / "model.safetensors").stat().st_size <= 8 * 2**20
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_answer_words_and_the_system_sentence_are_single_tokens(base: tuple) -> None:
    tokenizer = base[1].tokenizer
    for word in [
        *lexicon.every_answer_word(),
        *SYSTEM.replace(",", "").replace(".", "").replace("'", " ").split()[1:],
    ]:
        assert len(tokenizer.tokenize(f" {word}")) == 1, word
    assert tokenizer.tokenize("0.12") == ["0", ".", "1", "2"]


def test_base_reads_the_images_it_was_not_trained_on(base: tuple) -> None:
    model, processor = base
    rng = Random(9)
    cases = []
    for _ in range(12):
        thing, word, digit = (
            sampling.draw(s, "test", rng) for s in (sampling.one_thing, sampling.one_word, sampling.one_digit)
        )
        assert word.lettering and digit.handwriting
        cases += [
            (thing, "Name the colour.", thing.things[0].colour),
            (thing, "Name the shape.", thing.things[0].shape),
            (word, "Tell the word.", word.lettering.word),
            (digit, "Tell the digit as a numeral.", str(digit_value(digit.handwriting.source))),
        ]
    right = 0
    for scene, question, truth in cases:
        ids = torch.tensor([encode_prompt(question, True, processor.tokenizer, 16)])
        pixels = preprocess(render(scene), processor.image_processor)[None]
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), max_new_tokens=3
            )
        right += processor.tokenizer.decode(out[0, ids.shape[1] :]).split()[0].strip(",.") == truth
    assert right >= 0.85 * len(cases), f"{right} of {len(cases)}"


def test_yaml_leaves_room_for_every_answer(base: tuple, small_specs: None, tmp_path: Path) -> None:
    tokenizer = base[1].tokenizer
    for name in build.SPECS:
        build.prepare(name, tmp_path / name)
        for task in load_benchmark(name, tmp_path / name).tasks:
            questions = load_questions(task.test, task.image_root)
            longest = max(len(tokenizer.tokenize(f" {question.answer}")) for question in questions)
            assert longest + 1 <= task.max_new_tokens <= longest + 4, task.name
            assert load_image(task.image_root / str(questions[0].image)).size == (56, 56)


def test_the_warm_up_data_is_the_mixture_and_no_tasks(small_coin: Path) -> None:
    records = load_train(small_coin / build.WARMUP / "train.json", small_coin / build.WARMUP / "images")
    assert len(records) == 24
    assert max(len(record.turns) for record in records) > 1
    marker = json.loads((small_coin / build.MARKER).read_text())
    assert marker["rows"][build.WARMUP] == {"train": 24}
    asked = {turn.question for record in records for turn in record.turns}
    for task in COIN_TASKS:
        rows = load_train(small_coin / task.name / "train.json", small_coin / task.name / "images")
        assert not asked & {turn.question for record in rows for turn in record.turns}, task.name


def test_warm_up_scenes_are_of_the_bases_split() -> None:
    rng = Random(f"0/{build.WARMUP}")
    scenes = [sample_scene(rng) for _ in range(300)]
    assert {scene.split for scene in scenes} == {"base"}


def test_the_shipped_base_was_made_by_this_recipe_and_mixture() -> None:
    shipped = json.loads((BASE / "recipe.json").read_text())
    recipe = PretrainRecipe()
    assert shipped["config_hash"] == recipe.digest()
    assert shipped["mixture_hash"] == mixture_hash(recipe)
