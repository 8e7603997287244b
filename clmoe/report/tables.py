"""Tables of a report ("59.23 ± 0.31": mean and sample standard deviation over seeds) and their renderings."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import pandas as pd

from clmoe.evaluate.matrix import GENERAL_METRICS, METRICS, ZERO_SHOT
from clmoe.report.answers import majority_shares
from clmoe.report.runs import Group, Run, group_runs

BLANK = "–"
SPENT = [
    "adapter_parameters", "active_parameters", "locator_parameters", "stored_bytes", "stored_samples",
    "training_flops", "question_flops",
]  # fmt: skip
STARTS = ["rank", "effective_scale", "projector_trained", "steps_per_task"]
COSTS = ["trainable_parameters", "experts_added", "minutes", "peak_memory_mib"]
UNITS = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6}
EXACT = 10**7  # counts below it are shown whole
CHANCE = "majority answer"
_LOWER_IS_BETTER = {"forgetting_max"}
_OF_WHAT_WAS_LEARNED = {"forgetting_max", "bwt_n", "bwt_n_minus_1", "bwt_known", "general_last", "general_change"}
ENOUGH_LEARNED = 0.5  # of what the best row learned; a row that learns nothing forgets nothing


@dataclass(frozen=True, slots=True)
class Table:
    """Formatted cells; the first `keys` columns name the row. `best` holds the (row, column) pairs to set in bold."""

    title: str
    cells: pd.DataFrame
    keys: int = 1
    best: frozenset[tuple[int, int]] = frozenset()


def metrics_frame(groups: Sequence[Group]) -> pd.DataFrame:
    """One row per run: label, method, seed, metrics in percent (general ability's where measured), `COSTS`, `SPENT`."""
    rows = []
    for run in all_runs(groups):
        counts = {name: getattr(run, name, None) for name in COSTS}
        finished = len(run.expansion) and run.order[-1] in run.matrix.rows
        counts["experts_added"] = run.expansion["added"].sum() if finished else None
        counts |= {name: run.spent.get(name) for name in SPENT} | {"adapter_parameters": run.adapter_parameters}
        rows.append({"label": run.label, "method": run.method, "seed": run.seed, **run.metrics, **counts})
    frame = pd.DataFrame(rows)
    numbers = [name for name in (*METRICS, *GENERAL_METRICS, *COSTS, *SPENT) if name in frame]
    return frame[["label", "method", "seed", *numbers]].astype(dict.fromkeys(numbers, float))


def scores_frame(groups: Sequence[Group]) -> pd.DataFrame:
    """label, seed, row, task, value: the scores of each task, and their mean if none is missing, by kind of row.

    The row "majority answer", of the label "chance", is the score of always giving it.
    """
    rows = []
    for run in all_runs(groups):
        blank = (None,) * len(run.order)
        kinds: dict[str, Sequence[float | None]] = {
            ZERO_SHOT: run.matrix.row(ZERO_SHOT),
            "immediate": [run.matrix.row(task)[i] for i, task in enumerate(run.order)] if run.staged else blank,
            "immediate_known": run.immediate or blank,
            "last": run.matrix.row(run.order[-1]),
        }
        for kind, scores in kinds.items():
            values = pd.Series(scores, run.order, dtype=float)
            if values.notna().any() or kind == "last":
                values["mean"] = values.mean(skipna=False)
                rows += [(run.label, run.seed, kind, task, value) for task, value in values.items()]
    chance = references(groups)["chance"]
    if chance.notna().any():
        chance["mean"] = chance.mean(skipna=False)
        rows += [("chance", 0, CHANCE, task, value) for task, value in chance.items()]
    return pd.DataFrame(rows, columns=["label", "seed", "row", "task", "value"])


def references(groups: Sequence[Group]) -> pd.DataFrame:
    """By task, percent: what chance reaches, and the untrained model ("zero-shot"); NaN where no run knows it."""
    order = list(groups[0].runs[0].order)
    untrained = [dict(zip(run.order, run.matrix.row(ZERO_SHOT), strict=True)) for run in all_runs(groups)]
    known = {"chance": majority_shares(groups), "zero-shot": pd.DataFrame(untrained, dtype=float).mean()}
    return pd.DataFrame(known, index=order)


def settings_frame(groups: Sequence[Group]) -> pd.DataFrame:
    """key, label, seed, value (text): settings in which the runs that have them differ, and the commits of clmoe."""
    runs, names = all_runs(groups), ("benchmark", "label", "method", "order", "seed")
    rows = [("commit", run.label, run.seed, " ".join(run.commits)) for run in runs if run.commits]
    for key in sorted({key for run in runs for key in run.settings if key not in names and key[:6] != "train."}):
        found = [(key, run.label, run.seed, _text(run.settings[key])) for run in runs if key in run.settings]
        rows += found if len({value for *_, value in found}) > 1 else []
    return pd.DataFrame(rows, columns=["key", "label", "seed", "value"])


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def located_frame(groups: Sequence[Group]) -> pd.DataFrame:
    """label, seed, locator, task, located, value: percent of a task's questions assigned to each task, at the end.

    The task "overall" counts the questions of all tasks, if every task has some.
    """
    frames = [pd.DataFrame(columns=["label", "seed", "locator", "task", "located", "value"])]
    for run in all_runs(groups):
        ends = run.located[run.located["after"] == run.order[-1]]
        for locator, counts in ends.groupby("locator", sort=False):
            wide = counts.pivot(index="task", columns="located", values="count")
            wide = wide.reindex(index=run.order, columns=run.order).fillna(0)
            percent = 100 * wide.div(wide.sum(axis=1), axis=0).dropna()  # 0 / 0 where nothing was asked
            if len(percent) == len(wide):
                right = sum(wide.loc[task, task] for task in run.order)
                percent.loc["overall", "overall"] = 100 * right / wide.sum(axis=None)
            long = percent.rename_axis(index="task", columns="located").stack().dropna().rename("value").reset_index()
            frames.append(long.assign(label=run.label, seed=run.seed, locator=locator))
    return pd.concat(frames[1:] or frames)[list(frames[0])]


def general_frame(groups: Sequence[Group]) -> pd.DataFrame:
    """label, seed, after, set, value: scores on the sets of general ability after each stage, and their mean."""
    frame = run_frame(groups, "general")
    means = frame.groupby(["label", "seed", "after"], sort=False)["value"].agg(lambda own: own.mean(skipna=False))
    return pd.concat([frame, means.reset_index().assign(set="mean")])[list(frame)] if len(frame) else frame


def matrices_frame(groups: Sequence[Group]) -> pd.DataFrame:
    """label, seed, after, task, value: every measured cell of the accuracy matrices."""
    frames = {(run.label, run.seed): matrix_frame(run).rename_axis(columns="task").stack() for run in all_runs(groups)}
    return pd.concat(frames, names=["label", "seed"]).dropna().rename("value").reset_index()


def run_frame(groups: Sequence[Group], name: str) -> pd.DataFrame:
    """The table `name` of every run (`Run.usage` and so on) after its label and seed."""
    found = {(run.label, run.seed): getattr(run, name) for run in all_runs(groups)}
    filled = {key: frame for key, frame in found.items() if len(frame)} or found
    return pd.concat(filled, names=["label", "seed"]).reset_index(["label", "seed"]).reset_index(drop=True)


def mean_matrices(groups: Sequence[Group]) -> dict[str, pd.DataFrame]:
    """By title: score after training (row) on a task (column), mean over a label's seeds, NaN unless all have it."""
    found = {}
    for group in groups:
        orders = list(dict.fromkeys(run.matrix.tasks for run in group.runs))
        for order in orders:
            runs = [run for run in group.runs if run.matrix.tasks == order]
            seeds = f", seed {', '.join(str(run.seed) for run in runs)}" if len(orders) > 1 else ""
            title = group.label + (seeds or (f" (mean of {len(runs)} seeds)" if len(runs) > 1 else ""))
            found[title] = sum((matrix_frame(run) for run in runs[1:]), matrix_frame(runs[0])) / len(runs)
    filled = {title: matrix.dropna(how="all") for title, matrix in found.items()}
    return {title: matrix for title, matrix in filled.items() if len(matrix)}


def matrix_frame(run: Run) -> pd.DataFrame:
    """The accuracy matrix with all stages as rows, NaN where not measured."""
    rows = {stage: run.matrix.row(stage) for stage in run.matrix.stages}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(run.order)).astype(float).rename_axis("after")


