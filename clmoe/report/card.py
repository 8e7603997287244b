"""The scores in a checkpoint's model card: those of this very checkpoint, from the run that measured them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clmoe.errors import ClmoeError
from clmoe.evaluate.matrix import METRICS
from clmoe.evaluate.run import summary_path
from clmoe.report.run import read_run
from clmoe.report.tables import Table, show_number, to_markdown
from clmoe.train.checkpoint import Finished
from clmoe.utils.files import read_json


def measured_scores(done: Finished, run: Path) -> str:
    """Markdown: the score on every learned task and, at the end of a sequence, the metrics of the whole run.

    Raises:
        ClmoeError: the run has not measured every learned task on this checkpoint.
    """
    tasks = done.lineage.tasks
    cells = {task: _cell(done, run, task) for task in tasks}
    after = tasks[-1]
    rows = tuple((task, str(cell["questions"]), show_number(cell["score"])) for task, cell in cells.items())
    modes = sorted({cell["settings"]["scoring"] for cell in cells.values()})
    text = f"Percent right after training `{after}`, scoring mode `{', '.join(modes)}`"
    text += ", the task of a question found from the question itself.\n\n" if cells[after]["deciders"] else ".\n\n"
    text += to_markdown(Table("", ("task", "test questions", "score"), rows))
    measured = read_run(run)
    if list(measured.order) == tasks:
        values = tuple((name, show_number(measured.metrics[name])) for name in METRICS)
        text += "\nMetrics of the whole sequence, as `clmoe metrics` names them:\n\n"
        text += to_markdown(
            Table("", ("metric", "percent"), tuple(row for row in values if row[1] != show_number(None)))
        )
    return text


def _cell(done: Finished, run: Path, task: str) -> dict[str, Any]:
    """What the evaluation wrote about a task, checked to belong to this checkpoint."""
    path = summary_path(run, done.lineage.tasks[-1], task)
    if not path.is_file():
        raise ClmoeError(f"{path} does not exist: evaluate with `clmoe eval --checkpoint {done.folder} --output {run}`")
    cell = read_json(path)
    if cell["settings"]["checkpoint"] != done.identity:
        raise ClmoeError(f"{path} was measured on another checkpoint than {done.folder}: name its run with --run")
    return cell
