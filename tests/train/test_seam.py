"""What a method may do between backward and step: change gradients, set its own rates, keep state, log numbers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from clmoe.benchmarks.base import Benchmark
from clmoe.config import load_config
from clmoe.errors import ClmoeError
from clmoe.report import plots
from clmoe.report.runs import group_runs, read_run
from clmoe.train.checkpoint import read_checkpoint
from clmoe.train.task import prepare_request
from clmoe.utils.tensors import same_bits
from tests.launch import launch
from tests.report.folders import make_run
from tests.runs import Killed, Runs, contents, events, on_step, tensors
from tests.support import TASKS

FIRST = TASKS[0]
SETTINGS = ("adapter.train_projector=false", "training.max_grad_norm=1e-3")
MEAN = '''
"""The optimizer follows the mean of all gradients so far, halved, with A's rate {A} and B's {B} times the usual."""

import torch

from clmoe.methods.lora import Lora


class Mean(Lora):
    """As above."""

    needs_gradients = True
    total = None

    def rate_factor(self, name):
        return {A} if ".lora_A." in name else {B}

    def change_gradients(self, model, gradients, step):
        self.log("length", torch.stack([g.norm() for g in gradients.values()]).norm())
        self.total = self.total or {{name: torch.zeros_like(g) for name, g in gradients.items()}}
        for name, gradient in gradients.items():
            self.total[name] += gradient
            gradient.copy_(self.total[name] / (2 * step + 2))

    def after_step(self, model, step):
        self.log("clipped", torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())

    def state(self):
        return self.total

    def load_state(self, state):
        self.total = state


METHODS = {{"mean": Mean}}
'''


@pytest.fixture
def mean(tmp_path: Path) -> str:
    return write(tmp_path, 1.0, 1.0)


def write(folder: Path, A: float, B: float) -> str:
    path = folder / f"mean_{A}_{B}.py"
    path.write_text(MEAN.format(A=A, B=B))
    return str(path)


def measured(checkpoint: Path) -> list[dict[str, float]]:
    return [event["measured"] for event in events(checkpoint.parent, "step")]


@pytest.mark.parametrize("micro", ["null", "2"])
def test_gradients_are_the_global_batchs_and_not_yet_clipped(micro: str, mean: str, runs: Runs, tmp_path: Path) -> None:
    """The first changed gradient, whose norm is logged as grad_norm, is half of lora's, whatever the accumulation."""
    plain = runs.train(tmp_path / "lora" / FIRST, "lora", FIRST, *SETTINGS)
    changed = runs.train(tmp_path / "mean" / FIRST, mean, FIRST, *SETTINGS, f"training.micro_batch_size={micro}")
    norms = [[event["grad_norm"] for event in events(run.parent, "step")] for run in (plain, changed)]
    assert norms[1][0] == pytest.approx(norms[0][0] / 2, rel=1e-5)
    assert measured(changed)[0]["length"] == pytest.approx(norms[0][0], rel=1e-5)
    assert norms[1][0] > 1e-2, "far above the limit"
    assert [step["clipped"] for step in measured(changed)] == [pytest.approx(1e-3, rel=1e-3)] * 4


def test_killed_it_goes_on_with_what_the_method_had_gathered(
    mean: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*SETTINGS, "training.save_steps=2")
    straight = runs.train(tmp_path / "straight" / FIRST, mean, FIRST, *settings)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        on_step(patch, 3)
        runs.train(tmp_path / "killed" / FIRST, mean, FIRST, *settings)
    resumed = runs.train(tmp_path / "killed" / FIRST, mean, FIRST, *settings)
    assert contents(resumed) == contents(straight)


