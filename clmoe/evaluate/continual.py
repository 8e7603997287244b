"""The accuracy matrix of a task sequence and the metrics computed from it, all in percent.

`A[t][i]` is the score on task i after training task t alone (tasks numbered 1..N in training order, row 0 is
the untrained model). Papers divide the same sum by different numbers, so a name here says its divisor:

    last              mean_i A[N][i]                                   also printed as Mean, MFN, AP
    immediate         mean_i A[i][i]                                   MFT
    maa               mean_t mean_{i<=t} A[t][i]                       CoIN's mean average accuracy
    bwt_n             sum_{i<N} (A[N][i] - A[i][i]) / N                CoIN's BWT
    bwt_n_minus_1     the same sum / (N - 1)                           Lopez-Paz and Ranzato 2017, MCITlib
    forgetting_max    mean_{i<N} (max_{i<=t<N} A[t][i] - A[N][i])      VQACL's AF
    fwt_n_minus_1     mean_{i>=2} (A[i-1][i] - A[0][i])                Lopez-Paz and Ranzato 2017
    immediate_known   mean_i K[i]
    bwt_known         mean_i (A[N][i] - K[i]), over all N              LLaVA-CMoE

`K[i]` is the score on task i right after its training with the right router given. A metric that needs a cell
which was not measured is None.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clmoe.errors import ClmoeError
from clmoe.utils.files import csv_text, read_csv, write_text

ZERO_SHOT = "zero_shot"
METRICS = (
    "last",
    "immediate",
    "maa",
    "bwt_n",
    "bwt_n_minus_1",
    "forgetting_max",
    "fwt_n_minus_1",
    "immediate_known",
    "bwt_known",
)
Scores = tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class AccuracyMatrix:
    """Scores in percent, `rows[after][i]` on `tasks[i]` after training task `after`; None is not measured.

    Attributes:
        tasks: names in training order.
        rows: by the name of the task just trained, or `zero_shot` for the untrained model. Rows may be
            missing. A method without stages (multitask) writes one row under the last task's name.
    """

    tasks: tuple[str, ...]
    rows: Mapping[str, Scores]

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ClmoeError(f"an accuracy matrix needs tasks with different names, got {list(self.tasks)}")
        if ZERO_SHOT in self.tasks:
            raise ClmoeError(f"a task cannot be called {ZERO_SHOT!r}; the name marks the untrained model's row")
        for after, scores in self.rows.items():
            if after not in self.stages:
                raise ClmoeError(
                    f"row {after!r} of the accuracy matrix is neither a task nor {ZERO_SHOT!r}; "
                    f"tasks: {', '.join(self.tasks)}"
                )
            if len(scores) != len(self.tasks):
                raise ClmoeError(f"row {after!r} has {len(scores)} scores for {len(self.tasks)} tasks")

    @property
    def stages(self) -> tuple[str, ...]:
        """All row labels in order: `zero_shot`, then the tasks."""
        return (ZERO_SHOT, *self.tasks)

    def row(self, after: str) -> Scores:
        """The scores after that stage, [N]; all None if the row was not measured."""
        return self.rows.get(after, (None,) * len(self.tasks))

    def cell(self, t: int, i: int) -> float | None:
        """`A[t][i]` with the tasks numbered from 1; t = 0 is the zero-shot row."""
        return self.row(self.stages[t])[i - 1]

    def with_row(self, after: str, scores: Mapping[str, float | None]) -> AccuracyMatrix:
        """A copy in which row `after` holds these scores by task name; tasks not named are blank."""
        unknown = scores.keys() - set(self.tasks)
        if unknown:
            raise ClmoeError(f"scores for unknown task {min(unknown)!r}; tasks: {', '.join(self.tasks)}")
        row = tuple(scores.get(task) for task in self.tasks)
        rows = {**self.rows, after: row}
        return replace(self, rows={stage: rows[stage] for stage in (*self.stages, after) if stage in rows})

    @classmethod
    def read_csv(cls, path: Path) -> AccuracyMatrix:
        """Read a matrix file: first column `after`, then one column per task in training order.

        A blank cell is not measured. The file may hold any of the rows, e.g. the last one only.

        Raises:
            ClmoeError: names the file, the row (line number) and the column that is wrong.
        """
        tasks, lines = _read_table(path)
        order = (ZERO_SHOT, *tasks)
        rows: dict[str, Scores] = {}
        position = -1
        for line, after, scores in lines:
            if after not in order:
                raise ClmoeError(
                    f"{path}, row {line}, column 'after': {after!r} is neither a column of this file nor {ZERO_SHOT!r}"
                )
            if after in rows:
                raise ClmoeError(f"{path}, row {line}, column 'after': second row for {after!r}; remove one")
            if order.index(after) < position:
                raise ClmoeError(
                    f"{path}, row {line}, column 'after': {after!r} comes too late; rows and columns must "
                    "both be in training order"
                )
            position = order.index(after)
            rows[after] = scores
        return cls(tasks, rows)

    def write_csv(self, path: Path) -> None:
        """Write the matrix so that `read_csv` gives it back exactly; an old file is replaced in one step."""
        lines = [(stage, self.rows[stage]) for stage in self.stages if stage in self.rows]
        _write_table(path, self.tasks, lines)


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and sample standard deviation (divisor n - 1; None for n < 2) of the n values measured."""

    mean: float | None
    std: float | None
    n: int


