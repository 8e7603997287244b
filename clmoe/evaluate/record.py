"""Copy what a report needs from a checkpoint into the run's folder: its plan, parameters and routers' statistics."""

import re
from pathlib import Path
from typing import Any

from clmoe.methods.base import EXPANSION, STATISTICS
from clmoe.train.checkpoint import Finished
from clmoe.utils.files import csv_text, read_csv, read_json, write_json, write_text
from clmoe.utils.tensors import load_tensors


def record_checkpoint(run: Path, done: Finished, order: list[str]) -> None:
    """Copy what a report needs from a checkpoint into the run folder; doing it again changes nothing.

    ``parameters.csv``: trained in a task, and stored after it. ``expansion.json``: the plan of a method that grows.
    ``usage.csv``: each expert's share of its block's router weight on a task's data, right after that task's training.
    """
    lineage, newest = done.lineage, done.lineage.tasks[-1]
    trained = [newest, lineage.trainable_parameters, lineage.adapter_parameters]
    _merge_rows(run / "parameters.csv", ["task", "trainable", "stored"], [trained], order)
    if (done.folder / STATISTICS).is_file():
        usage: list[list[Any]] = []
        for key, shares in sorted(load_tensors(done.folder / STATISTICS).items()):
            if match := re.fullmatch(r"(\d+)\.(.+)\.gate_mean", key):
                task = lineage.tasks[int(match[1])]
                usage += [[task, match[2], i, f"{share:.6f}"] for i, share in enumerate(shares.tolist())]
        _merge_rows(run / "usage.csv", ["task", "block", "expert", "share"], usage, order)
    if (done.folder / EXPANSION).is_file():
        path = run / "expansion.json"
        # the plan ends with the checkpoint's own task; an older checkpoint's plan must not shorten the run's
        plan = [*(read_json(path) if path.is_file() else []), *read_json(done.folder / EXPANSION)]
        entries = {entry["task"]: entry for entry in plan}
        write_json(path, [entries[task] for task in order if task in entries])


def _merge_rows(path: Path, header: list[str], rows: list[list[Any]], order: list[str]) -> None:
    """Replace the rows of these tasks (the first column) in a table, which keeps the order of the run."""
    new = {row[0] for row in rows}
    old = [cells for _, cells in read_csv(path)[1:] if cells[0] not in new] if path.is_file() else []
    write_text(path, csv_text([header, *(row for task in order for row in [*old, *rows] if row[0] == task)]))
