"""Build docs/results.md from the tables in docs/results.

    python scripts/results.py                 write the page and its pictures
    python scripts/results.py --check         exit with 1 if the page is out of date
    python scripts/results.py --add RUN ...   first put finished run folders into the tables, over their older rows

The page's numbers come from `runs.csv` (a row for each run), `STUDY.csv` (a row for each cell of a run's accuracy
matrix; `locator` says who chose the task), `growth.csv` (a row for each task of a run) and `located.csv` (questions of
`task` at the end of a run that a locator took for `chosen`); its prose from `page.template.md`; the papers' figures and
claims from `paper.yaml` and `paper_tables.yaml`; the rows of its tables from `configs/grids.yaml`.
"""

import argparse
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import yaml
from matplotlib.figure import Figure
from scipy.stats import t as student

from clmoe.errors import ClmoeError
from clmoe.evaluate.matrix import AccuracyMatrix, metrics
from clmoe.utils.logging import read_events

ROOT = Path(__file__).resolve().parents[1]
TABLES, PAGE, GRIDS = ROOT / "docs" / "results", ROOT / "docs" / "results.md", ROOT / "configs" / "grids.yaml"
STUDIES = ("playground-coin", "playground-cl4vqa")
TYPES: Any = dict.fromkeys(  # of the columns that pandas would guess wrong in a table with few rows or blank cells
    ("study", "label", "method", "locator", "order", "commit", "date", "command", "after", "task", "chosen"), "str"
) | dict.fromkeys(("seed", "questions", "stored", "blocks", "extended", "added", "limit"), "Int64")
VERDICTS = ("holds", "contradicted", "no difference shown", "not verified", "not run")
ENOUGH_SEEDS = 3
BLANK = "–"
COLUMNS = {  # heading -> column of Study.runs
    "last (AP)": "last", "right after training": "immediate", "the same, task known": "immediate_known",
    "AF": "forgetting_max", "bwt_n_minus_1": "bwt_n_minus_1", "bwt_known": "bwt_known",
    "task found (%)": "located_percent", "blocks extended (%)": "extended_percent", "experts added": "added",
    "parameters trained in the last task": "trainable_parameters", "trained per task, mean": "trained_per_task",
    "stored at the end": "adapter_parameters",
}  # fmt: skip
COUNTS = ("trainable_parameters", "trained_per_task", "adapter_parameters", "head_start")


@dataclass(frozen=True)
class Study:
    """Everything measured on one benchmark; `runs` has its facts, metrics and scores by task, by label and seed."""

    name: str
    tasks: list[str]
    labels: list[str]
    methods: list[str]  # of the main table
    runs: pd.DataFrame
    located: pd.DataFrame

    def spread(self, label: str, column: str) -> str:
        show = ",.0f" if column in COUNTS else ".2f"
        return spread(self.runs.loc[label, column], show) if label in self.labels else BLANK


def read_table(name: str) -> pd.DataFrame:
    table = pd.read_csv(TABLES / f"{name}.csv", dtype=TYPES, keep_default_na=False, na_values=[""])
    return table.fillna(dict.fromkeys(table.select_dtypes("str"), ""))


def read_study(name: str, grids: dict[str, Any]) -> Study:
    runs, growth, located = (table[table.study == name] for table in map(read_table, ("runs", "growth", "located")))
    cells = dict(iter(read_table(name).groupby(["label", "seed"])))
    figures = pd.DataFrame([run_figures(run, cells[run.label, run.seed]) for run in runs.itertuples()], runs.index)
    by_run = growth.groupby(["label", "seed"])
    totals = by_run[["blocks", "extended", "added"]].sum(min_count=1)
    totals["extended_percent"] = 100 * totals.extended / totals.blocks.where(totals.blocks > 0)
    totals["trained_per_task"] = by_run.trainable.mean()
    totals["head_start"] = by_run.stored.first() - by_run.trainable.first()
    runs = runs.join(figures).set_index(["label", "seed"]).join(totals).sort_index()
    labels = list(runs.index.unique("label"))
    methods = [label for part in grids["table1"]["sections"].values() for label in part if label in labels]
    return Study(name, runs.order.iloc[0].split(), labels, methods, runs, located)


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
    end = own[own.after == order[-1]]
    return {
        **metrics(AccuracyMatrix(tuple(order), rows), kinds["immediate_known"] if by_task else None),
        **{f"{kind}:{task}": value for kind in kinds for task, value in zip(order, kinds[kind], strict=True)},
        "located_percent": 100 * (end.located * end.questions).sum(skipna=False) / end.questions.sum(),
    }


