"""What each task added to a run's adapter, kept beside the tables so that a report needs no checkpoint.

``parameters.csv``: task, parameters trained in it, parameters stored after it. ``expansion.json``: the plans of methods
that grow.
"""

from __future__ import annotations

from pathlib import Path

from clmoe.methods.context import PLAN
from clmoe.train.lineage import Finished
from clmoe.utils.files import csv_text, read_csv, read_json, write_json, write_text

PARAMETERS = "parameters.csv"
EXPANSION = "expansion.json"


def record_growth(run: Path, done: Finished, order: list[str]) -> None:
    """Enter the newest task of a checkpoint into the run's files; entering it again changes nothing.

    Args:
        order: all tasks of the run, in training order; rows are written in it.
    """
    lineage = done.lineage
    newest = lineage.tasks[-1]
    rows = _parameter_rows(run / PARAMETERS)
    rows[newest] = (lineage.trainable_parameters, lineage.adapter_parameters)
    table = [("task", "trainable", "stored"), *((task, *rows[task]) for task in order if task in rows)]
    write_text(run / PARAMETERS, csv_text(table))
    if (done.folder / PLAN).is_file():
        _record_plan(run / EXPANSION, read_json(done.folder / PLAN), order)


def _parameter_rows(path: Path) -> dict[str, tuple[int, int]]:
    if not path.is_file():
        return {}
    return {task: (int(trainable), int(stored)) for _, (task, trainable, stored) in read_csv(path)[1:]}


def _record_plan(path: Path, plan: list[dict[str, object]], order: list[str]) -> None:
    """A checkpoint's plan holds all tasks up to its own: an older one must not shorten the run's."""
    entries = {entry["task"]: entry for entry in (read_json(path) if path.is_file() else [])}
    entries |= {entry["task"]: entry for entry in plan}
    write_json(path, [entries[task] for task in order if task in entries])
