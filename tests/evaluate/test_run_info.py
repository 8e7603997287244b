"""``run.json``: whose run it is, and that a folder holds one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.runs import Runs


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
