"""How a checkpoint's routers used the experts, kept beside the tables so that a report needs no checkpoint.

``usage.csv``: task, block, expert (from 0), share of the router's weight that the expert got on the task's training
data, right after its training. Shares of a block sum to 1.
"""

from __future__ import annotations

from pathlib import Path

from clmoe.methods.context import STATISTICS
from clmoe.train.lineage import Finished
from clmoe.utils.files import csv_text, read_csv, write_text
from clmoe.utils.tensors import load_tensors

USAGE = "usage.csv"
HEADER = ("task", "block", "expert", "share")


def record_usage(run: Path, done: Finished, order: list[str]) -> None:
    """Enter the tasks of a checkpoint with router statistics into the run's file; again changes nothing.

    Args:
        order: all tasks of the run, in training order; rows are written in it.
    """
    if not (done.folder / STATISTICS).is_file():
        return
    rows = _rows(run / USAGE)
    rows |= _gate_means(done.folder / STATISTICS, done.lineage.tasks)
    write_text(run / USAGE, csv_text([HEADER, *(row for task in order for row in rows.get(task, []))]))


def _rows(path: Path) -> dict[str, list[list[str]]]:
    """The file's rows by task."""
    rows: dict[str, list[list[str]]] = {}
    for _, cells in read_csv(path)[1:] if path.is_file() else []:
        rows.setdefault(cells[0], []).append(cells)
    return rows


def _gate_means(path: Path, tasks: list[str]) -> dict[str, list[list[str]]]:
    """Rows by task."""
    rows: dict[str, list[list[str]]] = {}
    for key, values in sorted(load_tensors(path).items()):
        index, _, rest = key.partition(".")
        block, _, kind = rest.rpartition(".")
        if kind == "gate_mean":
            task = tasks[int(index)]
            rows.setdefault(task, []).extend(
                [task, block, str(expert), f"{share:.6f}"] for expert, share in enumerate(values.tolist())
            )
    return rows
