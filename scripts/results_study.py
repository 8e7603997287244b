"""What scripts/results.py knows about a benchmark: every run's figures, and how they are written and compared."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from results_tables import BUDGETED, commits, read_table
from scipy.stats import t as student

from clmoe.evaluate.matrix import AccuracyMatrix, metrics
from clmoe.report.tables import BLANK, show_count, show_number

ENOUGH_SEEDS = 3
ENOUGH_FOR_RANGE = 5
SCORES = {  # heading -> column of Study.runs
    "last (AP)": "last", "right after training": "immediate", "the same, task known": "immediate_known",
    "AF": "forgetting_max", "bwt_n_minus_1": "bwt_n_minus_1", "bwt_known": "bwt_known",
    "task found (%)": "located_percent", "any form": "any_form", "another task's words (%)": "foreign",
}  # fmt: skip
GROWTH = {"blocks extended (%)": "extended_percent", "experts added": "added"}
COUNTS = {
    "parameters trained in the last task": "trainable_parameters", "trained per task, mean": "trained_per_task",
    "kept at the end": "adapter_parameters",
}  # fmt: skip
SPENT = {
    "active": "active_parameters", "the locator's": "locator_parameters", "bytes stored": "stored_bytes",
    "samples stored": "stored_samples", "training FLOP": "training_flops", "FLOP of a question": "question_flops",
    "minutes": "minutes",
}  # fmt: skip
SHOWN: dict[str, Callable[[float], str]] = dict.fromkeys(
    [*COUNTS.values(), *SPENT.values(), "head_start"], show_count
) | {"minutes": "{:.1f}".format}


@dataclass(frozen=True)
class Study:
    """Everything measured on one benchmark; `runs` has its facts, metrics and scores by task, by label and seed."""

    name: str
    tasks: list[str]
    labels: list[str]
    methods: list[str]  # with their own settings
    matched: list[str]  # under one budget
    runs: pd.DataFrame
    located: pd.DataFrame

    def spread(self, label: str, column: str, *, ranged: bool = False) -> str:
        if label not in self.labels:
            return BLANK
        return spread(self.runs.loc[label, column], SHOWN.get(column, show_number), ranged=ranged)

    def n(self, label: str) -> str:
        return str(len(self.runs.loc[label]))


def read_study(folder: Path, name: str, grids: dict[str, Any]) -> Study:
    """The study ``name`` from the tables in this folder; ``grids`` are those of configs/grids.yaml."""
    tables = [read_table(folder / f"{table}.csv") for table in ("runs", "growth", "located")]
    runs, growth, located = (table[table.study == name] for table in tables)
    cells = dict(iter(read_table(folder / f"{name}.csv").groupby(["label", "seed"])))
    figures = pd.DataFrame([run_figures(run, cells[run.label, run.seed]) for run in runs.itertuples()], runs.index)
    by_run = growth.groupby(["label", "seed"])
    totals = by_run[["blocks", "extended", "added"]].sum(min_count=1)
    totals["extended_percent"] = 100 * totals.extended / totals.blocks.where(totals.blocks > 0)
    totals["trained_per_task"] = by_run.trainable.mean()
    totals["head_start"] = by_run.stored.first() - by_run.trainable.first()
    runs = runs.join(figures).set_index(["label", "seed"]).join(totals).sort_index()
    labels = list(runs.index.unique("label"))
    listed = {grid: [row for part in grids[grid]["sections"].values() for row in part] for grid in grids}
    listed["matched"] = [f"{row}{BUDGETED}" for row in listed["matched"]]
    others = [label for label in labels if label not in {row for rows in listed.values() for row in rows}]
    listed["matched"] += [label for label in others if label.endswith(BUDGETED)]
    listed["published"] += [label for label in others if not label.endswith(BUDGETED)]
    rows = ([label for label in listed[grid] if label in labels] for grid in ("published", "matched"))
    return Study(name, runs.order.iloc[0].split(), labels, *rows, runs, located)


def run_figures(run: Any, cells: pd.DataFrame) -> dict[str, float | None]:
    """A run's metrics, its scores by task, and how often its locator found the task at the end."""
    order = run.order.split()
    own, known = cells[cells.locator == run.locator], cells[(cells.locator == "oracle") & (cells.after == cells.task)]
    score = {(cell.after, cell.task): cell.score for cell in own.itertuples()}
    rows = {after: tuple(score.get((after, task)) for task in order) for after in own.after.unique()}
    by_task = dict(zip(known.task, known.score, strict=True))
    kinds: dict[str, list[float | None]] = {
        "last": [score.get((order[-1], task)) for task in order],
        "immediate": [score.get((task, task)) for task in order],
        "immediate_known": [by_task.get(task) for task in order],
        "so far": [pd.Series(rows.get(after, ())[: t + 1], dtype=float).mean() for t, after in enumerate(order)],
    }
    kinds |= {f"after {after}": [score.get((after, task)) for task in order] for after in order}
    end = own[own.after == order[-1]]
    return {
        **metrics(AccuracyMatrix(tuple(order), rows), kinds["immediate_known"] if by_task else None),
        **{f"{kind}:{task}": value for kind in kinds for task, value in zip(order, kinds[kind], strict=True)},
        "located_percent": 100 * (end.located * end.questions).sum(skipna=False) / end.questions.sum(),
    }


