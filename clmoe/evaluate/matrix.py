"""The accuracy matrix of a task sequence and the metrics computed from it, all in percent.

``A[t][i]`` is the score on task i after training task t (tasks numbered 1..N in training order, row 0 is the untrained
model). Papers divide the same sum by different numbers, so a name here says its divisor:

    last              mean_i A[N][i]                                   also printed as Mean, MFN, AP
    immediate         mean_i A[i][i]                                   MFT
    maa               mean_t mean_{i<=t} A[t][i]                       CoIN's mean average accuracy
    bwt_n             sum_{i<N} (A[N][i] - A[i][i]) / N                CoIN's BWT
    bwt_n_minus_1     the same sum / (N - 1)                           Lopez-Paz and Ranzato 2017, MCITlib
    forgetting_max    mean_{i<N} (max_{i<=t<N} A[t][i] - A[N][i])      VQACL's AF
    fwt_n_minus_1     mean_{i>=2} (A[i-1][i] - A[0][i])                Lopez-Paz and Ranzato 2017
    immediate_known   mean_i K[i]
    bwt_known         mean_i (A[N][i] - K[i]), over all N              LLaVA-CMoE

``K[i]`` is the score on task i right after its training, with the right router given. ``G[t]`` is the mean score after
task t on the benchmark's sets of general ability, which no task trains:

    general_zero_shot  G[0]
    general_last       G[N]
    general_change     G[N] - G[0]                                     negative: general ability was lost

A metric is None if a cell that it needs was not measured.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, Self

import numpy as np

from clmoe.errors import ClmoeError
from clmoe.utils.files import csv_text, read_csv, write_text

ZERO_SHOT = "zero_shot"
METRICS = (
    "last", "immediate", "maa", "bwt_n", "bwt_n_minus_1", "forgetting_max", "fwt_n_minus_1", "immediate_known",
    "bwt_known",
)  # fmt: skip
GENERAL_METRICS = ("general_zero_shot", "general_last", "general_change")
ONE_TASK = ("last", "immediate", "maa", "bwt_n", "immediate_known", "bwt_known")  # do not compare tasks
Scores = tuple[float | None, ...]
Unit = Literal["percent", "fraction"]
MEANS = ("mean", "average", "avg", "avg.", "overall", "macro")
ROUNDED = 0.051  # percent; how far a mean printed with one decimal may be off


@dataclass(frozen=True, slots=True)
class AccuracyMatrix:
    """Scores in percent: ``rows[after][i]`` on ``tasks[i]`` after training ``after``; None or no row: not measured."""

    tasks: tuple[str, ...]
    rows: Mapping[str, Scores]

    @property
    def stages(self) -> tuple[str, ...]:
        """All row labels in order: ``zero_shot``, then the tasks."""
        return (ZERO_SHOT, *self.tasks)

    def row(self, after: str) -> Scores:
        """The scores after that stage, [N]; all None if the row was not measured."""
        return self.rows.get(after, (None,) * len(self.tasks))

    @classmethod
    def read_csv(cls, path: Path) -> Self:
        """Read a matrix file: a column ``after``, then one per task. ClmoeError names file, row and column."""
        tasks, lines = _read_table(path)
        order, rows = [ZERO_SHOT, *tasks], dict[str, Scores]()
        for line, after, scores in lines:
            where = f"{path}, row {line}, column 'after': {after!r}"
            if after not in order:
                raise ClmoeError(f"{where} is neither a column of this file nor {ZERO_SHOT!r}")
            if any(order.index(after) <= order.index(earlier) for earlier in rows):
                raise ClmoeError(f"{where} comes twice or too late; rows and columns must be in training order")
            rows[after] = scores
        return cls(tasks, rows)

    def write_csv(self, path: Path) -> None:
        """Write the matrix so that ``read_csv`` returns it exactly."""
        write_table(path, self.tasks, [(stage, self.rows[stage]) for stage in self.stages if stage in self.rows])


def metrics(matrix: AccuracyMatrix, immediate_known: Sequence[float | None] | None = None) -> dict[str, float | None]:
    """All metrics of this module by name; ``immediate_known`` is K, [N] in the order of ``matrix.tasks``."""
    N = len(matrix.tasks)
    A = np.array([matrix.row(stage) for stage in matrix.stages], dtype=float)  # [N + 1, N], nan if not measured
    K = np.array(immediate_known or [None] * N, dtype=float)
    last, immediate = A[N], A.diagonal(-1)
    backward = (last - immediate)[:-1]
    values: dict[str, Iterable[float]] = {
        "last": last,
        "immediate": immediate,
        "maa": [_mean(A[t, :t]) for t in range(1, N + 1)],
        "bwt_n": [*backward, 0.0],
        "bwt_n_minus_1": backward,
        "forgetting_max": [A[i + 1 : N, i].max() - last[i] for i in range(N - 1)],
        "fwt_n_minus_1": A.diagonal()[1:] - A[0, 1:],
        "immediate_known": K,
        "bwt_known": last - K,
    }
    means = {name: _mean(of_one) for name, of_one in values.items()}
    return {name: None if math.isnan(mean) else mean for name, mean in means.items()}


def general_metrics(rows: Mapping[str, Scores], last: str) -> dict[str, float | None]:
    """The ``GENERAL_METRICS``; ``rows`` are as from ``read_general_csv``, ``last`` is the last task trained."""
    before, after = (_mean(np.array(rows.get(stage, ()), dtype=float)) for stage in (ZERO_SHOT, last))
    values = zip(GENERAL_METRICS, (before, after, after - before), strict=True)
    return {name: None if math.isnan(value) else float(value) for name, value in values}


def _mean(values: Iterable[float]) -> float:
    """nan if there are no values, or one of them was not measured."""
    return statistics.fmean([*values] or [math.nan])


def metrics_from_files(
    matrix: Path, immediate: Path | None = None, unit: Unit | None = None
) -> tuple[dict[str, float | None], dict[str, str]]:
    """The metrics of a matrix file and, if given, its one-row file of K; and what is missing for each that is None.

    ``unit`` is that of the scores in both files (default: percent). Raises ClmoeError, besides ``read_csv``'s reasons,
    for a file without a score, for a column of means, and if scores may be shares but no unit says so.
    """
    loaded = AccuracyMatrix.read_csv(matrix)
    known = None if immediate is None else read_immediate_csv(immediate, loaded.tasks)
    _check_scores(matrix, loaded.rows.values(), unit)
    _check_means(matrix, loaded)
    if immediate is not None:
        _check_scores(immediate, [known or ()], unit)
    factor = 100 if unit == "fraction" else 1
    rows = {after: _times(factor, scores) for after, scores in loaded.rows.items()}
    found = metrics(AccuracyMatrix(loaded.tasks, rows), None if known is None else _times(factor, known))
    return found, {name: _lacking(name, loaded, known) for name, value in found.items() if value is None}


def _times(factor: int, scores: Scores) -> Scores:
    return tuple(None if score is None else factor * score for score in scores)


def _check_scores(path: Path, rows: Iterable[Scores], unit: Unit | None) -> None:
    given = [score for scores in rows for score in scores if score is not None]
    if not given:
        raise ClmoeError(f"{path}: no score below the header; a row is a task's name and the scores after its training")
    if unit is None and 0 < max(given) <= 1:
        raise ClmoeError(
            f"{path}: no score is above 1: are they shares or percent? Say --unit fraction or --unit percent"
        )
    if unit == "fraction" and max(given) > 1:
        raise ClmoeError(f"{path}: {max(given):g} is above 1, so it is not a share: leave out --unit fraction")


def _check_means(path: Path, matrix: AccuracyMatrix) -> None:
    """Refuse a column of means, which would count as a task; tasks have a row of their own once they are trained."""
    for i, name in enumerate(matrix.tasks):
        others = [(scores[i], [s for j, s in enumerate(scores) if j != i and s is not None]) for scores in
                  matrix.rows.values()]  # fmt: skip
        equal = [mean is not None and abs(mean - _mean(rest)) < ROUNDED for mean, rest in others if rest]
        if name not in matrix.rows and (name.lower() in MEANS or (len(equal) > 1 and all(equal))):
            raise ClmoeError(f"{path}, header: column {name!r} is the mean of the others, not a task: remove it")


def _lacking(name: str, matrix: AccuracyMatrix, known: Scores | None) -> str:
    """The first cell whose absence alone leaves a metric without a value; or why no cell could give it one."""

    def filled(scores: Scores, but: int | None) -> Scores:
        return tuple(0.0 if s is None and i != but else s for i, s in enumerate(scores))

    blank = (None,) * len(matrix.tasks)
    rows = {stage: matrix.row(stage) for stage in matrix.stages} | {"--immediate": known or blank}
    for after, i in product(rows, range(len(blank))) if len(blank) > 1 or name in ONE_TASK else ():
        full = {stage: filled(scores, i if stage == after else None) for stage, scores in rows.items()}
        if full[after][i] is None and metrics(AccuracyMatrix(matrix.tasks, full), full["--immediate"])[name] is None:
            return f"needs row {after}, column {matrix.tasks[i]}"
    return "needs two tasks"


def read_immediate_csv(path: Path, tasks: Sequence[str]) -> Scores:
    """Read K, [N] in the order of ``tasks``, from a matrix file with one row of any label. Raises like ``read_csv``."""
    columns, lines = _read_table(path)
    odd = sorted(set(columns) ^ set(tasks))
    if odd:
        raise ClmoeError(f"{path}, header: task {odd[0]!r} is in only one of this file and the matrix")
    if len(lines) != 1:
        raise ClmoeError(f"{path}: expected one row of scores below the header, found {len(lines)}")
    by_task = dict(zip(columns, lines[0][2], strict=True))
    return tuple(by_task[task] for task in tasks)


def read_general_csv(path: Path, order: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Scores]]:
    """The sets of general ability, and their scores by stage: ``zero_shot`` or a task. Raises like ``read_csv``."""
    sets, lines = _read_table(path)
    rows = {after: scores for _, after, scores in lines}
    if odd := [f"row {line}: {after!r}" for line, after, _ in lines if after not in (ZERO_SHOT, *order)]:
        raise ClmoeError(f"{path}, {odd[0]} is neither {ZERO_SHOT!r} nor a task of {', '.join(order)}")
    return sets, rows


def _read_table(path: Path) -> tuple[tuple[str, ...], list[tuple[int, str, Scores]]]:
    """Task names, then (line number, label, scores) of every row."""
    table = read_csv(path)
    if not table or table[0][1][0] != "after":
        raise ClmoeError(f"{path}, header: expected 'after,<task>,...', found {table[0][1] if table else 'nothing'}")
    tasks = tuple(table[0][1][1:])
    if not tasks:
        raise ClmoeError(f"{path}, header: no task")
    for number, task in enumerate(tasks, 1):
        if not task or task == ZERO_SHOT or task in tasks[: number - 1]:
            raise ClmoeError(f"{path}, header: task {number} is {task!r}, which is empty, used twice or a row's label")
    rows = []
    for line, (after, *cells) in table[1:]:
        if len(cells) != len(tasks):
            raise ClmoeError(f"{path}, row {line}: {len(cells)} scores for {len(tasks)} tasks; leave blank ones empty")
        scores = [_score(text, f"{path}, row {line}, column {task!r}") for task, text in zip(tasks, cells, strict=True)]
        rows.append((line, after, tuple(scores)))
    return tasks, rows


def _score(text: str, where: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ClmoeError(f"{where}: {text!r} is not a score in percent; leave the cell empty if not measured")
    return value


def write_table(path: Path, tasks: Sequence[str], lines: Iterable[tuple[str, Sequence[float | None]]]) -> None:
    """Write the file that ``read_csv``, ``read_immediate_csv`` and ``read_general_csv`` read: a row for each label."""
    rows = [[after, *("" if value is None else repr(float(value)) for value in scores)] for after, scores in lines]
    write_text(path, csv_text([["after", *tasks], *rows]))