def spread(values: pd.Series, show: str = ".2f") -> str:
    """Mean ± sample standard deviation over seeds; n is added where a seed lacks the value."""
    given = values.dropna().astype(float)
    if given.empty:
        return BLANK
    text, deviation = f"{given.mean():{show}}", given.std()
    if len(given) > 1 and (deviation or show == ".2f"):
        text += f" ± {deviation:{show}}"
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
    """A GitHub table whose first `keys` columns are set flush left."""
    names = list(header)
    lines = [names, ["---"] * keys + ["---:"] * (len(names) - keys), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def claims(paper: dict[str, Any], studies: list[Study]) -> str:
    rows: list[tuple[str, ...]] = []
    tally = {study.name: Counter[str]() for study in studies}
    for claim, other in [(row, other) for row in paper["claims"] for other in row["than"]]:
        pair = (other, claim["better"]) if claim.get("less") else (claim["better"], other)
        found = [difference(study, *pair, claim["metric"]) for study in studies]
        cells = [", ".join(filter(None, cell)) for cell in found]
        rows.append((claim["paper"], claim["where"], claim["claim"].format(other), *cells))
        for name, (verdict, _) in zip(tally, found, strict=True):
            tally[name][verdict.split(" (")[0]] += 1
    lines = ""
    for name, counts in tally.items():
        ended = ", ".join(f"{verdict} {counts[verdict]}" for verdict in VERDICTS if counts[verdict])
        lines += f"- {name}: {len(rows)} comparisons: {ended}.\n"
    return lines + "\n" + markdown(("paper", "where", "claim", *tally), rows, keys=3)


def compare(study: Study, labels: list[str], with_difference: bool = True) -> str:
    """A row for each variant, the first being what the others are compared with. Blank columns are left out."""
    columns = {"seeds": [str(len(study.runs.loc[label])) for label in labels]}
    if with_difference:
        others = [difference(study, label, labels[0], "last")[1] for label in labels[1:]]
        columns["last: difference from the first (95 %)"] = ["", *others]
    columns |= {name: [study.spread(label, column) for label in labels] for name, column in COLUMNS.items()}
    columns = {name: cells for name, cells in columns.items() if set(cells) != {BLANK}}
    return markdown(("method", *columns), zip(labels, *columns.values(), strict=True))


def by_task(study: Study) -> str:
    """LLaVA-CMoE's Table 1: each task right after training (task known where a locator exists) and at the end."""
    rows = []
    for label in study.methods:
        first, transfer = _kind(study, label, "immediate"), "bwt_known" if _locates(study, label) else "bwt_n"
        for kind, name, bwt in ((first, "Immediate", ""), ("last", "Last", study.spread(label, transfer))):
            if study.runs.loc[label, kind].notna().any():
                cells = [study.spread(label, column) for column in (*(f"{kind}:{t}" for t in study.tasks), kind)]
                rows.append((label, name, *cells, bwt))
    return markdown(("method", "", *study.tasks, "Mean", "BWT"), rows, keys=2)


def by_locator(study: Study) -> str:
    """Percent of the questions at the end whose task each locator finds."""
    rows = []
    for (label, locator), counts in study.located.groupby(["label", "locator"]):
        if label not in study.methods:
            continue
        right = counts["count"].where(counts.task == counts.chosen, 0).groupby([counts.seed, counts.task]).sum()
        shares = (100 * right / counts.groupby(["seed", "task"])["count"].sum()).unstack()
        cells = [spread(column) for column in (*(shares[task] for task in study.tasks), shares.mean(axis=1))]
        rows.append((label, locator, str(len(shares)), *cells))
    return markdown(("method", "locator", "seeds", *study.tasks, "Mean"), rows, keys=2)


def paper_cells(study: Study, printed: dict[str, Any]) -> str:
    """LLaVA-CMoE's tables with the study's scores below the paper's, and in how much the two agree."""
    parts, tasks = [], [f"{theirs} / {own}" for theirs, own in zip(printed["tasks"], study.tasks, strict=True)]
    for table in printed["tables"]:
        rows: list[tuple[str, ...]] = []
        for row in table["rows"]:
            label, means = row.get("label"), row.get("printed", {})
            for kind in [kind for kind in ("immediate", "last") if kind in row]:
                at_end = kind == "last"
                cells = [f"{score:.2f}" for score in row[kind]]
                mean, bwt = (f"{means[name]:.2f}" if name in means else BLANK for name in (kind, "bwt"))
                rows.append((row["row"], kind, "paper", *cells, mean, bwt if at_end else ""))
                if label in study.labels:
                    column = _kind(study, label, kind)
                    cells = [study.spread(label, name) for name in (*(f"{column}:{t}" for t in study.tasks), column)]
                    transfer = study.spread(label, "bwt_known" if _locates(study, label) else "bwt_n")
                    rows.append((row["row"], kind, "here", *cells, transfer if at_end else ""))
        parts.append(f"### {table['table']}: {table['what']}\n\n{agreement(study, table['rows'])}\n")
        parts.append(markdown(("row", "", "", *tasks, "Mean", "BWT"), rows, keys=3) + "\n")
    return "\n".join(parts).rstrip()


def agreement(study: Study, rows: list[dict[str, Any]]) -> str:
    """How many pairs of rows have the same order of mean scores in the paper and here."""
    said = []
    for kind in ("immediate", "last"):
        known = [row for row in rows if kind in row and row.get("label") in study.labels]
        theirs = [statistics.fmean(row[kind]) for row in known]
        ours = [float(study.runs.loc[row["label"], _kind(study, row["label"], kind)].mean()) for row in known]
        pairs = [(a, b) for a in range(len(known)) for b in range(a)]
        same = sum((theirs[a] - theirs[b]) * (ours[a] - ours[b]) > 0 for a, b in pairs)
        said += [f"{same} of {len(pairs)} by {kind}"] if pairs else []
    return f"Pairs of rows whose means have the paper's order here: {', '.join(said)}." if said else "Not run here."


def _locates(study: Study, label: str) -> bool:
    return bool(study.runs.loc[label, "immediate_known"].notna().any())


def _kind(study: Study, label: str, kind: str) -> str:
    """The paper's Immediate is with the task known, where a method has a locator."""
    return "immediate_known" if kind == "immediate" and _locates(study, label) else kind


def misprints(printed: dict[str, Any]) -> str:
    lines = "- {table}, {row}: {figure} is printed as {printed:.2f}; its scores give {computed:.2f}"
    return "\n".join(lines.format(**row) for row in printed["misprints"])


def ablations(study: Study, sections: dict[str, list[str]]) -> str:
    """A table for each section of a grid of which anything but the first row was run."""
    present = {title: [label for label in labels if label in study.labels] for title, labels in sections.items()}
    missing = dict.fromkeys(label for labels in sections.values() for label in labels if label not in study.labels)
    parts = [f"Not run on {study.name}: {', '.join(missing)}."] if missing else []
    for title, labels in present.items():
        if len(labels) > 1 and labels[0] == sections[title][0]:
            parts.append(f"### {title}: {study.name}\n\n{compare(study, labels)}")
    return "\n\n".join(parts)


def origins(study: Study) -> str:
    rows = []
    for label in study.labels:
        runs = study.runs.loc[label]
        dates, commits = (sorted({part for cell in runs[name] for part in cell.split()}) for name in ("date", "commit"))
        when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        command = max(zip(runs.date, runs.command, strict=True), key=lambda pair: pair[0])[1]
        rows.append((label, " ".join(map(str, runs.index)), when, ", ".join(commits) or "not recorded", f"`{command}`"))
    return markdown(("row", "seeds", "date", "commit", "command of the newest run"), rows, keys=5)


def results_page(studies: list[Study], grids: dict[str, Any]) -> str:
    """The whole page; the same bytes from the same tables."""
    paper = yaml.safe_load((TABLES / "paper.yaml").read_text(encoding="utf-8"))
    counts = [(row["what"], row["paper"], row["ours"]) for row in paper["counts"]]
    parts: dict[str, Any] = {"claims": claims(paper, studies), "counts": markdown(("count", "paper", "ours"), counts)}
    printed = yaml.safe_load((TABLES / "paper_tables.yaml").read_text(encoding="utf-8"))
    parts |= {"paper_cells": paper_cells(studies[0], printed), "misprints": misprints(printed)}
    parts["unchecked"] = "\n".join(f"- {line}" for line in paper["unchecked"])
    for study in studies:
        blocks = {"methods": compare(study, study.methods, with_difference=False), "by_task": by_task(study)}
        blocks |= {"by_locator": by_locator(study), "origins": origins(study)}
        blocks |= {name: ablations(study, grid["sections"]) for name, grid in grids.items()}
        blocks["head_start"] = study.spread("llava_cmoe", "head_start")
        for name, text in blocks.items():
            parts.setdefault(name, {})[study.name] = text
    return (TABLES / "page.template.md").read_text(encoding="utf-8").format(**parts)


def draw(study: Study) -> Path:
    """A line for each method that learns the tasks in turn: its mean score on those learned so far, after each."""
    mpl.rcParams.update({"svg.hashsalt": study.name, "svg.fonttype": "none"})
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for label in study.methods:
        if study.spread(label, "forgetting_max") != BLANK:
            means = study.runs.loc[label, [f"so far:{task}" for task in study.tasks]].astype(float).mean()
            axes.plot(study.tasks, list(means), marker="o", markersize=3, label=label)
    axes.set(ylabel="mean score on the tasks so far (%)", xlabel="after training", ylim=(0, 100))
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(TABLES / f"{study.name}.svg", metadata={"Date": None})
    return TABLES / f"{study.name}.svg"


def add(folder: Path) -> None:
    """Replace a run's rows in every table by those of its folder.

    Raises:
        ClmoeError: the run is unfinished, of another benchmark, or of another number of steps than the study's runs.
    """
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    study, order, runs = info["benchmark"], info["order"], read_table("runs")
    steps = set(runs[runs.study == study].steps_per_task) - {0}
    if study not in STUDIES:
        raise ClmoeError(f"{folder / 'run.json'}: benchmark {study!r} is none of {', '.join(STUDIES)}")
    if AccuracyMatrix.read_csv(folder / "matrix.csv").row(order[-1])[-1] is None:
        raise ClmoeError(f"{folder / 'matrix.csv'}: the last task has no score; finish the run first")
    if steps and info["steps_per_task"] not in {0, *steps}:
        raise ClmoeError(f"{folder / 'run.json'}: steps_per_task is {info['steps_per_task']}; {study} has {steps}")
    if (folder / "locator.csv").exists() and not info.get("locator"):
        raise ClmoeError(f"{folder / 'run.json'}: field 'locator' does not say which locator chose the tasks")
    cells, located = read_cells(folder, info.get("locator") or "")
    rows = {"runs": read_facts(folder, info), study: cells, "growth": read_growth(folder)}
    rows["located"] = located[located.after == order[-1]]
    for name, new in rows.items():
        table = read_table(name)
        new = new.assign(study=study, label=info["label"], seed=info["seed"]).reindex(columns=table.columns)
        old = (table.label == info["label"]) & (table.seed == info["seed"]) & (table.get("study", study) == study)
        keys = ["label", "seed"] if name == study else ["study", "label", "seed"]
        table = pd.concat([table[~old], new.astype(table.dtypes)]).sort_values(keys, kind="stable")
        table.to_csv(TABLES / f"{name}.csv", index=False, lineterminator="\n")


def read_facts(folder: Path, info: dict[str, Any]) -> pd.DataFrame:
    events, timing = read_events(folder / "events.jsonl"), folder / "timing.json"
    started = [event for event in events if event["event"] == "started"]
    command = started[0]["command"] if started else ""
    facts = info | {"order": " ".join(info["order"]), "locator": info.get("locator") or ""}
    facts["command"] = command.replace(str(folder.resolve()), "RUN").replace(str(folder.resolve().parent), "OUT")
    facts["commit"] = " ".join(sorted({event["commit"] for event in started if event["commit"]}))
    facts["date"] = " ".join(sorted({event["time"][:10] for event in events}))
    facts["minutes"] = json.loads(timing.read_text(encoding="utf-8"))["minutes"] if timing.exists() else None
    return pd.DataFrame([facts])


def read_cells(folder: Path, locator: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells of the matrix and of the row with the task known; and what every locator chose after each task."""
    cells = pd.read_csv(folder / "matrix.csv").melt("after", var_name="task", value_name="score")
    cells["locator"] = locator
    if (folder / "immediate.csv").exists() and locator != "oracle":
        known = pd.read_csv(folder / "immediate.csv").melt("after", var_name="task", value_name="score")
        cells = pd.concat([cells, known.assign(after=known.task, locator="oracle")])
    cells = cells.dropna(subset="score")
    if not (folder / "locator.csv").exists():
        return cells, pd.DataFrame(columns=["after"])
    located = pd.read_csv(folder / "locator.csv", header=0, names=["after", "locator", "task", "chosen", "count"])
    keys = ["after", "task", "locator"]
    asked = located.groupby(keys)["count"].sum()
    right = located[located.task == located.chosen].groupby(keys)["count"].sum().reindex(asked.index, fill_value=0)
    return cells.join(pd.DataFrame({"questions": asked, "located": right / asked}), on=keys), located


def read_growth(folder: Path) -> pd.DataFrame:
    if not (folder / "parameters.csv").exists():
        return pd.DataFrame()
    growth, expansion = pd.read_csv(folder / "parameters.csv"), folder / "expansion.json"
    for entry in json.loads(expansion.read_text(encoding="utf-8")) if expansion.exists() else []:
        added = [block["added"] for block in entry["blocks"].values()]
        columns = ["blocks", "extended", "added"]
        growth.loc[growth.task == entry["task"], columns] = len(added), sum(n > 0 for n in added), sum(added)
    return growth


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs="+", type=Path, default=[], metavar="RUN", help="finished run folders")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    for folder in args.add:
        add(folder)
    grids = yaml.safe_load(GRIDS.read_text(encoding="utf-8"))["grids"]
    studies = [read_study(name, grids) for name in STUDIES]
    page = results_page(studies, grids)
    if args.check:
        current = PAGE.read_text(encoding="utf-8") == page
        print(f"{PAGE} is {'up to date' if current else 'out of date: run python scripts/results.py'}")
        return 0 if current else 1
    PAGE.write_text(page, encoding="utf-8")
    print(PAGE, *map(draw, studies), sep="\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ClmoeError as error:
        sys.exit(f"results: {error}")
