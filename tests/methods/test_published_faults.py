"""One regression test per fault of the published CL-MoE code; docs/faults.md describes each."""

import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from clmoe.bases.llava import PROJECTOR, LoadedBase
from clmoe.config import LocatorConfig
from clmoe.data.batches import PromptDataset, TrainDataset
from clmoe.data.images import read_pixels
from clmoe.data.records import Question, TrainRecord, Turn
from clmoe.experts.forward import adapted_base
from clmoe.experts.model import adapter_tensors, attach_adapter, load_adapter
from clmoe.experts.routing import NEWEST_ROUTER, RouteSelection, routing
from clmoe.locators.base import Asked
from clmoe.locators.prototype import Prototype
from clmoe.methods.base import Method, TaskContext
from clmoe.methods.clmoe import ClMoe, keep_weights, load_statistics, mix
from clmoe.train.loop import parameter_groups
from tests.runs import Runs, contents, same_bits, tensors
from tests.support import TASKS, prompt_batch, tiny_config

EXPERTS = 4


@pytest.fixture(scope="module")
def merged(runs: Runs) -> tuple[Path, Path, Path]:
    """theta_1, phi_2 and theta_2 on disk."""
    parent, theta = runs.chain("clmoe")
    phi = runs.train(runs.root / "faults" / TASKS[1], "clmoe", TASKS[1], "options.consolidation=none", previous=parent)
    return parent, phi, theta


def test_fault_merge_matches_no_tensor(merged: tuple[Path, Path, Path]) -> None:
    """Published: the merge looks for keys by a prefix that no saved key has, and silently changes nothing.

    Here: every expert tensor of every adapted linear lies strictly between phi and theta_{t-1} wherever they differ.
    """
    old, new, result = (tensors(folder) for folder in merged)
    experts = [name for name in result if "clmoe_experts" in name]
    assert len(experts) == 2 * 3 * 2, "two blocks, three linears, two factors"
    for name in experts:
        assert not torch.equal(result[name], new[name]), f"{name} was not merged"
        assert not torch.equal(result[name], old[name]), f"{name} was not trained"
        low, high = torch.minimum(old[name], new[name]), torch.maximum(old[name], new[name])
        assert bool(((result[name] >= low) & (result[name] <= high)).all())