def over_seeds(frame: pd.DataFrame, keys: Sequence[str], value: str = "value") -> pd.DataFrame:
    """`keys`, then mean, sample standard deviation (NaN for one seed) and number of the values that are not NaN."""
    grouped = frame.dropna(subset=value).groupby(list(keys), sort=False)[value]
    return grouped.agg(mean="mean", std="std", n="count").reset_index()


def comparison_table(
    groups: Sequence[Group], title: str = "Comparison", metrics: Sequence[str] = tuple(METRICS)
) -> Table:
    """One row per label: metrics in percent."""
    frame = metrics_frame(groups)
    shown = dict.fromkeys([name for name in metrics if name in frame], show_number)
    cells = _spread(groups, frame.melt(["label"], list(shown), "metric"), ["label"], shown)
    cells.insert(1, "seeds", [str(len(group.runs)) for group in groups])
    winners = {name: _winner(groups, frame, name) for name in shown if name in cells and name != GENERAL_METRICS[0]}
    best = {(row, list(cells).index(name)) for name, row in winners.items() if row is not None}
    return Table(title, cells, best=frozenset(best))


def spent_table(groups: Sequence[Group]) -> Table:
    """One row per label: what it keeps at the end, and what its training and one question compute."""
    shown = dict.fromkeys(SPENT, show_count)
    cells = _spread(groups, metrics_frame(groups).melt(["label"], SPENT, "spent"), ["label"], shown)
    return Table("What a row keeps and computes", cells)


