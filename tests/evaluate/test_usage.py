"""The routers' shares by task and block, from a checkpoint of CL-MoE into the run folder."""

import csv
from pathlib import Path

import pytest
from clmoe.evaluate.usage import record_usage

from clmoe.methods.clmoe import load_statistics
from clmoe.train.checkpoint import read_checkpoint
from tests.runs import Runs, contents
from tests.support import TASKS

ORDER = list(TASKS)


def test_shares_are_the_checkpoints_mean_gates(runs: Runs, tmp_path: Path) -> None:
    done = [read_checkpoint(folder) for folder in runs.chain("clmoe")]
    for finished in reversed(done):  # an older checkpoint must not shorten the file
        record_usage(tmp_path, finished, ORDER)
    with (tmp_path / "usage.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(row["task"] for row in rows)) == done[-1].lineage.tasks
    statistics = load_statistics(done[-1].folder / "statistics.safetensors")
    expected = {
        (task, block, str(expert)): float(share)
        for task, blocks in zip(done[-1].lineage.tasks, statistics, strict=True)
        for block, values in blocks.items()
        for expert, share in enumerate(values["gate_mean"])
    }
    found = {(row["task"], row["block"], row["expert"]): float(row["share"]) for row in rows}
    assert found == pytest.approx(expected, abs=1e-6)
    before = contents(tmp_path)
    record_usage(tmp_path, done[0], ORDER)
    assert contents(tmp_path) == before


def test_a_method_without_statistics_writes_nothing(runs: Runs, tmp_path: Path) -> None:
    record_usage(tmp_path, read_checkpoint(runs.chain("lora")[0]), ORDER)
    assert contents(tmp_path) == {}
