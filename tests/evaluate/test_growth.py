"""What a run's report needs of its checkpoints, entered task by task."""

import json
from pathlib import Path

from clmoe.evaluate.growth import record_growth

from clmoe.train.checkpoint import read_checkpoint
from tests.runs import Runs, contents
from tests.support import TASKS

ORDER = list(TASKS)
FAST = [
    "adapter.train_projector=false",
    "options.initial_experts_from=first_task",
    "options.probe_min_steps=2",
    "options.probe_share=0.5",
    "options.locator.steps=5",
]


def test_rows_stand_in_the_runs_order_and_stay_when_entered_again(runs: Runs, tmp_path: Path) -> None:
    done = [read_checkpoint(folder) for folder in runs.chain("llava_cmoe", *FAST)]
    for finished in reversed(done):
        record_growth(tmp_path, finished, ORDER)
    lines = (tmp_path / "parameters.csv").read_text().splitlines()
    assert lines == [
        "task,trainable,stored",
        *(
            f"{t},{d.lineage.trainable_parameters},{d.lineage.adapter_parameters}"
            for t, d in zip(TASKS, done, strict=False)
        ),
    ]
    plan = json.loads((done[1].folder / "plan.json").read_text())
    assert json.loads((tmp_path / "expansion.json").read_text()) == plan
    assert [entry["task"] for entry in plan] == ORDER[:2]
    before = contents(tmp_path)
    record_growth(tmp_path, done[0], ORDER)
    assert contents(tmp_path) == before


def test_a_method_that_does_not_grow_has_no_plan(runs: Runs, tmp_path: Path) -> None:
    record_growth(tmp_path, read_checkpoint(runs.chain("clmoe")[0]), ORDER)
    assert sorted(contents(tmp_path)) == ["parameters.csv"]