def test_rates_of_its_own(runs: Runs, tmp_path: Path) -> None:
    """AdamW's first step is as long as the rate wherever there is a gradient, and a factor of 0 trains nothing."""
    settings = (*SETTINGS, "training.steps=1", "training.warmup_ratio=0")
    start = runs.train(tmp_path / "0" / FIRST, write(tmp_path, 1.0, 0.0), FIRST, *settings)
    half, whole = (
        runs.train(tmp_path / str(factor) / FIRST, write(tmp_path, 0.0, factor), FIRST, *settings)
        for factor in (0.5, 1.0)
    )
    for name, value in tensors(half).items():
        if ".lora_A." in name:
            assert same_bits(value, tensors(whole)[name]), "it did not train"
        else:
            assert not tensors(start)[name].any(), "it did not train"
            assert value.any()
            torch.testing.assert_close(value, tensors(whole)[name] / 2, rtol=1e-6, atol=0)
    parts = [read_checkpoint(run).lineage for run in (start, whole)]
    assert sum(part.trainable_parameters for part in parts) == parts[0].adapter_parameters


def test_zero_is_refused_before_anything_is_loaded(
    mean: str, mini: Benchmark, tiny_folder: Path, tmp_path: Path
) -> None:
    config = load_config(mean, mini.recipe, [], str(tiny_folder))
    with pytest.raises(ClmoeError, match="--deepspeed zero2"):
        prepare_request(config, mini, FIRST, list(TASKS), None, tmp_path / FIRST, Path("configs/zero2.json"))


def test_numbers_of_a_method_are_read_with_the_run(mean: str, runs: Runs, tmp_path: Path) -> None:
    """A number logged every second step is the mean over two; in the report, each number has its own curve."""
    every = runs.train(tmp_path / "every" / FIRST, mean, FIRST, *SETTINGS)
    second = runs.train(tmp_path / "second" / FIRST, mean, FIRST, *SETTINGS, "training.logging_steps=2")
    means = [(a["length"] + b["length"]) / 2 for a, b in list(pairwise(measured(every)))[::2]]
    assert [step["length"] for step in measured(second)] == pytest.approx(means)
    run = make_run(tmp_path, "mean", 0, order=list(TASKS))
    (run / "events.jsonl").write_bytes((every.parent / "events.jsonl").read_bytes())
    table = read_run(run).measured
    assert table["name"].unique().tolist() == ["length", "clipped"]
    lengths = table[table["name"] == "length"]
    assert lengths["value"].tolist() == [step["length"] for step in measured(every)]
    assert lengths["step"].tolist() == [1, 2, 3, 4]
    panels = plots.measured(group_runs([run])).panels
    assert [panel.title for panel in panels] == [f"length: {FIRST}", f"clipped: {FIRST}"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["agem", "llaca", "dgg", "keeplora", "same"])
def test_two_processes_change_gradients_and_log_as_one(method: str, runs: Runs, tmp_path: Path) -> None:
    """Two DDP processes train the second task like one and share the work on memory, weights' gradients and spectra.

    For KeepLoRA only the loss is compared: rounding rotates singular vectors.
    """
    own = ("options.per_task=6",) if method in ("agem", "dgg") else ()
    first = runs.chain(method, *own, tasks=TASKS[:1])[0]
    settings = ("training.steps=20", "training.learning_rate=1e-3", "training.projector_learning_rate=1e-4", *own)
    alone = runs.train(tmp_path / "one" / TASKS[1], method, TASKS[1], *settings, previous=first)
    output = tmp_path / "two" / TASKS[1]
    line = ["-m", "clmoe.cli", "train", "--config", method, "--task", TASKS[1], "--output", str(output)]
    line += ["--model", str(runs.model), "--benchmark", str(runs.benchmark), "--previous", str(first), *settings]
    launch(2, *line)
    assert events(output.parent, "trained")[0]["engine"] == "DistributedDataParallel"
    one, two = (events(run.parent, "step") for run in (alone, output))
    assert [step["loss"] for step in two] == pytest.approx([step["loss"] for step in one], rel=1e-2)
    if method != "keeplora":
        assert [step.get("measured") for step in two] == [pytest.approx(step["measured"], rel=1e-2) for step in one]
        for name, value in tensors(alone).items():
            torch.testing.assert_close(tensors(output)[name], value, rtol=1e-3, atol=1e-5, msg=name)
