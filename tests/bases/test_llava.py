"""Loading a base, the names of its parts, its identity, and the vision tower's output kept on disk."""

import copy
import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.quantizers.quantizers_utils import should_convert_module

from clmoe.bases import llava
from clmoe.bases.families import LLAVA, PROJECTOR
from clmoe.bases.inputs import to_device, train_dataset
from clmoe.bases.llava import (
    LoadedBase,
    _few_bits,
    base_fingerprint,
    block_of,
    count_image_tokens,
    decoder_layers,
    language_model_pattern,
    load_base,
    meta_base,
    projector_names,
    vision_tower_of,
)
from clmoe.bases.vision import VisionCache, attach_cache
from clmoe.config import ModelConfig
from clmoe.data.records import TrainRecord, Turn
from clmoe.errors import ClmoeError
from tests import support
from tests.runs import Runs, contents, events, tensors, texts
from tests.support import TASKS

QUESTIONS = ("How many things are there?", "On which side is it, left or right?", "Which colour?")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that the test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "base"))


# ---- Loading


def test_a_loaded_base_is_frozen_and_in_evaluation_mode(pristine_base: LoadedBase, tiny_folder: Path) -> None:
    model = pristine_base.model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert pristine_base.fingerprint == base_fingerprint(str(tiny_folder))
    assert model.name_or_path == str(tiny_folder)
    assert pristine_base.tokenizer.image_token_id == model.config.image_token_id


@pytest.mark.parametrize(("dtype", "attention"), [("bfloat16", "sdpa"), ("bfloat16", "eager"), ("float16", "sdpa")])
def test_dtype_and_attention_are_as_configured(
    dtype: str, attention: str, tiny_folder: Path, pristine_base: LoadedBase
) -> None:
    base = load_base(ModelConfig(path=str(tiny_folder), dtype=dtype, attention=attention))  # type: ignore[arg-type]
    assert {parameter.dtype for parameter in base.model.parameters()} == {getattr(torch, dtype)} == {base.dtype}
    assert base.model.get_decoder().config._attn_implementation == attention
    batch = support.prompt_batch(pristine_base, QUESTIONS)
    wanted = pristine_base.model(**batch).logits[:, -1]
    assert (base.model(**to_device(batch, base)).logits[:, -1].float() - wanted).norm() / wanted.norm() < 0.1


def test_what_is_not_installed_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(flash_attn: bool, bitsandbytes: bool) -> None:
        monkeypatch.setattr("clmoe.bases.llava.is_flash_attn_2_available", lambda: flash_attn)
        monkeypatch.setattr("clmoe.bases.llava.find_spec", lambda name: object() if bitsandbytes else None)

    flash = ModelConfig(path=str(tmp_path / "none"), dtype="bfloat16", attention="flash_attention_2")
    four = ModelConfig(path=str(tmp_path / "none"), load_in_4bit=True)
    given(False, False)
    with pytest.raises(ClmoeError, match=r"clmoe\[flash"):
        load_base(flash)
    with pytest.raises(ClmoeError, match=r"clmoe\[4bit"):
        load_base(four, "cuda")
    given(True, True)
    with pytest.raises(ClmoeError, match=r"model\.dtype"):
        load_base(dataclasses.replace(flash, dtype="float32"))
    with pytest.raises(ClmoeError, match=str(tmp_path / "none")):
        load_base(flash)
    with pytest.raises(ClmoeError, match=str(tmp_path / "none")):
        load_base(four)


def test_4_bits_are_for_the_language_models_blocks_only(pristine_base: LoadedBase) -> None:
    """By transformers' own rule for replacing linears, exactly those of the decoder's blocks would be quantised."""
    skipped = _few_bits(ModelConfig(load_in_4bit=True), LLAVA, "cuda")["quantization_config"].llm_int8_skip_modules
    linears = [name for name, module in pristine_base.model.named_modules() if isinstance(module, torch.nn.Linear)]
    converted = {name for name in linears if should_convert_module(name, skipped)}
    assert converted == {name for name in linears if ".language_model.layers." in name}


