"""The accuracy matrices to show of a label: the mean over its seeds, one for each task order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clmoe.evaluate.matrix import AccuracyMatrix, mean_spread
from clmoe.report.run import Group, Run


@dataclass(frozen=True, slots=True)
class Panel:
    """One matrix to draw: of a run, or the mean over the seeds of a label."""

    title: str
    seeds: tuple[int, ...]
    matrix: AccuracyMatrix


def mean_panels(group: Group) -> list[Panel]:
    """The mean matrix of a label, one for each order its seeds were trained in."""
    orders: dict[tuple[str, ...], list[Run]] = {}
    for run in group.runs:
        orders.setdefault(run.order, []).append(run)
    panels = []
    for runs in orders.values():
        title = group.label if len(runs) == 1 else f"{group.label} (mean of {len(runs)} seeds)"
        if len(orders) > 1:
            title = f"{group.label}, seed {', '.join(str(run.seed) for run in runs)}"
        seeds = tuple(run.seed for run in runs)
        panels.append(Panel(title, seeds, _mean_matrix([run.matrix for run in runs])))
    return panels


def _mean_matrix(matrices: Sequence[AccuracyMatrix]) -> AccuracyMatrix:
    """Cell by cell mean; a cell is blank unless all matrices have it."""
    tasks = matrices[0].tasks
    rows = {}
    for stage in matrices[0].stages:
        if not all(stage in matrix.rows for matrix in matrices):
            continue
        cells = zip(*(matrix.row(stage) for matrix in matrices), strict=True)
        spreads = [mean_spread(cell) for cell in cells]
        rows[stage] = tuple(value.mean if value.n == len(matrices) else None for value in spreads)
    return AccuracyMatrix(tasks, rows)