def _winner(groups: Sequence[Group], frame: pd.DataFrame, metric: str) -> int | None:
    """The row that is better than every other by more than both deviations over the seeds together; None if none is.

    Bounds (multitask, separate, zero_shot) do not learn the tasks one after another and are not compared. Nor is the
    forgetting of rows that have learned little.
    """
    learned, floor = frame.groupby("label", sort=False)["immediate"].mean(), references(groups).mean(skipna=False).max()
    chains = [group.runs[0].chain for group in groups]
    compared = pd.Series(chains, learned.index) == "sequence"
    if metric in _OF_WHAT_WAS_LEARNED:
        gained = learned - (0 if pd.isna(floor) else floor)
        compared &= (gained > 0) & (gained >= ENOUGH_LEARNED * gained[compared].max())
    found = frame.groupby("label", sort=False)[metric].agg(["mean", "std"])[compared].dropna(subset="mean")
    ranked = list(found.sort_values("mean", ascending=metric in _LOWER_IS_BETTER).itertuples())
    # with one seed the deviation is NaN, which nothing exceeds
    clear = [abs(ranked[0].mean - row.mean) > ranked[0].std + row.std for row in ranked[1:]]
    return list(learned.index).index(ranked[0].Index) if clear and all(clear) else None


def costs_table(groups: Sequence[Group]) -> Table:
    """One row per label: trained parameters, experts, minutes, memory, and what else decides them."""
    shown = dict.fromkeys(COSTS, show_count) | {"minutes": "{:.1f}".format}
    cells = _spread(groups, metrics_frame(groups).melt(["label"], COSTS, "cost"), ["label"], shown)
    for name in STARTS:
        texts = [dict.fromkeys(_start(run, name) for run in group.runs) for group in groups]
        cells[name] = [", ".join(text) for text in texts]
    return Table("Parameters, time and memory", cells)


def _start(run: Run, name: str) -> str:
    """One of `STARTS` as text."""
    if name == "rank":
        rank, per_expert = run.settings.get("adapter.rank"), run.settings.get("adapter.rank_is") == "per_expert"
        trains = run.trainable_parameters > 0 and rank is not None and run.effective_scale is not None
        return f"{rank}{' per expert' * per_expert}" if trains else BLANK
    value = getattr(run, name)
    return BLANK if value is None else json.dumps(value)


def settings_table(groups: Sequence[Group]) -> Table:
    """`settings_frame` with a column for each label."""
    values = settings_frame(groups).groupby(["key", "label"], sort=False)["value"]
    wide = values.agg(lambda own: ", ".join(dict.fromkeys(own))).unstack("label")
    wide = wide.reindex(columns=[group.label for group in groups]).astype(object).fillna(BLANK)
    return Table("Settings that differ", wide.rename_axis(columns=None).reset_index())


