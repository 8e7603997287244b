"""The feature store: the bare base's features, with shared prefixes or without; computed once, never mixed up."""

import copy
import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from clmoe.bases.inputs import SharedPrompts, prompt_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.bases.text import open_text_tower
from clmoe.config import LocatorConfig, load_config
from clmoe.data.batches import first_questions
from clmoe.data.records import Question, TrainRecord, Turn, load_questions
from clmoe.errors import ClmoeError
from clmoe.experts import forward as features_module
from clmoe.experts.forward import FeatureStore, feature_folder
from clmoe.experts.model import load_adapter
from clmoe.locators import make_locator
from tests.runs import Runs
from tests.support import TASKS, copy_base, prompt_batches

TEXTS = ("What is it?", "Which colour is it?", "How many things are there on it?", "Are you sure?", "left or right?")
Asked = tuple[list[Question], Path]


@pytest.fixture
def asked(mini_yaml: Path, tmp_path: Path) -> Asked:
    """Five questions each on three images and on none, scattered; the images are a copy that a test may change."""
    folder = mini_yaml.parent / TASKS[1]
    images = Path(shutil.copytree(folder / "images", tmp_path / "images"))
    rows = load_questions(folder / "test.json", images)[4:8]
    assert [row.image is None for row in rows] == [False, False, False, True]
    return [dataclasses.replace(row, text=text) for text in TEXTS for row in rows], images


@pytest.fixture
def model(runs: Runs, tiny_base: LoadedBase) -> PeftModel:
    return load_adapter(tiny_base.model, runs.chain("clmoe")[1], trainable=False)


def mean_of_layers(base: LoadedBase, batch: dict[str, Tensor]) -> Tensor:
    """Oracle for `pooled`, from hooks. The last layer's state is taken after the final norm."""
    language = base.model.model.language_model
    outputs: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for module in [*language.layers[:-1], language.norm]
    ]
    base.model.model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(outputs) == len(language.layers)
    return torch.stack([output.reshape(-1, output.shape[-1])[-1:] for output in outputs]).mean(0)


def image_of(base: LoadedBase, row: Question, images: Path) -> Tensor:
    """Oracle for the image half: tower, then projector, module by module; zeros without an image."""
    if row.image is None:
        return torch.zeros(base.model.config.text_config.hidden_size)
    pixels = base.read_image(images / row.image).unsqueeze(0)
    states = base.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    patches = states[base.model.config.vision_feature_layer][0, 1:]
    return base.model.model.multi_modal_projector(patches).mean(0)


def last_state(base: LoadedBase, batch: dict[str, Tensor]) -> Tensor:
    return base.model.model(**batch).last_hidden_state[:, -1]


