"""TensorBoard and wandb get the curve that events.jsonl holds."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from clmoe.errors import ClmoeError
from clmoe.utils import trackers
from tests.runs import Runs, events
from tests.support import TASKS


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs TensorBoard (pip install 'clmoe[train]')")
def test_tensorboard(runs: Runs, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs.train(tmp_path / TASKS[0], "lora", TASKS[0], "training.trackers=[tensorboard]")
    (folder,) = (tmp_path / "tensorboard").iterdir()
    curve = EventAccumulator(str(folder)).Reload()
    steps = events(tmp_path, "step")
    for name in ("loss", "learning_rate", "grad_norm"):
        found = [(point.step, point.value) for point in curve.Scalars(name)]
        assert found == [(step["step"], pytest.approx(step[name])) for step in steps]
    assert len(steps) == 4
    assert sorted(path.name for path in (tmp_path / TASKS[0]).iterdir()) == sorted(
        path.name for path in runs.chain("lora")[0].iterdir()
    )


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb (pip install 'clmoe[train]')")
def test_wandb_offline(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    runs.train(tmp_path / TASKS[0], "lora", TASKS[0], "training.trackers=[wandb]")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert next(folder.glob("*.wandb")).stat().st_size > 0


def test_what_is_not_installed_is_said_before_anything_is_done(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ClmoeError, match="wandb is not installed"):
        trackers.check_trackers(["wandb"])
    with pytest.raises(SystemExit):
        runs.train(tmp_path / "run" / TASKS[0], "lora", TASKS[0], "training.trackers=[wandb]")
    assert not (tmp_path / "run").exists()


def test_only_known_trackers(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runs.train(tmp_path / TASKS[0], "lora", TASKS[0], "training.trackers=[csv]")
    assert "'csv' is not one of tensorboard, wandb" in capsys.readouterr().err