@pytest.mark.parametrize("kind", ["llama", "clip", "no-such-model", None])
def test_a_folder_of_another_model_is_refused_at_once(kind: str | None, folder: Path) -> None:
    """Without the check, transformers would build a random LLaVA of its default size, 7B, from such a folder."""
    (folder / "config.json").write_text(json.dumps({"model_type": kind} if kind else {}))
    never = mock.patch.object(LlavaForConditionalGeneration, "__init__", side_effect=AssertionError("built"))
    with never, pytest.raises(ClmoeError, match=f"{folder} cannot be loaded"):
        load_base(ModelConfig(path=str(folder)))
    for file in folder.glob("*.safetensors"):
        file.unlink()  # as in a folder that holds only pickles
    with pytest.raises(ClmoeError, match=rf"config\.json: model_type.*{kind}"):
        load_base(ModelConfig(path=str(folder)))


def test_without_a_network_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one failed request only the cache is read; it does not hold this model, so loading fails within seconds."""
    asked: list[str] = []

    def unreachable(url: str, **unused: Any) -> None:
        asked.append(url)
        raise RuntimeError("no network")

    monkeypatch.setattr(llava, "is_offline_mode", lambda: False)
    monkeypatch.setattr(llava, "get_hf_file_metadata", unreachable)
    start = time.monotonic()
    with pytest.raises(ClmoeError, match="model nobody/nothing cannot be loaded"):
        load_base(ModelConfig(path="nobody/nothing"))
    assert len(asked) == 1 and "nobody/nothing" in asked[0] and time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("language_model.model.layers.1.mlp.up_proj.weight", None, r"lack.*layers\.1\.mlp\.up_proj\.weight"),
        ("language_model.model.layers.9.mlp.up_proj.weight", [3], r"have, besides.*layers\.9"),
        ("multi_modal_projector.linear_1.bias", [3], r"linear_1\.bias .*\[3\].*\[48\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_not_drawn_at_random(
    name: str, shape: list[int] | None, named: str, folder: Path
) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop(name, None)
    save_file(tensors | ({} if shape is None else {name: torch.zeros(shape)}), weights, metadata={"format": "pt"})
    with pytest.raises(ClmoeError, match=named):
        load_base(ModelConfig(path=str(folder)))
    weights.unlink()
    with pytest.raises(ClmoeError, match=str(folder)):
        load_base(ModelConfig(path=str(folder)))


def test_image_tokens_are_the_patches_and_with_full_the_class_token(tiny_base: LoadedBase) -> None:
    patches = (support.SIZES.image_size // support.SIZES.patch_size) ** 2
    assert tiny_base.image_token_count == count_image_tokens(tiny_base.model) == patches == 4
    features = tiny_base.model.get_image_features(pixel_values=support.pixels(1)).pooler_output
    assert features[0].shape[0] == patches
    tiny_base.model.config.vision_feature_select_strategy = "full"
    assert count_image_tokens(tiny_base.model) == patches + 1


def test_parts_and_their_names(tiny_base: LoadedBase) -> None:
    model = tiny_base.model
    names = {id(module): name for name, module in model.named_modules()}
    layers = decoder_layers(model)
    assert [block_of(names[id(layer)] + ".") for layer in layers] == ["0", "1"]
    assert projector_names(tiny_base) == [PROJECTOR]
    assert model.model.multi_modal_projector.linear_1.in_features == support.SIZES.vision_hidden
    assert vision_tower_of(model).config.image_size == support.SIZES.image_size
    for wanted in (["mlp"], ["q_proj", "down_proj"]):
        found = {name for name in names.values() if re.fullmatch(language_model_pattern(wanted), name)}
        inside = [f"{names[id(layer)]}.{name}" for layer in layers for name, _ in layer.named_modules()]
        assert found == {name for name in inside if name.rpartition(".")[2] in wanted}


def test_a_base_of_shapes_only(tiny_folder: Path, pristine_base: LoadedBase, tmp_path: Path) -> None:
    shapes = meta_base(tiny_folder / "config.json")
    expected = {name: tensor.shape for name, tensor in pristine_base.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in shapes.model.state_dict().items()} == expected
    assert shapes.device.type == "meta" and shapes.image_token_count == pristine_base.image_token_count
    for text in ('{"model_type": "llama"}', "[]", '{"model_type": "llava", "text_config": {"hidden_size": "x"}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ClmoeError, match=str(tmp_path / "config.json")):
            meta_base(tmp_path / "config.json")


# ---- Identity


@pytest.mark.parametrize("share", [0.0, 0.37, 0.9999999])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_flipped_bit_changes_the_fingerprint(name: str, share: float, tiny_folder: Path, folder: Path) -> None:
    before = base_fingerprint(str(folder))
    assert before == base_fingerprint(str(tiny_folder)), "wherever it lies"
    content = bytearray((folder / name).read_bytes())
    content[int(share * len(content))] ^= 1
    (folder / name).write_bytes(bytes(content))
    assert base_fingerprint(str(folder)) != before


def test_large_files_are_sampled_to_their_last_byte(tmp_path: Path) -> None:
    """Both ends and the size of a sparse file larger than sixteen samples count in the fingerprint."""
    (tmp_path / "config.json").write_text("{}")
    prints = set()
    for size, position in ((20 << 20, None), (20 << 20, 0), (20 << 20, (20 << 20) - 1), ((20 << 20) + 1, None)):
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.truncate(size)
            if position is not None:
                file.seek(position)
                file.write(b"\x01")
        prints.add(base_fingerprint(str(tmp_path)))
    assert len(prints) == 4


# ---- Kept vision features

NAMES = ("0.png", "1.png", "2.png")


@pytest.fixture
def images(mini_yaml: Path, tmp_path: Path) -> Path:
    """A copy of the images that the test may change."""
    return Path(shutil.copytree(mini_yaml.parent / "colour" / "images", tmp_path / "images"))


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedBase:
    monkeypatch.setenv("CLMOE_VISION", str(tmp_path / "vision"))
    return load_base(ModelConfig(path=str(tiny_folder)))


TURNS = (Turn("What is it?", "red"),)
RECORDS = [TrainRecord(str(i), image, TURNS) for i, image in enumerate(("0.png", "1.png", "0.png", None))]


def fill(base: LoadedBase, *images: Path) -> dict[str, bytes]:
    """Fill the cache with the features of these images and return its contents."""
    base.vision.fill(vision_tower_of(base.model), images, base.read_pixels)
    return contents(base.vision.folder)


def test_what_is_kept_does_not_depend_on_what_came_with_it(base: LoadedBase, images: Path) -> None:
    fill(base, images / NAMES[1])
    in_pieces = fill(base, *(images / name for name in NAMES))
    assert len(in_pieces) == 3
    shutil.rmtree(base.vision.folder)
    assert fill(base, *(images / name for name in reversed(NAMES))) == in_pieces
    tower, pixels = vision_tower_of(base.model).tower, base.read_pixels(images / NAMES[1])
    with torch.no_grad():
        states = tower(pixels[None], output_hidden_states=True).hidden_states[base.model.config.vision_feature_layer]
    assert torch.equal(base.vision.read(images / NAMES[1]), states[0])


def test_only_what_is_read_and_nobody_else_computed_is_computed(base: LoadedBase, images: Path) -> None:
    train_dataset(base, RECORDS, images, 256, rows=[1, 3])
    assert len(contents(base.vision.folder)) == 1
    decoded: list[Path] = []

    def read(image: Path) -> Tensor:
        decoded.append(image)
        if len(decoded) == 1:  # meanwhile, a parallel run fills the cache
            fill(base, *(images / name for name in NAMES))
        return base.read_pixels(image)

    shutil.rmtree(base.vision.folder)
    base.vision.fill(vision_tower_of(base.model), [images / name for name in NAMES], read)
    assert len(decoded) == 1 and len(contents(base.vision.folder)) == 3


def test_equal_images_are_kept_once_and_a_new_content_anew(base: LoadedBase, images: Path) -> None:
    again = Path(shutil.copy(images / NAMES[0], images / "again.png"))
    assert len(fill(base, images / NAMES[0], again)) == 1
    before = base.vision.read(again)
    Image.new("RGB", (20, 20), (0, 250, 0)).save(again)
    os.utime(again, ns=(1, 1))  # the clock may be too coarse to give the edit a time of its own
    assert len(fill(base, again)) == 2
    assert not torch.equal(base.vision.read(again), before)
    assert torch.equal(base.vision.read(images / NAMES[0]), before)


def test_every_cause_of_other_features_is_another_folder(
    base: LoadedBase, new_base: Callable[[], LoadedBase], tmp_path: Path
) -> None:
    def attached(base: LoadedBase) -> VisionCache | None:
        return attach_cache(base.model, LLAVA, base.image_processor, base.fingerprint)

    weights = dataclasses.replace(new_base(), fingerprint="other")
    layer, half, processor = new_base(), new_base(), new_base()
    layer.model.config.vision_feature_layer = -1
    half.model.bfloat16()
    processor = dataclasses.replace(processor, image_processor=copy.deepcopy(processor.image_processor))
    processor.image_processor.image_mean = [0.4] * 3
    caches = [attached(changed) for changed in (weights, layer, half, processor)]
    assert attached(new_base()) == base.vision
    folders = {cache.folder for cache in (base.vision, *caches) if cache is not None}
    assert len(folders) == 5
    assert {folder.parent for folder in folders} == {tmp_path / "vision"}


def test_bad_files_are_named(base: LoadedBase, images: Path) -> None:
    with pytest.raises(ClmoeError, match=r"nowhere\.png"):
        train_dataset(base, [TrainRecord("1", "nowhere.png", TURNS)], images, 256)
    (images / "broken.png").write_bytes(b"no image")
    with pytest.raises(ClmoeError, match=r"broken\.png"):
        fill(base, images / "broken.png")
    fill(base, images / NAMES[0])
    file = base.vision.path(images / NAMES[0])
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ClmoeError, match=f"{file}"):
        base.vision.read(images / NAMES[0])


def test_several_layers_are_refused(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_feature_layer": [-2, -1]}))
    monkeypatch.setenv("CLMOE_VISION", str(tmp_path / "vision"))
    with pytest.raises(ClmoeError, match="layers"):
        load_base(ModelConfig(path=str(folder)))


def test_a_task_is_learned_and_tested_as_without(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = TASKS[0]

    def run(name: str) -> tuple[Path, dict[str, Tensor], Tensor]:
        checkpoint = runs.train(tmp_path / name / task, "clmoe", task, "training.workers=1")
        return checkpoint, tensors(checkpoint), torch.tensor([e["loss"] for e in events(tmp_path / name, "step")])

    without, weights, losses = run("without")
    monkeypatch.setenv("CLMOE_VISION", str(tmp_path / "vision"))
    kept, found, found_losses = run("kept")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("CLMOE_VISION")]
    rows = json.loads((runs.benchmark.parent / task / "train.json").read_text())
    seen = {(runs.benchmark.parent / task / "images" / row["image"]).read_bytes() for row in rows if "image" in row}
    assert len(contents(tmp_path / "vision")) == len(seen) > 1
    assert f"vision features of {len(seen)} images" in line and str(tmp_path / "vision") in line
    torch.testing.assert_close(found_losses, losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, weights, rtol=1e-3, atol=1e-5)
    runs.evaluate(kept, tmp_path / "kept")
    monkeypatch.delenv("CLMOE_VISION")
    runs.evaluate(without, tmp_path / "without")
    assert texts(tmp_path / "kept", task, task) == texts(tmp_path / "without", task, task)