def spread(values: pd.Series, show: Callable[[float], str] = show_number, *, ranged: bool = False) -> str:
    """Mean ± sample standard deviation over seeds; n is added if a seed lacks the value.

    With `ranged`, the lowest and the highest value follow if there are five or more.
    """
    given = values.dropna().astype(float)
    if given.empty:
        return BLANK
    text, deviation = show(given.mean()), given.std()
    if len(given) > 1 and (deviation or show is show_number):
        text += f" ± {show(deviation)}"
    if ranged and len(given) >= ENOUGH_FOR_RANGE:
        text += f" [{show(given.min())}, {show(given.max())}]"
    return text if len(given) == len(values) else f"{text} (n={len(given)})"


def difference(study: Study, better: str, worse: str, metric: str) -> tuple[str, str]:
    """Verdict on "`better` has more of `metric` than `worse`", and the difference as text.

    Differences are paired by seed; the interval is Student's t with n - 1 degrees of freedom, 95 % confidence.
    """
    if not {better, worse} <= set(study.labels):
        return "not run", ""
    values = (study.runs.loc[better, metric].astype(float) - study.runs.loc[worse, metric].astype(float)).dropna()
    n = len(values)
    if n < ENOUGH_SEEDS:
        seeds = f"{n} {'seed' if n == 1 else 'seeds'}"
        return (f"not verified ({seeds})", f"{values.mean():+.1f}") if n else ("not run", "")
    mean = math.fsum(values) / n
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    low, high = mean - half, mean + half
    verdict = "holds" if low > 0 else "contradicted" if high < 0 else "no difference shown"
    return verdict, f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def markdown(header: Iterable[str], rows: Iterable[Sequence[str]], keys: int = 1) -> str:
    """A GitHub table whose first `keys` columns are left-aligned."""
    names = list(header)
    lines = [names, ["---"] * keys + ["---:"] * (len(names) - keys), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def apart(study: Study, labels: Sequence[str]) -> str:
    """Which rows have no commit in common with the first, so that a difference may come from the code."""
    first = commits(study.runs.loc[labels[0]])
    others = [label for label in labels[1:] if first and first.isdisjoint(commits(study.runs.loc[label]))]
    return f"\n\nMeasured at other commits than {labels[0]}: {', '.join(others)}." if others else ""


def locates(study: Study, label: str) -> bool:
    return bool(study.runs.loc[label, "immediate_known"].notna().any())


def kind_of(study: Study, label: str, kind: str) -> str:
    """The paper's Immediate is measured with the task known if a method has a locator."""
    return "immediate_known" if kind == "immediate" and locates(study, label) else kind
