"""The pre-training of the embedded base, and the base that is shipped."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from clmoe.bases.stack import tower_names
from clmoe.data.images import preprocess
from clmoe.data.prompts import SYSTEM, encode_prompt, encode_training
from clmoe.data.records import TrainRecord
from clmoe.embedded import scenes
from clmoe.embedded.scenes import digit_value, draw, render
from clmoe.embedded.tasks import sample_scene, sample_turns
from tests.embedded.support import BASE, every_answer_word, ink_mask, pretrain
from tests.support import TinySizes, build_tiny

SMALL = TinySizes(
    vision_hidden=32, vision_layers=2, vision_heads=2, vision_ffn=64,
    text_hidden=32, text_layers=2, text_heads=2, text_ffn=48,
)  # fmt: skip


# ---- pre-training ----


@pytest.fixture(scope="module")
def small_model() -> tuple:
    return build_tiny(pretrain.tokenizer_texts(0), seed=3, sizes=SMALL)


def test_patch_labels_name_what_the_patch_shows() -> None:
    rng = Random(10)
    drawn = [draw(scenes.one_thing, "base", rng, ["white"]) for _ in range(40)]
    targets = pretrain.vision_targets(drawn)
    for scene, kinds, boxes in zip(drawn, targets["kind"], targets["box"], strict=True):
        ink = ink_mask(scene).reshape(4, 14, 4, 14).mean((1, 3)).flatten()
        thing = scene.things[0]
        assert {pretrain.PATCH_KINDS[kind] for kind in kinds if kind > 0} == {f"{thing.colour} {thing.shape}"}
        assert all(kinds[patch] > 0 for patch in np.nonzero(ink > 0.5)[0])
        assert not ink[(kinds == 0).numpy()].max(initial=0) > 0.25
        assert torch.allclose(boxes[kinds > 0], torch.tensor(thing.box))


@torch.no_grad()
def test_packed_loss_equals_one_turn_at_a_time(small_model: tuple) -> None:
    model, processor = small_model
    rng = Random(7)
    drawn = [sample_scene(rng) for _ in range(3)]
    rows = [sample_turns(scene, rng, count) for scene, count in zip(drawn, (3, 1, 2), strict=True)]
    pixels = torch.stack([torch.from_numpy(np.array(render(scene))).permute(2, 0, 1) for scene in drawn])
    batch = pretrain.TurnPacker(processor.tokenizer, SMALL.image_tokens).pack(rows, budget=1000)
    packed, _ = pretrain.packed_loss(model, pretrain.frozen_features(model, pixels), batch)
    total, tokens = 0.0, 0
    for image, turns in zip(pixels, rows, strict=True):
        for turn in turns:
            ids, labels = encode_training(TrainRecord("r", "i", (turn,)), processor.tokenizer, 16, 500)
            inputs = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
            out = model(**inputs, pixel_values=pretrain.normalise(image[None]))
            count = sum(label != -100 for label in labels)
            total, tokens = total + out.loss.item() * count, tokens + count
    assert packed.item() == pytest.approx(total / tokens, abs=1e-5)


def test_pixels_are_those_of_the_library(small_model: tuple) -> None:
    image = render(draw(scenes.one_digit, "test", Random(8)))
    pixels = preprocess(image, small_model[1].image_processor)
    assert torch.equal(pixels, pretrain.normalise(torch.from_numpy(np.array(image)).permute(2, 0, 1)))


@pytest.mark.slow
def test_a_recipe_makes_a_folder_that_loads_and_says_how_it_was_made(tmp_path: Path) -> None:
    recipe = pretrain.PretrainRecipe(
        sizes=SMALL, images=60, vision_steps=2, vision_batch=8, language_steps=2, language_batch=2
    )
    pretrain.build_base(tmp_path, recipe)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    record = json.loads((tmp_path / "recipe.json").read_text())
    assert record["config_hash"] == recipe.digest()
    assert record["vocabulary"] == len(AutoProcessor.from_pretrained(tmp_path).tokenizer)
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())


# ---- the shipped base ----


@pytest.fixture(scope="module")
def base() -> tuple:
    model = LlavaForConditionalGeneration.from_pretrained(BASE, **tower_names("llava"))
    return model.eval(), AutoProcessor.from_pretrained(BASE)


def test_base_is_small_and_was_made_by_this_recipe_and_mixture(base: tuple) -> None:
    model, _ = base
    record, recipe = json.loads((BASE / "recipe.json").read_text()), pretrain.PretrainRecipe()
    assert (record["config_hash"], record["mixture_hash"]) == (recipe.digest(), pretrain.mixture_hash(recipe))
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters()) <= 1_900_000
    assert (BASE / "model.safetensors").stat().st_size <= 8 * 2**20
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_answer_words_and_the_system_sentence_are_single_tokens(base: tuple) -> None:
    tokenizer = base[1].tokenizer
    sentence = SYSTEM.replace(",", "").replace(".", "").replace("'", " ").split()[1:]
    for word in [*every_answer_word(), *sentence]:
        assert len(tokenizer.tokenize(f" {word}")) == 1, word
    assert tokenizer.tokenize("0.12") == ["0", ".", "1", "2"]


def test_base_reads_the_images_it_was_not_trained_on(base: tuple) -> None:
    model, processor = base
    rng = Random(9)
    asked = [
        (scenes.one_thing, "Name the colour.", lambda scene: scene.things[0].colour),
        (scenes.one_thing, "Name the shape.", lambda scene: scene.things[0].shape),
        (scenes.one_word, "Tell the word.", lambda scene: scene.lettering.word),
        (scenes.one_digit, "Tell the digit as a numeral.", lambda scene: str(digit_value(scene.handwriting.source))),
    ] * 12
    right = 0
    for sampler, question, truth in asked:
        scene = draw(sampler, "test", rng)
        ids = torch.tensor([encode_prompt(question, True, processor.tokenizer, 16)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        pixels = preprocess(render(scene), processor.image_processor)[None]
        out = model.generate(**inputs, pixel_values=pixels, max_new_tokens=3)
        right += processor.tokenizer.decode(out[0, ids.shape[1] :]).split()[0].strip(",.") == truth(scene)
    assert right >= 0.85 * len(asked), f"{right} of {len(asked)}"