def alike_note(groups: Sequence[Group]) -> str:
    """What the trained rows differ in besides the method, so that a difference in scores may come from it."""
    trained = [run for run in all_runs(groups) if run.trainable_parameters]
    found: dict[str, dict[str, dict[str, None]]] = {name: {} for name in STARTS}
    for run in trained:
        told = {name: _start(run, name).removesuffix(" per expert") for name in STARTS}
        told |= {key: _text(v) for key, v in run.settings.items() if key.startswith(("model.", "training.")) and
                 key not in ("training.steps", "training.epochs")}  # fmt: skip
        for key, value in told.items():
            if value != BLANK:
                found.setdefault(key, {}).setdefault(value, {})[run.label] = None
    parts = [
        f"{key} " + ", ".join(f"{value} ({', '.join(labels)})" for value, labels in values.items())
        for key, values in found.items()
        if len(values) > 1
    ]
    return f"The rows are not alike: {'; '.join(parts)}. Scores may differ because of that." if parts else ""


def report_tables(groups: Sequence[Group]) -> list[Table]:
    """Comparison, what was spent, costs, scores, percent located right (may have no row), and each label's matrix."""
    order = groups[0].runs[0].order
    scores = dict.fromkeys((*order, "mean"), show_number)
    located = dict.fromkeys((*order, "overall"), show_number)
    right = located_frame(groups).query("task == located").drop(columns="located")
    return [
        comparison_table(groups),
        spent_table(groups),
        costs_table(groups),
        Table("Scores by task", _spread(groups, scores_frame(groups), ["label", "row"], scores), 2),
        Table("Questions located right (%)", _spread(groups, right, ["label", "locator"], located), 2),
        *(
            Table(f"Accuracy after each task: {title}", cells.map(show_number).reset_index())
            for title, cells in mean_matrices(groups).items()
        ),
    ]


def tuned_frame(groups: Sequence[Group]) -> pd.DataFrame:
    """label, tasks, options, value, chosen: the trials of `clmoe tune` behind a label, means over its seeds."""
    rows = [
        {
            "label": group.label,
            "tasks": " ".join(tuned["order"]),
            "options": ", ".join(f"{key.removeprefix('options.')}={value}" for key, value in trial["settings"].items()),
            "value": trial["mean"],
            "chosen": trial["settings"] == tuned["chosen"],
        }
        for group in groups
        for tuned in [group.runs[0].tuned]
        for trial in tuned.get("trials", [])
    ]
    return pd.DataFrame(rows, columns=["label", "tasks", "options", "value", "chosen"])


def tuned_table(frame: pd.DataFrame) -> Table:
    """One row per trial of `tuned_frame`."""
    chosen = frame["chosen"].map({True: "chosen", False: ""})
    cells = frame.assign(last=frame["value"].map(show_number), chosen=chosen).drop(columns="value")
    return Table("Trials of clmoe tune", cells[["label", "options", "last", "chosen", "tasks"]].astype(object), 2)


def general_tables(groups: Sequence[Group], frame: pd.DataFrame) -> list[Table]:
    """One row per label: what became of general ability; per label and stage: `general_frame`'s scores on each set."""
    if not len(frame):
        return []
    shown = dict.fromkeys(frame["set"].unique(), show_number)
    by_set = Table("General ability after each task", _spread(groups, frame, ["label", "after"], shown), 2)
    return [comparison_table(groups, "General ability", GENERAL_METRICS), by_set]


def formats_table(groups: Sequence[Group], frame: pd.DataFrame) -> Table:
    """One row per label: the means over the tasks of `formats_frame`'s columns."""
    figures = list(frame.columns[3:])
    means = frame.groupby(["label", "seed"], sort=False)[figures].mean().reset_index()
    shown = dict.fromkeys(figures, show_number)
    return Table(
        "Only the form forgotten?", _spread(groups, means.melt(["label"], figures, "figure"), ["label"], shown)
    )


def limit_note(groups: Sequence[Group]) -> str:
    """Which runs asked only some of the questions before the last row; empty if none is known to have done so."""
    limits: dict[int, dict[str, None]] = {}
    for run in all_runs(groups):
        if run.limit is not None and run.staged:
            limits.setdefault(run.limit, {})[run.label] = None
    rule = "rows before the last are over a sample of {} test questions per task, the last row is over all."
    return " ".join(f"{', '.join(names)}: {rule.format(limit)}" for limit, names in sorted(limits.items()))


