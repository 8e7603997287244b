"""Methods by locators: what each pair reaches, as tables, tidy CSV files and a heat map."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from clmoe.evaluate.relocate import Found
from clmoe.report import plots
from clmoe.report.tables import BLANK, Table, over_seeds, show_number, to_markdown, to_text
from clmoe.utils.files import write_text

SHOWN = {
    "last": "Last accuracy (%)",
    "bwt_n_minus_1": "BWT, divided by N - 1 (points)",
    "located": "Questions located right at the end (%)",
}
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "numbers": ("numbers stored", "{:,.0f}".format),
    "bytes": ("bytes stored", "{:,.0f}".format),
    "feature_ms": ("feature (ms)", "{:.2f}".format),
    "decision_ms": ("decision (ms)", "{:.3f}".format),
}
LEAD = """Each trained run is evaluated under each locator, which finds the task of a test question; nothing is trained
again. Last accuracy: mean score over the tasks at the end. BWT: score at the end less the score right after a task's
training, over all tasks but the last; negative is forgetting. `oracle` is told the task (what perfect location would
give), `last` takes the newest (no location), `random` any (chance)."""
Results = Mapping[tuple[str, int], list[Found]]  # (method, seed) -> its locators


def write_matrix(results: Results, output: Path, benchmark: str) -> str:
    """Write ``matrix.md``, ``matrix.csv``, ``confusion.csv`` and the heat map; returns the tables as text."""
    scores, confusion = scores_frame(results), confusion_frame(results)
    tables = [*(score_table(scores, name) for name in SHOWN), task_table(confusion), cost_table(scores)]
    output.mkdir(parents=True, exist_ok=True)
    for name, frame in (("matrix", scores), ("confusion", confusion)):
        write_text(output / f"{name}.csv", frame.to_csv(index=False, float_format="%.10g", lineterminator="\n"))
    seeds = list(dict.fromkeys(scores["seed"].astype(str)))
    over = f"Seed {seeds[0]}."
    if len(seeds) > 1:
        over = f"Mean ± sample standard deviation over the seeds {', '.join(seeds)}."
    tasks = ", ".join(dict.fromkeys(confusion["task"]))
    head = f"# Methods by locators: {benchmark}\n\n{LEAD}\n\nTasks in the order of their training: {tasks}. {over}\n"
    parts = [head, "![Methods by locators](matrix.png)\n"]
    parts += [f"## {table.title}\n\n{to_markdown(table)}\n" for table in tables]
    write_text(output / "matrix.md", "\n".join(parts))
    plots.save(picture(scores), [output / "matrix.png", output / "matrix.svg"])
    return "\n".join(to_text(table) for table in tables)


def scores_frame(results: Results) -> pd.DataFrame:
    """method, locator, seed, the metrics of ``SHOWN`` with ``bwt_n``, and ``COSTS``: one row per evaluated pair."""
    rows = []
    for (method, seed), found in results.items():
        for one in found:
            metrics = {name: one.metrics[name] for name in ("last", "immediate", "bwt_n", "bwt_n_minus_1")}
            costs = {name: getattr(one.cost, name) for name in COSTS}
            rows.append(
                {"method": method, "locator": one.locator, "seed": seed, **metrics, "located": one.located, **costs}
            )
    return pd.DataFrame(rows)


def confusion_frame(results: Results) -> pd.DataFrame:
    """method, locator, seed, task, located, count: the tasks that each task's questions were assigned to at the end."""
    rows = [
        (method, one.locator, seed, task, located, counts[located])
        for (method, seed), found in results.items()
        for one in found
        for task, counts in one.confusion.items()
        for located in one.confusion
    ]
    return pd.DataFrame(rows, columns=["method", "locator", "seed", "task", "located", "count"])


def score_table(scores: pd.DataFrame, name: str) -> Table:
    """A row per method, a column per locator: the mean and, with several seeds, the deviation."""
    found = over_seeds(scores, ["method", "locator"], name)
    texts = [
        show_number(mean) + ("" if pd.isna(std) else f" ± {show_number(std)}")
        for mean, std in zip(found["mean"], found["std"], strict=True)
    ]
    return Table(SHOWN[name], _wide(found.assign(text=texts), scores, "text").fillna(BLANK).reset_index())


def task_table(confusion: pd.DataFrame) -> Table:
    """A row per method and locator, a column per task: percent of its questions located right, mean over the seeds."""
    keys = ["method", "locator", "task"]
    right = confusion[confusion["task"] == confusion["located"]].groupby(keys, sort=False)["count"].sum()
    percent = (100 * right / confusion.groupby(keys, sort=False)["count"].sum()).unstack("task")
    percent = percent[list(dict.fromkeys(confusion["task"]))].rename_axis(columns=None)
    return Table("Questions located right at the end, by task (%)", percent.map(show_number).reset_index(), 2)


def cost_table(scores: pd.DataFrame) -> Table:
    """A row per locator: numbers and bytes that it stores, milliseconds per question; mean over methods and seeds."""
    means = scores.groupby("locator", sort=False)[list(COSTS)].mean()
    for name, (_, show) in COSTS.items():
        means[name] = means[name].astype(object).map(show)
    means = means.rename(columns={name: title for name, (title, _) in COSTS.items()})
    return Table("What a locator stores at the end, and takes per question", means.reset_index())


def picture(scores: pd.DataFrame) -> plots.Picture:
    """Heat maps of last accuracy and of the questions located right, with the deviation over the seeds."""
    panels = []
    for name, title in (("last", "last accuracy (%)"), ("located", "located right (%)")):
        found = over_seeds(scores, ["method", "locator"], name)
        means, stds = (_wide(found, scores, column).rename_axis(columns="locator") for column in ("mean", "std"))
        panels.append(plots.heat_panel(title, means.T, stds=stds.T))
    return plots.Picture("matrix", panels)


def _wide(found: pd.DataFrame, scores: pd.DataFrame, value: str) -> pd.DataFrame:
    """Methods by locators, in the order in which they were asked for."""
    wide = found.pivot(index="method", columns="locator", values=value)
    order = {axis: list(dict.fromkeys(scores[axis])) for axis in ("method", "locator")}
    return wide.reindex(index=order["method"], columns=order["locator"]).rename_axis(columns=None)
