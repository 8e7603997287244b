"""The state of an unfinished training leads to the same bytes in the end, whatever stopped it and wherever."""

from __future__ import annotations

import json
import math
import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clmoe.methods.clmoe import ClMoe
from clmoe.train.checkpoint import MANIFEST, seal
from clmoe.train.loop import TaskTrainer
from clmoe.train.state import find_state, state_folder, states
from clmoe.utils.processes import EXIT_CODE
from clmoe.utils.tensors import trainable
from tests.launch import stop_when
from tests.runs import DAMAGES, LLAVA_CMOE, Killed, Runs, contents, events, on_step
from tests.support import TASKS

FIRST, SECOND = TASKS[:2]
SETTINGS = ("training.steps=7", "training.save_steps=2", "adapter.dropout=0.2", "training.learning_rate=0.003")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# The second task begins with four probe steps; test_contract.py kills every method once.
@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 3, 5, 10])
def test_killed_at_any_step_it_goes_on_to_the_same_bytes(
    stop: int, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*SETTINGS, *LLAVA_CMOE, "options.probe_min_steps=4")
    (first, second), output = runs.chain("llava_cmoe", *settings), tmp_path / SECOND
    with monkeypatch.context() as patch:
        on_step(patch, stop)
        with pytest.raises(Killed):
            runs.train(output, "llava_cmoe", SECOND, *settings, previous=first)
    with monkeypatch.context() as patch:
        made = on_step(patch, -1)
        runs.train(output, "llava_cmoe", SECOND, *settings, previous=first)
    assert len(made) == 11 - stop + stop % 2, "it went on from the newest state"
    assert contents(output) == contents(second)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_sigterm_saves_and_says_so(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (first, second), output = runs.chain("clmoe", *SETTINGS), tmp_path / SECOND
    with monkeypatch.context() as patch:
        on_step(patch, 2, terminate)
        with pytest.raises(SystemExit) as stop:
            runs.train(output, "clmoe", SECOND, *SETTINGS, "training.save_steps=0", previous=first)
    assert stop.value.code == EXIT_CODE == 75
    assert "after step 3" in capsys.readouterr().err
    (stopped,) = events(tmp_path, "interrupted")
    assert stopped["phase"] == "trained" and stopped["seconds"] > 0, "its time counts"
    with monkeypatch.context() as patch:
        made = on_step(patch, -1)
        runs.train(output, "clmoe", SECOND, *SETTINGS, previous=first)
    assert made[0] == 3, "the step during which the signal came is not lost"
    assert contents(output) == contents(second)


@pytest.mark.slow
def test_sigterm_in_the_last_step_loses_nothing(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / FIRST
    with monkeypatch.context() as patch:
        on_step(patch, 6, terminate)
        with pytest.raises(SystemExit) as stop:
            runs.train(output, "lora", FIRST, *SETTINGS)
    assert stop.value.code == EXIT_CODE
    with monkeypatch.context() as patch:
        made = on_step(patch, -1)
        runs.train(output, "lora", FIRST, *SETTINGS)
    assert made == [], "the phase was sealed before the command ended"
    assert contents(output) == contents(runs.chain("lora", *SETTINGS)[0])


@pytest.mark.slow
def test_sigterm_to_the_whole_group_is_survived_by_the_data_workers(runs: Runs, tmp_path: Path) -> None:
    """SLURM and the launchers signal the whole group, but the step under way still needs batches from the workers."""
    more = ("training.steps=5000", "training.save_steps=0", "training.workers=2")
    line = ["-m", "clmoe.cli", "train", "--config", "lora", "--task", FIRST, "--output", str(tmp_path / FIRST)]
    line += ["--benchmark", str(runs.benchmark), "--model", str(runs.model), *more]
    log = tmp_path / "events.jsonl"
    assert stop_when(lambda: log.is_file() and bool(events(tmp_path, "step")), 1, *line, group=True) == EXIT_CODE
    phase = tmp_path / f".{FIRST}.partial" / ".phases" / "trained"
    assert len(states(phase)) == 1


@pytest.mark.slow
def test_weights_that_ran_away_are_not_kept(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is checked between two logged losses, yet neither a state nor the phase may hold a weight's NaN."""
    output = tmp_path / FIRST
    real = TaskTrainer.training_step
    for number, when in ((1, "step 2"), (6, "the end of phase trained")):

        def step(self: TaskTrainer, *args: Any, number: int = number, **kwargs: Any) -> Any:
            loss = real(self, *args, **kwargs)
            if self.state.global_step == number:
                next(iter(trainable(self.model).values())).data.fill_(float("nan"))
            return loss

        with monkeypatch.context() as patch:
            patch.setattr(TaskTrainer, "training_step", step)
            with pytest.raises(SystemExit) as stop:
                runs.train(output, "lora", FIRST, *SETTINGS)
        assert stop.value.code == 2
        assert f"is not finite at {when}: lower training.learning_rate" in capsys.readouterr().err
        assert not output.exists()
    runs.train(output, "lora", FIRST, *SETTINGS)
    assert contents(output) == contents(runs.chain("lora", *SETTINGS)[0])


def test_a_loss_that_is_not_finite_stops_at_its_step(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = TaskTrainer.training_step

    def step(self: TaskTrainer, *args: Any, **kwargs: Any) -> Any:
        return real(self, *args, **kwargs) * (float("nan") if self.state.global_step == 2 else 1)

    monkeypatch.setattr(TaskTrainer, "training_step", step)
    with pytest.raises(SystemExit) as stop:
        runs.train(tmp_path / FIRST, "lora", FIRST)
    assert stop.value.code == 2
    assert "the loss is not finite at step 3: lower training.learning_rate" in capsys.readouterr().err
    assert [event["step"] for event in events(tmp_path, "step")] == [1, 2]


@pytest.mark.slow
def test_a_gradient_that_overflows_ends_the_training(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step with an infinite norm changes no weight and is counted, three end the training, and JSON stays JSON."""
    real = TaskTrainer.training_step
    for bad, size, code in (((1,), 3e38, None), ((3,), math.inf, None), ((2, 3, 4), 3e38, 2)):
        weights: list[list[Tensor]] = []

        def step(self: TaskTrainer, *args: Any, of: Any = (bad, size, weights), **kwargs: Any) -> Any:
            bad, size, seen = of
            seen.append([parameter.detach().clone() for parameter in trainable(self.model).values()])
            loss = real(self, *args, **kwargs)
            if self.state.global_step in bad:
                for parameter in trainable(self.model).values():
                    parameter.grad.view(-1)[0] = size  # type: ignore[union-attr]
            return loss

        output = tmp_path / f"{bad}" / FIRST
        with monkeypatch.context() as patch:
            patch.setattr(TaskTrainer, "training_step", step)
            if code is None:
                with pytest.warns(UserWarning, match="1 of 7 updates"):
                    runs.train(output, "lora", FIRST, *SETTINGS, "training.logging_steps=1")
            else:
                with pytest.raises(SystemExit) as stop:
                    runs.train(output, "lora", FIRST, *SETTINGS, "training.logging_steps=1")
                assert stop.value.code == code and "step 5" in capsys.readouterr().err and not output.exists()
        still = [all(map(torch.equal, *pair)) for pair in pairwise(weights)]
        assert [number for number, same in enumerate(still) if same] == [step for step in bad if step < len(still)]
        lines = (output.parent / "events.jsonl").read_text().splitlines()
        rows = [json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in lines]
        lost = [row["step"] - 1 for row in rows if row["event"] == "step" and row["grad_norm"] is None]
        assert lost == list(bad[:2] if code else bad)
        assert [row.get("lost_updates") for row in rows if row["event"] == "trained"] == ([] if code else [1])


@pytest.mark.slow
def test_a_superfluous_file_in_a_state_is_named_and_costs_nothing(
    interrupted: tuple[Path, Path], runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, phase = interrupted
    stranger = state_folder(phase, 6) / "Thumbs.db"
    stranger.touch()
    with pytest.raises(SystemExit):
        runs.train(output, "clmoe", FIRST, *SETTINGS)
    assert f"{stranger} does not belong" in capsys.readouterr().err
    stranger.unlink()
    made = on_step(monkeypatch, -1)
    runs.train(output, "clmoe", FIRST, *SETTINGS)
    assert made == [6]


@pytest.mark.slow
def test_sigterm_outside_of_training(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = runs.chain("clmoe", *SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(ClMoe, "end_task", lambda *unused: terminate())
        with pytest.raises(SystemExit) as stop:
            runs.train(tmp_path / SECOND, "clmoe", SECOND, *SETTINGS, previous=first)
    assert stop.value.code == EXIT_CODE
    runs.train(tmp_path / SECOND, "clmoe", SECOND, *SETTINGS, previous=first)
    assert contents(tmp_path / SECOND) == contents(second)
    assert len(events(tmp_path, "trained")) == 1


@pytest.fixture
def interrupted(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The output of a task that was killed in its seventh step, and the folder of its training phase."""
    output = tmp_path / FIRST
    with monkeypatch.context() as patch:
        on_step(patch, 6)
        with pytest.raises(Killed):
            runs.train(output, "clmoe", FIRST, *SETTINGS)
    return output, tmp_path / f".{FIRST}.partial" / ".phases" / "trained"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "damage"),
    [("state.safetensors", "truncated"), ("state.safetensors", "flipped"), ("state.json", "deleted")],
)
def test_a_damaged_state_is_named_and_the_one_before_used(
    file: str, damage: str, interrupted: tuple[Path, Path], runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, phase = interrupted
    DAMAGES[damage](state_folder(phase, 6) / file)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match=f"{phase.name}.step-00000006/{file}"):
        made = on_step(patch, -1)
        runs.train(output, "clmoe", FIRST, *SETTINGS)
    assert made[0] == 4
    assert contents(output) == contents(runs.chain("clmoe", *SETTINGS)[0])


def test_the_newest_two_are_kept_and_one_without_manifest_does_not_exist(interrupted: tuple[Path, Path]) -> None:
    _, phase = interrupted
    assert states(phase) == [state_folder(phase, 6), state_folder(phase, 4)]
    (state_folder(phase, 6) / MANIFEST).unlink()
    assert find_state(phase) == state_folder(phase, 4)
    assert find_state(phase.with_name("probe")) is None


def test_a_state_of_other_parameters_is_refused(
    interrupted: tuple[Path, Path], runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    output, phase = interrupted
    folder = state_folder(phase, 6)
    tensors = load_file(folder / "state.safetensors")
    tensors["weight.other"] = tensors.pop(next(name for name in tensors if name.startswith("weight.")))
    save_file(tensors, folder / "state.safetensors")
    seal(folder)
    with pytest.raises(SystemExit) as stop:
        runs.train(output, "clmoe", FIRST, *SETTINGS)
    assert stop.value.code == 2
    assert "weight.other" in (error := capsys.readouterr().err) and "unmatched" in error