def test_fault_merge_of_a_missing_tensor_is_silent(
    merged: tuple[Path, Path, Path], runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published: names that do not match are skipped. Here they stop the run, and nothing is published."""
    monkeypatch.setattr("clmoe.methods.clmoe.tensor_name", lambda module, inner: f"loraA.0.{inner}")
    with pytest.raises(KeyError, match=r"loraA\.0"):
        runs.train(tmp_path / TASKS[1], "clmoe", TASKS[1], previous=merged[0])
    assert not (tmp_path / TASKS[1]).exists()


def test_fault_class_list_keeps_eight_of_eight(merged: tuple[Path, Path, Path]) -> None:
    """Published: the salient list keeps the top 8 of at most 8 experts, so no expert is ever task-specific.

    Here: K = 2 experts per module, and some experts are task-specific while others are not.
    """
    method = ClMoe(tiny_config("clmoe", Path("nowhere")))
    history = load_statistics(merged[2] / "statistics.safetensors")
    for sets in method.salient_sets(history):
        assert {len(chosen) for chosen in sets.values()} == {2}
    gamma = method.options.gamma
    keep = torch.stack(list(method.keep_by_module(history).values()))
    assert int((keep == gamma).sum(1).min()) >= EXPERTS - 2, "at most K experts of a module are specific"
    before, now = torch.arange(8.0), torch.arange(8.0).flip(0)
    turned = [{"module": {"gate_mean": gate / 28}} for gate in (before, now)]
    keep = method.keep_by_module(turned)["module"]
    assert (keep != gamma).nonzero().flatten().tolist() == [0, 1], "the two most used of eight, unused before"


def test_fault_roles_reversed() -> None:
    """Published: the weights of the old and the new experts are exchanged.

    Here: a task-specific expert keeps 1 - gamma = 0.3 of its old weights and takes 0.7 from the new task; any other
    keeps gamma = 0.7 (paper, eq. 10-11).
    """
    keep = keep_weights(now={0, 1}, before={1}, experts=3, gamma=0.7)
    old, new = torch.zeros(3), torch.ones(3)
    torch.testing.assert_close(mix(old, new, keep), torch.tensor([0.7, 0.3, 0.3]))


def test_fault_projector_not_restored_between_tasks(
    runs: Runs, merged: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Published: stripped keys and strict=False restore nothing, so tasks 2..N start from a random projector.

    Here: the projector is trained, and before and after the hand-over it is the same bit for bit.
    """
    parent = merged[0]
    start: dict[str, Tensor] = {}

    def spy(self: Method, context: TaskContext) -> None:
        start.update({k: v.detach().clone() for k, v in adapter_tensors(context.model).items() if PROJECTOR in k})
        live = adapted_base(context.model).model.multi_modal_projector
        start["output"] = live(torch.ones(1, 32)).detach()

    monkeypatch.setattr(ClMoe, "begin_task", spy)
    runs.train(tmp_path / TASKS[1], "clmoe", TASKS[1], "training.steps=1", previous=parent)
    saved = {name: value for name, value in tensors(parent).items() if PROJECTOR in name}
    assert len(saved) == 4, "two linears, weight and bias"
    assert start.keys() == {*saved, "output"}
    for name, value in saved.items():
        assert same_bits(start[name], value), name
    # and it is the saved projector that computes, not a copy beside it
    first, second = sorted({name.rpartition(".")[0] for name in saved})
    hidden = torch.nn.functional.gelu(torch.ones(1, 32) @ saved[f"{first}.weight"].t() + saved[f"{first}.bias"])
    torch.testing.assert_close(start["output"], hidden @ saved[f"{second}.weight"].t() + saved[f"{second}.bias"])


def test_fault_projector_is_trained_and_differs_from_the_bases(
    merged: tuple[Path, Path, Path], pristine_base: LoadedBase
) -> None:
    """Without this the test above could pass on a projector that never trains."""
    base = pristine_base.model.state_dict()
    for folder in merged:
        for name, value in tensors(folder).items():
            if PROJECTOR in name:
                assert not torch.equal(base[name.removeprefix("base_model.model.")], value), name


def test_fault_projector_learning_rate_ignored(tiny_base: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published (CoIN's trainer, which it builds on): the projector's learning rate is read and never used.

    Here: a parameter group of its own, which the optimizer gets.
    """
    config = tiny_config("clmoe", Path("nowhere"), "adapter.train_projector=true")
    model = attach_adapter(tiny_base.model, ClMoe(config).adapter(tiny_base))
    adapter, projector = parameter_groups(model, 2e-4, 2e-5)
    assert (adapter["lr"], projector["lr"]) == (2e-4, 2e-5)
    own = {id(p) for name, p in model.named_parameters() if PROJECTOR in name and p.requires_grad}
    assert {id(p) for p in projector["params"]} == own  # type: ignore[attr-defined]
    assert len(own) == 4
    assert not own & {id(p) for p in adapter["params"]}  # type: ignore[attr-defined]


def test_fault_projector_learning_rate_reaches_the_optimizer(runs: Runs, tmp_path: Path) -> None:
    """A projector learning rate of zero leaves the projector and nothing else as it was."""
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


def test_fault_beta_mix_missing(merged: tuple[Path, Path, Path], tiny_base: LoadedBase) -> None:
    """Published: the task router does not exist; the instance router alone decides at test time.

    Here: the task's gate changes the output, and differently for each task.
    """
    model = load_adapter(tiny_base.model, merged[2], trainable=False)
    batch = prompt_batch(tiny_base, ["What is it?", "How many things are there?"])

    def logits(selection: RouteSelection) -> Tensor:
        with torch.no_grad(), routing(selection):
            return adapted_base(model)(**batch).logits

    alone = logits(NEWEST_ROUTER)
    first, second = (logits(RouteSelection(task=torch.tensor([task, task]), beta=0.5)) for task in (0, 1))
    assert not torch.equal(first, alone)
    assert not torch.equal(second, alone)
    assert not torch.equal(first, second)


def test_fault_task_index_missing(merged: tuple[Path, Path, Path]) -> None:
    """Published: no centre is stored and the task of a test sample is never looked for.

    Here: the checkpoint holds one centre per task, and a training feature's nearest centre is its own task's.
    """
    older, index = (Prototype(LocatorConfig("prototype"), seed=0) for _ in range(2))
    index.load(merged[2] / "locator.safetensors")
    assert index.count.tolist() == [24, 24]
    assert index.scores(Asked(["", ""], 2, index.mean.float())).argmax(1).tolist() == [0, 1]
    older.load(merged[0] / "locator.safetensors")
    assert same_bits(index.mean[:1], older.mean), "an older task's centre never moves"
    assert ClMoe.keeps_parts


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
    """Published: training pads images to a square, evaluation resizes and cuts out the centre.

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
    assert same_bits(train, read_pixels(tmp_path / "wide.png", tiny_base.image_processor))