def metrics(matrix: AccuracyMatrix, immediate_known: Sequence[float | None] | None = None) -> dict[str, float | None]:
    """All metrics of this module, by name, in percent; None where a needed cell is blank.

    Args:
        immediate_known: [N] each task's score right after its training with its router given, in the order
            of `matrix.tasks`.
    """
    n = len(matrix.tasks)
    known = (None,) * n if immediate_known is None else tuple(immediate_known)
    if len(known) != n:
        raise ClmoeError(f"the immediate row has {len(known)} scores for {n} tasks")
    last = matrix.row(matrix.tasks[-1])
    backward = [_minus(matrix.cell(n, i), matrix.cell(i, i)) for i in range(1, n)]
    return {
        "last": _mean(last),
        "immediate": _mean([matrix.cell(i, i) for i in range(1, n + 1)]),
        "maa": _mean([_mean(matrix.row(task)[: t + 1]) for t, task in enumerate(matrix.tasks)]),
        "bwt_n": _mean([*backward, 0.0]),
        "bwt_n_minus_1": _mean(backward),
        "forgetting_max": _mean([_forgetting(matrix, i) for i in range(1, n)]),
        "fwt_n_minus_1": _mean([_minus(matrix.cell(i - 1, i), matrix.cell(0, i)) for i in range(2, n + 1)]),
        "immediate_known": _mean(known),
        "bwt_known": _mean([_minus(a, k) for a, k in zip(last, known, strict=True)]),
    }


def metrics_from_files(matrix: Path, immediate: Path | None = None) -> dict[str, float | None]:
    """The metrics of a matrix file and, where given, its one-row file of scores with the router known."""
    loaded = AccuracyMatrix.read_csv(matrix)
    return metrics(loaded, None if immediate is None else read_immediate_csv(immediate, loaded.tasks))


def read_immediate_csv(path: Path, tasks: Sequence[str]) -> Scores:
    """Read the scores with the router known: header as in a matrix file, one row, its label is free.

    Returns:
        [N] scores in the order of `tasks`, whatever the order of the columns.

    Raises:
        ClmoeError: other tasks than `tasks`, no row, several rows, or a malformed cell.
    """
    columns, lines = _read_table(path)
    for task in tasks:
        if task not in columns:
            raise ClmoeError(f"{path}, header: column {task!r} of the matrix is missing")
    for column in columns:
        if column not in tasks:
            raise ClmoeError(f"{path}, header: column {column!r} is not a task of the matrix")
    if len(lines) != 1:
        raise ClmoeError(f"{path}: expected one row of scores below the header, found {len(lines)}")
    by_task = dict(zip(columns, lines[0][2], strict=True))
    return tuple(by_task[task] for task in tasks)


