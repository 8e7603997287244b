"""One regression test per fault of the published CL-MoE code; docs/faults.md describes each."""

import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from clmoe.bases.families import PROJECTOR
from clmoe.bases.llava import LoadedBase
from clmoe.data.batches import PromptDataset, TrainDataset
from clmoe.data.images import load_image, preprocess
from clmoe.data.records import Question, TrainRecord, Turn
from clmoe.experts.forward import adapted_base
from clmoe.experts.model import load_adapter
from clmoe.experts.routing import RouteSelection, routing
from clmoe.methods.base import Method, TaskContext
from clmoe.methods.clmoe import ClMoe
from clmoe.methods.statistics import load_statistics
from clmoe.utils.tensors import same_bits
from tests.runs import Runs, contents, tensors
from tests.support import TASKS, prompt_batch, tiny_config

EXPERTS = 4


@pytest.fixture(scope="module")
def merged(runs: Runs) -> tuple[Path, Path, Path]:
    """The checkpoints theta_1, phi_2 (the second task, not consolidated) and theta_2."""
    parent, theta = runs.chain("clmoe")
    phi = runs.train(runs.root / "faults" / TASKS[1], "clmoe", TASKS[1], "options.consolidation=none", previous=parent)
    return parent, phi, theta


def test_fault_merge_of_a_missing_tensor_is_silent(
    merged: tuple[Path, Path, Path], runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published: names that do not match are skipped. Here they stop the run, and no checkpoint is written."""
    monkeypatch.setattr("clmoe.methods.clmoe.tensor_name", lambda module, inner: f"loraA.0.{inner}")
    with pytest.raises(KeyError, match=r"loraA\.0"):
        runs.train(tmp_path / TASKS[1], "clmoe", TASKS[1], previous=merged[0])
    assert not (tmp_path / TASKS[1]).exists()


def test_fault_class_list_keeps_eight_of_eight(merged: tuple[Path, Path, Path]) -> None:
    """Published: the salient list keeps the top 8 of at most 8 experts, so no expert is ever task-specific.

    Here: K = 2 experts per module, and some experts are task-specific while others are not.
    """
    method = ClMoe(tiny_config("clmoe", Path("nowhere")))
    gamma = method.options.gamma
    keep = torch.stack(list(method.keep_by_module(load_statistics(merged[2] / "statistics.safetensors")).values()))
    assert int((keep == gamma).sum(1).min()) >= EXPERTS - 2, "at most K experts of a module are specific"
    before, now = torch.arange(8.0), torch.arange(8.0).flip(0)
    keep = method.keep_by_module([{"module": {"gate_mean": gate / 28}} for gate in (before, now)])["module"]
    assert (keep != gamma).nonzero().flatten().tolist() == [0, 1], "the two most used of eight, unused before"


def test_fault_projector_not_restored_between_tasks(
    runs: Runs, merged: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Published: stripped keys and strict=False restore nothing, so tasks 2..N start from a random projector.

    Here: the model computes with the saved projector; ``test_contract.py`` shows that it is handed over bit for bit.
    """
    parent = merged[0]
    outputs: list[Tensor] = []

    def spy(self: Method, context: TaskContext) -> None:
        outputs.append(adapted_base(context.model).model.multi_modal_projector(torch.ones(1, 32)).detach())

    monkeypatch.setattr(ClMoe, "begin_task", spy)
    runs.train(tmp_path / TASKS[1], "clmoe", TASKS[1], "training.steps=1", previous=parent)
    saved = {name: value for name, value in tensors(parent).items() if PROJECTOR in name}
    first, second = sorted({name.rpartition(".")[0] for name in saved})
    hidden = torch.nn.functional.gelu(torch.ones(1, 32) @ saved[f"{first}.weight"].t() + saved[f"{first}.bias"])
    torch.testing.assert_close(outputs[0], hidden @ saved[f"{second}.weight"].t() + saved[f"{second}.bias"])


def test_fault_projector_learning_rate_reaches_the_optimizer(runs: Runs, tmp_path: Path) -> None:
    """Published (in CoIN's trainer, which it builds on): the projector's learning rate is read but never used.

    Here: a projector learning rate of zero leaves only the projector as it was.
    """
    parent = runs.chain("clmoe", tasks=TASKS[:1])[0]
    settings = ("training.projector_learning_rate=0", "options.consolidation=none", "training.steps=1")
    after, before = tensors(runs.train(tmp_path / "b", "clmoe", TASKS[1], *settings, previous=parent)), tensors(parent)
    for name, value in before.items():
        assert same_bits(after[name], value) == (PROJECTOR in name), name


def test_fault_statistics_by_wall_clock(
    runs: Runs, merged: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published: experts are counted only while the clock's second is 30.

    Here: the pass counts every token whatever the clock says; a run under another clock gives the same bytes.
    """
    later = time.time() + 12_345.6
    monkeypatch.setattr(time, "time", lambda: later)
    again = runs.train(tmp_path / TASKS[1], "clmoe", TASKS[1], previous=merged[0])
    assert contents(again) == contents(merged[2])
    counted = load_statistics(again / "statistics.safetensors")
    assert all(int(values["tokens"]) > 0 for task in counted for values in task.values())


def test_fault_task_file_read_on_every_forward(
    merged: tuple[Path, Path, Path], tiny_base: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published: every layer opens a hard-coded text file in every forward pass. Here a forward opens no file."""
    model = load_adapter(tiny_base.model, merged[2], trainable=False)
    batch = prompt_batch(tiny_base, ["What is it?"])

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a file was opened in a forward pass: {args}")

    monkeypatch.setattr("builtins.open", refuse)
    with torch.no_grad(), routing(RouteSelection(task=torch.tensor([0]), beta=0.5)):
        adapted_base(model)(**batch)


def test_fault_evaluation_crops_what_training_padded(tiny_base: LoadedBase, tmp_path: Path) -> None:
    """Published: training pads images to a square, but evaluation resizes them and cuts out the centre.

    Here: one function serves both; a wide image gives the same pixels, and its edges are still visible.
    """
    wide = Image.new("RGB", (120, 40), (0, 0, 0))
    for x in (*range(12), *range(108, 120)):
        for y in range(40):
            wide.putpixel((x, y), (255, 255, 255))
    wide.save(tmp_path / "wide.png")
    shared = (tmp_path, tiny_base.encoder)
    trained = TrainDataset([TrainRecord("1", "wide.png", (Turn("What is it?", "red"),))], *shared, 256)
    asked = PromptDataset([Question("1", "wide.png", "What is it?", "red", {})], *shared)
    train, test = trained[0].pixel_values, asked[0].pixel_values
    assert train is not None
    assert test is not None
    assert same_bits(train, test)
    middle = train[0, train.shape[1] // 2]
    assert float(middle[0]) > 0.9, "a centre crop would have cut the white edges away"
    assert float(middle[-1]) > 0.9
    assert same_bits(train, preprocess(load_image(tmp_path / "wide.png"), tiny_base.image_processor))
