"""``run.json``: whose run it is, and that a folder holds one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clmoe.evaluate.run import check_run_order
from tests.runs import Runs, contents


def info(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text()))


def test_the_bare_models_row_leaves_a_training_runs_file_as_it_is(runs: Runs, tmp_path: Path) -> None:
    runs.evaluate("base", tmp_path, model=str(runs.model))
    assert (info(tmp_path)["method"], info(tmp_path)["limit"]) == ("zero_shot", None)
    runs.evaluate(runs.chain("lora")[1], tmp_path, "evaluation.limit=5")
    trained = info(tmp_path)
    assert (trained["method"], trained["limit"]) == ("lora", 5)
    runs.evaluate("base", tmp_path, model=str(runs.model))
    assert info(tmp_path) == trained
    assert [line.split(",")[0] for line in (tmp_path / "matrix.csv").read_text().splitlines()[1:]] == [
        "zero_shot", "count",
    ]  # fmt: skip


def test_a_folder_holds_one_order(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = runs.chain("lora")[0]
    run = runs.evaluate(first, tmp_path / "run", order="colour,count")
    before = contents(run)
    for refused in (
        lambda: runs.evaluate(first, run, order="colour,side"),
        lambda: runs.evaluate("base", run, model=str(runs.model), order="rev"),
        lambda: runs.train(run / "01", "lora", "count", order="count,colour", then_eval=""),
    ):
        with pytest.raises(SystemExit):
            refused()
        error = capsys.readouterr().err
        assert f"{run} holds a run in the order colour, count, but --order here is " in error
        assert "--output" in error
        assert contents(run) == before


def test_a_sequence_may_be_made_longer(tmp_path: Path) -> None:
    check_run_order(tmp_path, ["a", "b"])
    (tmp_path / "run.json").write_text('{"order": ["a", "b"]}')
    for order in (["a"], ["a", "b"], ["a", "b", "c"]):
        check_run_order(tmp_path, order)
