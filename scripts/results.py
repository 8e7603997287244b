"""Build docs/results.md from the tables in docs/results.

    python scripts/results.py                 write the page and its pictures
    python scripts/results.py --check         exit with 1 if the page is out of date
    python scripts/results.py --add RUN ...   first put finished runs into the tables: run folders, or a grid's folder

The page's numbers come from `runs.csv` (a row for each run), `STUDY.csv` (a row for each cell of a run's accuracy
matrix; `locator` says what chose the task), `growth.csv` (a row for each task of a run) and `located.csv` (questions
of `task` at the end of a run that a locator assigned to `chosen`). Its prose comes from `page.template.md`; the papers'
figures and claims from `paper.yaml` and `paper_tables.yaml`; the rows of its tables from `configs/grids.yaml`; the
trials of `clmoe tune` from `configs/tuned`. `results_tables.py` reads the runs, `results_study.py` compares them.
"""

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import results_tables
import yaml
from matplotlib.figure import Figure
from results_study import (
    COUNTS,
    GROWTH,
    SCORES,
    SPENT,
    Study,
    apart,
    difference,
    kind_of,
    locates,
    markdown,
    read_study,
    spread,
)
from results_tables import BUDGETED

from clmoe.benchmarks.base import load_benchmark
from clmoe.config import load_config
from clmoe.errors import ClmoeError
from clmoe.methods import method_class
from clmoe.report.plots import name_columns
from clmoe.report.tables import BLANK, show_number
from clmoe.utils.files import read_json

ROOT = Path(__file__).resolve().parents[1]
TABLES, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "results.md"
GRIDS, CHOICES = ROOT / "configs" / "grids.yaml", ROOT / "configs" / "tuned"
STUDIES = ("playground-coin", "playground-cl4vqa")
YARDSTICKS = ("zero_shot", "multitask", "separate")
VERDICTS = ("holds", "contradicted", "no difference shown", "not verified", "not run")


def read_table(name: str) -> pd.DataFrame:
    return results_tables.read_table(TABLES / f"{name}.csv")


def claims(paper: dict[str, Any], studies: list[Study]) -> str:
    rows: list[tuple[str, ...]] = []
    tally = {study.name: Counter[str]() for study in studies}
    for claim, other in [(row, other) for row in paper["claims"] for other in row["than"]]:
        pair = (other, claim["better"]) if claim.get("less") else (claim["better"], other)
        found = [difference(study, *pair, claim["metric"]) for study in studies]
        marks = [" *" if {*pair} <= {*study.labels} and apart(study, pair) else "" for study in studies]
        cells = [", ".join(filter(None, cell)) + mark for cell, mark in zip(found, marks, strict=True)]
        rows.append((claim["paper"], claim["where"], claim["claim"].format(other), *cells))
        for name, (verdict, _) in zip(tally, found, strict=True):
            tally[name][verdict.split(" (")[0]] += 1
    lines = ""
    for name, counts in tally.items():
        ended = ", ".join(f"{verdict} {counts[verdict]}" for verdict in VERDICTS if counts[verdict])
        lines += f"- {name}: {len(rows)} comparisons: {ended}.\n"
    return lines + "\n" + markdown(("paper", "where", "claim", *tally), rows, keys=3)


def compare(study: Study, labels: list[str], shown: dict[str, str], with_difference: bool = False) -> str:
    """A row for each variant; the others are compared with the first. Blank columns are left out."""
    columns, note = {"seeds": [study.n(label) for label in labels]}, ""
    if with_difference:
        others = [difference(study, label, labels[0], "last")[1] for label in labels[1:]]
        columns["last: difference from the first (95 %)"] = ["", *others]
        note = apart(study, labels)
    for name, column in shown.items():
        cells = [study.spread(label, column, ranged=column in SCORES.values()) for label in labels]
        columns |= {} if set(cells) == {BLANK} else {name: cells}
    return markdown(("method", *columns), zip(labels, *columns.values(), strict=True)) + note