def report_text(runs: Sequence[Path], width: int = 100) -> str:
    """All tables for a terminal of `width` columns, with `alike_note` and `limit_note`."""
    groups = group_runs(runs)
    general, tuned = general_tables(groups, general_frame(groups)), tuned_table(tuned_frame(groups))
    tables = [*report_tables(groups), *general, tuned]
    found = [to_text(table, width) for table in tables if len(table.cells)]
    notes = [fill(note, width, break_on_hyphens=False) for note in (alike_note(groups), limit_note(groups)) if note]
    return "\n".join([*found, *notes]).rstrip() + "\n"


def to_text(table: Table, width: int = 100) -> str:
    """Fixed-width text; columns that do not fit continue in further blocks, each beginning with the key columns."""
    cells = table.cells.set_index(list(table.cells.columns[: table.keys])).rename_axis([None] * table.keys)
    text = cells.to_string(line_width=width, sparsify=False)
    return table.title + "\n" + re.sub(r" *\\?$", "", text, flags=re.MULTILINE) + "\n"


def to_markdown(table: Table) -> str:
    """A GitHub table whose keys are left-aligned and whose best cells are bold."""
    rule = ["---"] * table.keys + ["---:"] * (len(table.cells.columns) - table.keys)
    rows = [
        [f"**{cell}**" if (r, c) in table.best else cell.replace("|", "\\|") for c, cell in enumerate(row)]
        for r, row in enumerate(table.cells.itertuples(index=False))
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(table.cells.columns), rule, *rows])


def to_latex(table: Table) -> str:
    """A booktabs `table` environment, at most one line wide (needs booktabs and graphicx)."""
    bold = pd.DataFrame("", table.cells.index, table.cells.columns)
    for row, column in table.best:
        bold.iloc[row, column] = "textbf:--rwrap;"
    style = table.cells.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    form = "l" * table.keys + "r" * (len(bold.columns) - table.keys)
    title = re.sub(r"([%_#&$])", r"\\\1", table.title)
    text = style.apply(lambda _: bold, axis=None).to_latex(
        caption=title, hrules=True, column_format=form, position="t", position_float="centering"
    )
    fit = "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n\\begin{tabular}"
    text = text.replace(r"\begin{tabular}", fit).replace(r"\end{tabular}", r"\end{tabular}}")
    return text.replace("±", r"$\pm$").replace(BLANK, "--")


def show_number(value: float) -> str:
    """Two decimals, or the mark of a value that was not measured."""
    return BLANK if pd.isna(value) else f"{value:.2f}"


def show_count(value: float) -> str:
    """A count: whole below ten million, as in 90,624; else in the largest unit that it reaches, as in 61.9 M."""
    if value < EXACT:
        return f"{round(value):,}"
    unit, size = next((unit, size) for unit, size in UNITS.items() if value >= size)
    return f"{value / size:.1f} {unit}"


def all_runs(groups: Sequence[Group]) -> list[Run]:
    """All runs, in order."""
    return [run for group in groups for run in group.runs]


def _spread(
    groups: Sequence[Group], frame: pd.DataFrame, keys: list[str], shown: Mapping[str, Callable[[float], str]]
) -> pd.DataFrame:
    """A row per value of `keys`, a column per name in `shown` (how to write it): mean ± deviation over seeds."""
    seeds, column = {group.label: len(group.runs) for group in groups}, frame.columns[-2]
    found = over_seeds(frame, [*keys, column])
    texts = []
    for name, label, mean, std, n in zip(*(found[c] for c in (column, "label", "mean", "std", "n")), strict=True):
        show = shown[name]
        spread = "" if pd.isna(std) or (std == 0 and show is show_count) else f" ± {show(std)}"
        texts.append(show(mean) + spread + ("" if n == seeds.get(label, n) else f" (n={n})"))
    wide = found.assign(text=texts).set_index([*keys, column])["text"].unstack(column)
    wide = wide.reindex(columns=[name for name in shown if name in wide]).rename_axis(columns=None).reset_index()
    return frame[keys].drop_duplicates().merge(wide, how="left", on=keys).fillna(BLANK)
