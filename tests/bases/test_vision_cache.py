"""The vision tower's output kept on disk: what it stands for, when it is computed, and what it refuses."""

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from clmoe.bases.inputs import train_dataset
from clmoe.bases.llava import LoadedBase, VisionCache, attach_cache, load_base, vision_tower_of
from clmoe.config import ModelConfig
from clmoe.data.records import TrainRecord, Turn
from clmoe.errors import ClmoeError
from tests.runs import Runs, contents, events, tensors, texts
from tests.support import TASKS

NAMES = ("0.png", "1.png", "2.png")


@pytest.fixture
def images(mini_yaml: Path, tmp_path: Path) -> Path:
    """Images of the test's own, free to be changed."""
    return Path(shutil.copytree(mini_yaml.parent / "colour" / "images", tmp_path / "images"))


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedBase:
    monkeypatch.setenv("CLMOE_VISION", str(tmp_path / "vision"))
    return load_base(ModelConfig(path=str(tiny_folder)))


TURNS = (Turn("What is it?", "red"),)
RECORDS = [TrainRecord(str(i), image, TURNS) for i, image in enumerate(("0.png", "1.png", "0.png", None))]


def fill(base: LoadedBase, *images: Path) -> dict[str, bytes]:
    """What the cache holds when these are in it."""
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


def test_equal_images_are_kept_once_and_a_new_content_anew(base: LoadedBase, images: Path) -> None:
    again = Path(shutil.copy(images / NAMES[0], images / "again.png"))
    assert len(fill(base, images / NAMES[0], again)) == 1
    before = base.vision.read(again)
    Image.new("RGB", (20, 20), (0, 250, 0)).save(again)
    os.utime(again, ns=(1, 1))  # an edit within the clock's resolution is still an edit
    assert len(fill(base, again)) == 2
    assert not torch.equal(base.vision.read(again), before)
    assert torch.equal(base.vision.read(images / NAMES[0]), before)


def test_every_cause_of_other_features_is_another_folder(
    base: LoadedBase, new_base: Callable[[], LoadedBase], tmp_path: Path
) -> None:
    def attached(base: LoadedBase) -> VisionCache | None:
        return attach_cache(base.model, base.image_processor, base.fingerprint)

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