def beaten(study: Study, labels: list[str], reference: str) -> str:
    """Whether each method beats or ties `reference` or ends below it; those that do not beat or tie it come first."""
    methods = [label for label in labels if label.removesuffix(BUDGETED) not in (*YARDSTICKS, "lora")]
    if reference not in study.labels or not methods:
        return "Not run yet."
    words = {"contradicted": "below", "not verified": "not verified", "not run": "no seed in common",
             "no difference shown": "tie (no difference shown)", "holds": "beats"}  # fmt: skip
    found: dict[str, list[str]] = {word: [] for word in words.values()}
    rows = dict[str, tuple[str, ...]]()
    for label in methods:
        verdict, told = difference(study, label, reference, "last")
        word = words[verdict.split(" (")[0]]
        found[word].append(label)
        seeds = len(study.runs.loc[label].index.intersection(study.runs.loc[reference].index))
        rows[label] = (label, study.spread(label, "last", ranged=True), str(seeds), told, word)
    said = [f"- {word}: {', '.join(own)}" for word, own in found.items() if own]
    table = [rows[label] for own in found.values() for label in own]
    header = ("method", "last (AP)", "seeds in common", f"difference from {reference} (95 %)", "")
    return "\n".join(said) + "\n\n" + markdown(header, table) + apart(study, [reference, *methods])


def under_budget(study: Study) -> str:
    """The tables of the rows that share a budget."""
    rows = study.matched
    if not rows:
        return "Not run yet."
    tables = [compare(study, rows, SCORES), compare(study, rows, GROWTH | COUNTS | SPENT), by_task(study, rows)]
    tuned = study.runs.tuned.loc[rows].groupby("label", sort=False).first()
    said = ", ".join(f"`{label}` {options}" for label, options in tuned.items() if options) or "none"
    return "\n\n".join([*tables, f"Against `lora{BUDGETED}`:", beaten(study, rows, f"lora{BUDGETED}"),
                        f"Options that `clmoe tune` chose: {said}."])  # fmt: skip


def trials(study: Study) -> str:
    """What `clmoe tune` tried for each method, the mean score after its three tasks, and which options it chose."""
    recipe, rows = load_benchmark(study.name, check_files=False).recipe, []
    for path in sorted((CHOICES / study.name).glob("*.json")):
        found, config = read_json(path), load_config(path.stem, recipe, [])
        options = method_class(config.method)(config).options
        own = {key: getattr(options, key.removeprefix("options.")) for key in found["grid"]}
        tried = [f"{_values(trial['settings'])}: {show_number(trial['mean'])}" for trial in found["trials"]]
        kept = "as chosen" if own == found["chosen"] else _values(own)
        names = ", ".join(key.removeprefix("options.") for key in found["grid"])
        rows.append((path.stem, names, "; ".join(tried), _values(found["chosen"]), kept, " ".join(found["order"])))
    header = ("method", "options", "tried: last", "chosen", "the method's own", "tasks")
    return markdown(header, rows, keys=6) if rows else "No method's options have been tuned yet."


def _values(settings: dict[str, Any]) -> str:
    """The values as a configuration writes them, so None is null."""
    return ", ".join(f"{x:g}" if isinstance(x, float) else "null" if x is None else str(x) for x in settings.values())


def by_task(study: Study, labels: list[str]) -> str:
    """LLaVA-CMoE's Table 1: each task right after training (task known where a locator exists) and at the end."""
    rows = []
    for label in labels:
        first, transfer = kind_of(study, label, "immediate"), "bwt_known" if locates(study, label) else "bwt_n"
        bwts = ("", study.spread(label, transfer, ranged=True))
        for kind, name, bwt in zip((first, "last"), ("Immediate", "Last"), bwts, strict=True):
            if study.runs.loc[label, kind].notna().any():
                cells = [study.spread(label, f"{kind}:{task}") for task in study.tasks]
                rows.append((label, name, study.n(label), *cells, study.spread(label, kind, ranged=True), bwt))
    return markdown(("method", "", "seeds", *study.tasks, "Mean", "BWT"), rows, keys=2)


def by_locator(study: Study) -> str:
    """Percent of the questions at the end whose task each locator finds."""
    rows = []
    for (label, locator), counts in study.located.groupby(["label", "locator"]):
        if label not in (*study.methods, *study.matched):
            continue
        right = counts["count"].where(counts.task == counts.chosen, 0).groupby([counts.seed, counts.task]).sum()
        shares = (100 * right / counts.groupby(["seed", "task"])["count"].sum()).unstack()
        cells = [spread(column) for column in (*(shares[task] for task in study.tasks), shares.mean(axis=1))]
        rows.append((label, locator, str(len(shares)), *cells))
    return markdown(("method", "locator", "seeds", *study.tasks, "Mean"), rows, keys=2)