def write_immediate_csv(path: Path, tasks: Sequence[str], scores: Sequence[float | None]) -> None:
    """Write the one-row file that `read_immediate_csv` reads; scores [N] in the order of `tasks`."""
    _write_table(path, tasks, [("immediate", scores)])


def mean_spread(values: Sequence[float | None]) -> Spread:
    """Mean and spread over seeds. Blank values are left out, and `n` says how many were counted."""
    measured = [value for value in values if value is not None]
    if not measured:
        return Spread(None, None, 0)
    std = statistics.stdev(measured) if len(measured) > 1 else None
    return Spread(math.fsum(measured) / len(measured), std, len(measured))


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of all values; None if there are none or one of them is blank."""
    measured = [value for value in values if value is not None]
    if not measured or len(measured) < len(values):
        return None
    return math.fsum(measured) / len(measured)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _forgetting(matrix: AccuracyMatrix, i: int) -> float | None:
    """Best score on task i before the last stage, minus its last score; None if any cell is blank."""
    n = len(matrix.tasks)
    before = [value for t in range(i, n) if (value := matrix.cell(t, i)) is not None]
    return _minus(max(before), matrix.cell(n, i)) if len(before) == n - i else None


def _read_table(path: Path) -> tuple[tuple[str, ...], list[tuple[int, str, Scores]]]:
    """Read a CSV with first column `after`: task names, then (line number, label, scores) per row."""
    table = read_csv(path)
    if not table:
        raise ClmoeError(f"{path}: empty; expected a header 'after,<task>,...' and rows of scores")
    tasks = _check_header(path, table[0][1])
    return tasks, [(line, cells[0], _read_scores(path, line, cells, tasks)) for line, cells in table[1:]]


def _check_header(path: Path, cells: list[str]) -> tuple[str, ...]:
    if cells[0] != "after":
        raise ClmoeError(f"{path}, header: the first column must be 'after', found {cells[0]!r}")
    tasks = cells[1:]
    if not tasks:
        raise ClmoeError(f"{path}, header: no task columns after 'after'")
    for position, task in enumerate(tasks, start=2):
        if not task:
            raise ClmoeError(f"{path}, header: column {position} has no task name")
        if task == ZERO_SHOT:
            raise ClmoeError(f"{path}, header: {ZERO_SHOT!r} is a row label and cannot name a task")
        if tasks.index(task) + 2 != position:
            raise ClmoeError(f"{path}, header: task {task!r} has two columns; remove one")
    return tuple(tasks)


def _read_scores(path: Path, line: int, cells: list[str], tasks: tuple[str, ...]) -> Scores:
    if len(cells) != len(tasks) + 1:
        raise ClmoeError(
            f"{path}, row {line}: {len(cells)} cells for {len(tasks) + 1} columns; "
            "a score that was not measured is an empty cell, its comma stays"
        )
    scores: list[float | None] = []
    for task, text in zip(tasks, cells[1:], strict=True):
        scores.append(_read_score(text, f"{path}, row {line}, column {task!r}") if text else None)
    return tuple(scores)


def _read_score(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ClmoeError(f"{where}: {text!r} is not a score in percent; leave the cell empty if not measured")
    return value


def _write_table(path: Path, tasks: Sequence[str], lines: Sequence[tuple[str, Sequence[float | None]]]) -> None:
    """Write a table whose scores read back exactly; blank where nothing was measured."""
    rows = [[after, *("" if value is None else repr(float(value)) for value in scores)] for after, scores in lines]
    write_text(path, csv_text([["after", *tasks], *rows]))
