"""The tables of a run folder, made from its cells."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from clmoe.evaluate.continual import ZERO_SHOT, AccuracyMatrix, metrics, write_immediate_csv
from clmoe.evaluate.evaluation import cell_stem, read_score, summary_path
from clmoe.utils.files import csv_text, read_json, write_json, write_text

if TYPE_CHECKING:
    from clmoe.model.routing import RouterChoice


def write_tables(
    run: Path,
    order: list[str],
    router: RouterChoice = "located",
    *,
    scoring: str = "fixed",
    untrained: bool = False,
) -> dict[str, float | None]:
    """Rebuild the run's tables from its cells.

    ``matrix.csv``, ``immediate.csv`` (router known, where measured), ``locator.csv`` (where tasks were located) and
    ``metrics.json``.

    Args:
        order: all tasks of the run, in training order.
        router: the matrix shows the cells of the default router; a run folder that holds none shows this one's.
        scoring: cells that were scored in another mode are blank, so that a table never mixes two.
        untrained: the method trains nothing, and so ends the sequence as it began.

    Returns the metrics.
    """
    if any(summary_path(run, after, task).is_file() for after in (ZERO_SHOT, *order) for task in order):
        router = "located"
    matrix = AccuracyMatrix(tuple(order), {})
    for after in (ZERO_SHOT, *order):
        scores = {task: read_score(run, after, cell_stem(task, router), scoring) for task in order}
        if any(value is not None for value in scores.values()):
            matrix = matrix.with_row(after, scores)
    if untrained and list(matrix.rows) == [ZERO_SHOT]:
        matrix = matrix.with_row(order[-1], dict(zip(order, matrix.row(ZERO_SHOT), strict=True)))
    known = [read_score(run, task, f"{task}.oracle", scoring) for task in order]
    immediate = None
    if any(value is not None for value in known):
        write_immediate_csv(run / "immediate.csv", order, known)
        immediate = tuple(known)
    else:
        (run / "immediate.csv").unlink(missing_ok=True)  # of another scoring mode
    _write_located(run, order)
    matrix.write_csv(run / "matrix.csv")
    result = metrics(matrix, immediate)
    write_json(run / "metrics.json", result)
    return result


def _write_located(run: Path, order: list[str]) -> None:
    """``locator.csv``: for which task each decider took the questions of each task, after each task."""
    rows = []
    for after in order:
        for task in order:
            path = summary_path(run, after, task)
            counts = read_json(path)["deciders"] if path.is_file() else {}
            for decider, located in sorted(counts.items()):
                rows += [(after, decider, task, name, located[name]) for name in order if name in located]
    if not rows:
        return
    write_text(run / "locator.csv", csv_text([("after", "decider", "task", "located", "count"), *rows]))