def paper_cells(study: Study, printed: dict[str, Any]) -> str:
    """LLaVA-CMoE's tables with the study's scores below the paper's, and how far the two agree."""
    parts, tasks = [], [f"{theirs} / {own}" for theirs, own in zip(printed["tasks"], study.tasks, strict=True)]
    for table in printed["tables"]:
        rows: list[tuple[str, ...]] = []
        for number, row in enumerate(table["rows"]):
            label, means = row.get("label"), row.get("printed", {})
            for kind in [kind for kind in ("immediate", "last", "after") if kind in row]:
                cells = ["" if score is None else f"{score:.2f}" for score in row[kind]]
                mean, bwt = (f"{means[name]:.2f}" if name in means else BLANK for name in (kind, "bwt"))
                named = kind if kind != "after" else ""
                rows.append((row["row"], named, "paper", *cells, mean, bwt if kind == "last" else "", ""))
                if label not in study.labels:
                    continue
                column = kind_of(study, label, kind) if named else f"after {study.tasks[number]}"
                columns = {task: f"{column}:{task}" for task in study.tasks}
                if kind == "after":  # the paper's own cell of a task is its Immediate
                    task = study.tasks[number]
                    columns[task] = f"{kind_of(study, label, 'immediate')}:{task}"
                there = zip(columns.values(), row[kind], strict=True)
                cells = ["" if score is None else study.spread(label, name) for name, score in there]
                mean = study.spread(label, column) if named and None not in row[kind] else BLANK
                transfer = study.spread(label, "bwt_known" if locates(study, label) else "bwt_n")
                rows.append(
                    (row["row"], named, "here", *cells, mean, transfer if kind == "last" else "", study.n(label))
                )
        if rows:
            parts.append(f"### {table['table']}: {table['what']}\n\n{agreement(study, table['rows'])}".rstrip() + "\n")
            parts.append(markdown(("row", "", "", *tasks, "Mean", "BWT", "seeds"), rows, keys=3) + "\n")
    return "\n".join(parts).rstrip()


def comparable(study: Study, printed: dict[str, Any]) -> str:
    """For each of the paper's tables: how many rows were run here, and what can be compared."""
    rows = []
    for table in printed["tables"]:
        run = sum(row.get("label") in study.labels for row in table["rows"])
        here = f"{run} of {len(table['rows'])}" if table["rows"] else BLANK
        rows.append((table["table"], table["what"], table["can"], table["cannot"], here))
    return markdown(("table", "of", "can be compared", "cannot", "rows here"), rows, keys=4)


def agreement(study: Study, rows: list[dict[str, Any]]) -> str:
    """How many pairs of rows have the same order of mean scores in the paper and here."""
    said = []
    for kind in ("immediate", "last"):
        known = [row for row in rows if kind in row and row.get("label") in study.labels]
        theirs = [statistics.fmean(score for score in row[kind] if score is not None) for row in known]
        ours = []
        for row in known:
            own = study.runs.loc[row["label"]].mean(numeric_only=True)
            given = [task for task, score in zip(study.tasks, row[kind], strict=True) if score is not None]
            ours.append(statistics.fmean(own[f"{kind_of(study, row['label'], kind)}:{task}"] for task in given))
        pairs = [(a, b) for a in range(len(known)) for b in range(a)]
        same = sum((theirs[a] - theirs[b]) * (ours[a] - ours[b]) > 0 for a, b in pairs)
        said += [f"{same} of {len(pairs)} by {kind}"] if pairs else []
    return f"Pairs of rows whose means are in the paper's order here: {', '.join(said)}." if said else ""


def misprints(printed: dict[str, Any]) -> str:
    lines = "- {table}, {row}: {figure} is printed as {printed:.2f}; its scores give {computed:.2f}"
    return "\n".join(lines.format(**row) for row in printed["misprints"])


def ablations(study: Study, sections: dict[str, list[str]]) -> str:
    """A table for each section of a grid whose first row and at least one other were run."""
    shown = SCORES | GROWTH | COUNTS
    present = {title: [label for label in labels if label in study.labels] for title, labels in sections.items()}
    missing = dict.fromkeys(label for labels in sections.values() for label in labels if label not in study.labels)
    parts = [f"Not run on {study.name}: {', '.join(missing)}."] if missing else []
    for title, labels in present.items():
        if len(labels) > 1 and labels[0] == sections[title][0]:
            parts.append(f"### {title}: {study.name}\n\n{compare(study, labels, shown, True)}")
    return "\n\n".join(parts)