@pytest.mark.parametrize("view", ["prompt", "text", "image_text"])
@pytest.mark.parametrize("kind", ["last", "pooled"])
@pytest.mark.parametrize("share", [False, True])
def test_features_are_the_bare_bases_one_by_one(
    view: Any, kind: Any, share: bool, model: PeftModel, tiny_base: LoadedBase, pristine_base: LoadedBase, asked: Asked,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real, batches = features_module.base_features, []
    monkeypatch.setattr(
        features_module, "base_features", lambda model, batch, kind: batches.append(batch) or real(model, batch, kind)
    )
    found = FeatureStore(tiny_base, kind, 7, None, share, view).features(model, *asked)
    assert [isinstance(batch, SharedPrompts) for batch in batches] == [share] * 3
    oracle = mean_of_layers if kind == "pooled" else last_state
    rows, images = asked
    texts = rows if view == "prompt" else [dataclasses.replace(row, image=None) for row in rows]
    with torch.no_grad():
        alone = prompt_batches(pristine_base, prompt_dataset(pristine_base, texts, images), 1)
        expected = torch.cat([oracle(pristine_base, batch) for batch in alone])
        if view == "image_text":
            seen = [image_of(pristine_base, row, images) for row in rows]
            assert [bool(feature.any()) for feature in seen] == [row.image is not None for row in rows]
            expected = torch.cat([torch.stack(seen), expected], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_every_cause_of_other_features_is_another_file(
    tiny_base: LoadedBase, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, images = asked
    store = FeatureStore(tiny_base, "last", 5, None)
    processor = copy.deepcopy(tiny_base.image_processor)
    processor.image_mean = [0.5, 0.4, 0.3]
    bases: list[dict[str, Any]] = [
        {"fingerprint": "other"},
        {"image_processor": processor},
        {"model": copy_base(tiny_base).model.bfloat16()},
    ]
    stores = [store, *(dataclasses.replace(store, base=dataclasses.replace(tiny_base, **base)) for base in bases)]
    changes: list[dict[str, Any]] = [{"kind": "pooled"}, {"batch_size": 6}, {"share_images": True}]
    changes += [{"view": "image_text"}]
    stores += [dataclasses.replace(store, **change) for change in changes]
    keys = [each._key(questions, images) for each in stores]
    for bits in ("4", "8"):
        with monkeypatch.context() as patch:
            patch.setattr(tiny_base.model, f"is_loaded_in_{bits}bit", True, raising=False)
            keys.append(store._key(questions, images))
    keys.append(store._key(questions[::-1], images))
    keys.append(store._key([dataclasses.replace(questions[0], text="What?"), *questions[1:]], images))
    keys.append(store._key([dataclasses.replace(questions[0], image=None), *questions[1:]], images))
    Image.new("RGB", (32, 24)).save(images / str(questions[0].image))
    keys.append(store._key(questions, images))
    assert len(set(keys)) == len(keys)
    renamed = dataclasses.replace(questions[0], question_id="another id", answer="another answer")
    assert store._key([renamed, *questions[1:]], images) == keys[-1], "neither id nor answer is part of a prompt"


def test_the_first_question_of_a_conversation_locates_its_task() -> None:
    turns = (Turn("What is it?", "red"), Turn("Are you sure?", "yes"))
    found = first_questions([TrainRecord("7", "0.png", turns), TrainRecord("8", None, turns[1:])])
    assert [(q.question_id, q.image, q.text) for q in found] == [
        ("7", "0.png", "What is it?"), ("8", None, "Are you sure?"),
    ]  # fmt: skip


def test_the_folder_is_the_runs_unless_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLMOE_FEATURES", raising=False)
    assert feature_folder(tmp_path) == tmp_path / "features"
    monkeypatch.setenv("CLMOE_FEATURES", str(tmp_path / "shared"))
    assert feature_folder(tmp_path) == tmp_path / "shared"


def test_an_evaluation_uses_what_is_stored(runs: Runs, tmp_path: Path) -> None:
    """If all stored features are replaced with those of one question, every question is located in the same task."""
    checkpoint = runs.chain("clmoe")[1]
    run = runs.evaluate(checkpoint, tmp_path / "run")
    files = sorted((run / "features").iterdir())
    assert len(files) == 2, "one per task"
    first = load_file(files[0])["features"][:1]
    for file in files:
        save_file({"features": first.expand(12, -1).contiguous()}, file)
    shutil.rmtree(run / "predictions")
    runs.evaluate(checkpoint, run)
    rows = (run / "locator.csv").read_text().splitlines()[1:]
    assert len(rows) == 2 and len({row.split(",")[3] for row in rows}) == 1, rows


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    """A tiny CLIP text tower with random weights; as in CLIP, its last word ends a text, pads it, and is pooled."""
    torch.manual_seed(0)
    words = ["?", *sorted({word for text in TEXTS for word in re.findall(r"\w+", text)}), "<end>"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", len(words) - 1)])
    spoken = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>")
    spoken.save_pretrained(tmp_path / "clip")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    places = {"vocab_size": len(words), "max_position_embeddings": 6, "eos_token_id": len(words) - 1}
    CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=7, **places, **sizes)).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@torch.no_grad()
def test_texts_come_from_the_tower_that_is_named(
    asked: Asked, model: PeftModel, tiny_base: LoadedBase, tower: Path, tmp_path: Path
) -> None:
    questions, images = asked
    alone = CLIPTextModelWithProjection.from_pretrained(tower).eval()
    words = AutoTokenizer.from_pretrained(tower)
    rows = [words(question.text, truncation=True, max_length=6, return_tensors="pt") for question in questions]
    expected = torch.cat([alone(input_ids=row["input_ids"]).text_embeds for row in rows])  # one by one, so unpadded
    assert len(set(map(tuple, expected.tolist()))) == len(TEXTS)
    named = LocatorConfig("text_centroid", options={"text_encoder": str(tower)})
    config = load_config("disco", {}, [])
    config = dataclasses.replace(config, locator=named, evaluation=dataclasses.replace(config.evaluation, batch_size=3))
    store = FeatureStore.of(tiny_base, config, tmp_path / "kept", "text")
    for _ in range(2):  # computed, then read
        torch.testing.assert_close(store.features(model, questions, images), expected)
    both = dataclasses.replace(store, view="image_text").features(model, questions, images)
    bare = dataclasses.replace(store, view="image_text", text_encoder="").features(model, questions, images)
    image, text = both.chunk(2, dim=1)
    assert torch.equal(image, bare.chunk(2, dim=1)[0])
    torch.testing.assert_close(text[:, :7], expected)
    assert not text[:, 7:].any()
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_a_text_tower_that_is_none_is_refused_and_belongs_to_its_fit(tower: Path, tmp_path: Path) -> None:
    with pytest.raises(ClmoeError, match="nowhere"):
        make_locator(LocatorConfig("text_centroid", options={"text_encoder": "./nowhere"}), 0)
    with pytest.raises(ClmoeError, match=r"text_encoder: .*playground/base.* llava"):
        open_text_tower("playground/base")
    plain, named = (
        make_locator(LocatorConfig("text_centroid", options=options), 0)
        for options in ({}, {"text_encoder": str(tower)})
    )
    for mine, other in ((plain, named), (named, plain)):
        mine.save(tmp_path / "locator.safetensors")
        with pytest.raises(ClmoeError, match="text_encoder"):
            other.load(tmp_path / "locator.safetensors")