def origins(study: Study) -> str:
    rows = []
    for label in study.labels:
        runs = study.runs.loc[label]
        dates = sorted({part for cell in runs.date for part in cell.split()})
        when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        by_commit = runs.reset_index().groupby("commit", sort=False).seed.apply(list)
        made = [f"{commit or 'not recorded'} ({_text(own)})" for commit, own in by_commit.items()]
        command = max(zip(runs.date, runs.command, strict=True), key=lambda pair: pair[0])[1]
        commit = ", ".join(made) if len(made) > 1 else by_commit.index[0] or "not recorded"
        rows.append((label, _text(runs.index), when, commit, f"`{command}`"))
    return markdown(("row", "seeds", "date", "commit (seeds)", "command of the newest run"), rows, keys=5)


def _text(seeds: Iterable[int]) -> str:
    return " ".join(map(str, seeds))


def results_page(studies: list[Study], grids: dict[str, Any]) -> str:
    """The whole page; the same tables give the same bytes."""
    paper = yaml.safe_load((TABLES / "paper.yaml").read_text(encoding="utf-8"))
    counts = [(row["what"], row["paper"], row["ours"]) for row in paper["counts"]]
    parts: dict[str, Any] = {"claims": claims(paper, studies), "counts": markdown(("count", "paper", "ours"), counts)}
    printed = yaml.safe_load((TABLES / "paper_tables.yaml").read_text(encoding="utf-8"))
    parts |= {"paper_cells": paper_cells(studies[0], printed), "comparable": comparable(studies[0], printed)}
    parts["misprints"] = misprints(printed)
    parts["unchecked"] = "\n".join(f"- {line}" for line in paper["unchecked"])
    for study in studies:
        blocks = {"by_locator": by_locator(study), "origins": origins(study)}
        blocks |= {name: ablations(study, grids[name]["sections"]) for name in ("clmoe", "llava_cmoe")}
        blocks["methods"] = compare(study, study.methods, SCORES)
        blocks["methods_spent"] = compare(study, study.methods, GROWTH | COUNTS | SPENT)
        blocks |= {"by_task": by_task(study, study.methods), "trials": trials(study)}
        blocks |= {"and_lora": beaten(study, study.methods, "lora"), "matched": under_budget(study)}
        blocks["head_start"] = study.spread("llava_cmoe", "head_start")
        for name, text in blocks.items():
            parts.setdefault(name, {})[study.name] = text
    return (TABLES / "page.template.md").read_text(encoding="utf-8").format(**parts)


def draw(study: Study) -> Path:
    """A line for each method that learns the tasks in turn: its mean score on those learned so far, after each one.

    The legend starts with the method that ends highest.
    """
    mpl.rcParams.update({"svg.hashsalt": study.name, "svg.fonttype": "none"})
    shown = [label for label in study.methods if study.spread(label, "forgetting_max") != BLANK]
    columns = [f"so far:{task}" for task in study.tasks]
    means = {label: list(study.runs.loc[label, columns].astype(float).mean()) for label in shown}
    figure = Figure(figsize=(8, max(4, 0.22 * len(shown) + 0.6)), layout="constrained")
    axes = figure.subplots()
    for number, label in enumerate(sorted(shown, key=lambda label: -means[label][-1])):
        dashes = ("-", "--", ":")[number // 10 % 3]  # of ten colours
        axes.plot(means[label], dashes, marker="o", markersize=3, label=label)
    name_columns(axes, study.tasks, 0)
    axes.set(ylabel="mean score on the tasks so far (%)", xlabel="after training", ylim=(0, 100))
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(TABLES / f"{study.name}.svg", metadata={"Date": None})
    return TABLES / f"{study.name}.svg"


def add(folders: Iterable[Path]) -> list[str]:
    """As ``results_tables.add``."""
    return results_tables.add(TABLES, STUDIES, folders)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs="+", type=Path, default=[], metavar="RUN", help="run folders, or a grid's")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    if args.add:
        print(*add(args.add), sep="\n")
    grids = yaml.safe_load(GRIDS.read_text(encoding="utf-8"))["grids"]
    studies = [read_study(TABLES, name, grids) for name in STUDIES]
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
