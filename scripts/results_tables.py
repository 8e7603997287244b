"""How scripts/results.py takes finished run folders into the tables in docs/results."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from clmoe.errors import ClmoeError
from clmoe.evaluate.matrix import ZERO_SHOT, AccuracyMatrix
from clmoe.evaluate.run import summary_path
from clmoe.plan.spent import SPENT
from clmoe.report.formats import formats_frame
from clmoe.report.runs import Group, Run, read_run
from clmoe.report.tables import matrix_frame
from clmoe.sequence import SETTINGS
from clmoe.utils.files import read_json
from clmoe.utils.logging import read_events

TYPES: Any = dict.fromkeys(  # of columns for which pandas would guess wrong in a table with few rows or blank cells
    ("study", "label", "method", "locator", "order", "commit", "date", "command", "after", "task", "chosen",
     "tuned"), "str",
) | dict.fromkeys(
    ("seed", "questions", "stored", "blocks", "extended", "added", "limit", "active_parameters", "locator_parameters",
     "stored_bytes", "stored_samples", "training_flops", "question_flops"), "Int64",
)  # fmt: skip
BUDGETED = "_matched"  # ends the labels of rows under one budget
TUNED = "_tuned"  # ends the labels of other rows whose options `clmoe tune` chose


def read_table(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, dtype=TYPES, keep_default_na=False, na_values=[""])
    return table.fillna(dict.fromkeys(table.select_dtypes("str"), ""))


def commits(runs: pd.DataFrame) -> set[str]:
    """The commits of these runs, shortened, and without the mark of uncommitted changes."""
    return {commit.rstrip("+")[:7] for cell in runs.commit for commit in cell.split()}


def add(tables: Path, studies: Sequence[str], folders: Iterable[Path]) -> list[str]:
    """Put finished runs, or those of a grid's folder, into the tables; returns what was left out, and why.

    If the tables have seeds of a row from other commits, these are replaced all together: until all of them have been
    run again, the new ones are left out. Raises ClmoeError, before anything is written, for a run of another benchmark
    or with another number of steps or questions than the study's, and for two folders with the same seed of a row.
    """
    old, said = read_table(tables / "runs.csv"), list[str]()
    rows: dict[tuple[str, str], dict[int, dict[str, pd.DataFrame]]] = defaultdict(dict)
    for folder in _runs(folders):
        if reason := unfinished(folder):
            said.append(f"left out: {folder.name}: {reason}")
            continue
        run = read(folder, studies, old)
        (facts,) = run["runs"].itertuples()
        seeds = rows[facts.study, facts.label]
        if facts.seed in seeds:
            raise ClmoeError(f"{folder}: another folder also holds {facts.label}, seed {facts.seed}; leave one out")
        seeds[facts.seed] = run
    taken: list[dict[str, pd.DataFrame]] = []
    for (study, label), seeds in rows.items():
        before = old[(old.study == study) & (old.label == label)]
        kept, new = before[~before.seed.isin(list(seeds))], pd.concat([run["runs"] for run in seeds.values()])
        if not commits(kept) <= commits(new):
            run_again, there = (" ".join(map(str, sorted(numbers))) for numbers in (seeds, before.seed))
            said.append(f"left out: {label}: the table has seeds {there} from other commits; finished: {run_again}")
            continue
        taken += seeds.values()
        if len(found := commits(pd.concat([kept, new]))) > 1:
            said.append(f"{label}: its seeds come from several commits: {', '.join(sorted(found))}")
    _write(tables, taken)
    return said


def _runs(folders: Iterable[Path]) -> list[Path]:
    """The run folders, with the runs inside in place of each grid's folder."""
    grids = {folder: sorted(path for path in folder.glob("*-seed*") if path.is_dir()) for folder in folders}
    return [run for folder, inner in grids.items() for run in (inner or [folder])]


def _write(tables: Path, runs: Sequence[dict[str, pd.DataFrame]]) -> None:
    """Replace the runs' rows in every table."""
    for name in {name: None for run in runs for name in run}:
        table = read_table(tables / f"{name}.csv")
        keys = ["study", "label", "seed"] if "study" in table else ["label", "seed"]
        given = [(run["runs"].iloc[0], run[name]) for run in runs if name in run]
        new = [rows.assign(**facts[keys]).reindex(columns=table.columns).astype(table.dtypes) for facts, rows in given]
        gone = pd.MultiIndex.from_tuples([tuple(facts[keys]) for facts, _ in given])
        table = pd.concat([table[~pd.MultiIndex.from_frame(table[keys]).isin(gone)], *new])
        table.sort_values(keys, kind="stable").to_csv(tables / f"{name}.csv", index=False, lineterminator="\n")


def unfinished(folder: Path) -> str:
    """What a run lacks; empty if it has ended."""
    if not (folder / "run.json").is_file() or not (folder / "matrix.csv").is_file():
        return "no run.json or matrix.csv yet"
    order = read_json(folder / "run.json")["order"]
    if AccuracyMatrix.read_csv(folder / "matrix.csv").row(order[-1])[-1] is None:
        return "matrix.csv: the last task has no score"
    if (folder / SETTINGS).is_file() and not (folder / SPENT).is_file():
        return f"no {SPENT} yet; the same `clmoe run` command writes it"
    return ""


def read(folder: Path, studies: Sequence[str], old: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of a finished run, by table. Raises ClmoeError if it cannot be compared with the ``old`` runs."""
    info = read_json(folder / "run.json")
    study = info["benchmark"]
    if study not in studies:
        raise ClmoeError(f"{folder / 'run.json'}: benchmark {study!r} is not one of {', '.join(studies)}")
    own = old[old.study == study]
    steps, limits = set(own.steps_per_task) - {0}, set(own.limit.fillna(0))
    if steps and info["steps_per_task"] not in {0, *steps}:
        raise ClmoeError(f"{folder / 'run.json'}: steps_per_task is {info['steps_per_task']}; {study} has {steps}")
    if limits and (info.get("limit") or 0) not in limits:
        raise ClmoeError(f"{folder / 'run.json'}: limit is {info.get('limit')}; {study} has {limits} (0: no limit)")
    if (folder / "locator.csv").exists() and not info.get("locator"):
        raise ClmoeError(f"{folder / 'run.json'}: field 'locator' does not say which locator chose the tasks")
    run = read_run(folder)
    group, (cells, located) = Group(run.label, (run,)), read_cells(run)
    facts = {"study": study} | read_facts(folder, info) | read_more(group)
    if facts["tuned"] and not run.label.endswith(BUDGETED):
        facts["label"] += TUNED
    located = located[located.after == run.order[-1]]
    parts = {"growth": read_growth(run), "located": located, study: cells}
    return {"runs": pd.DataFrame([facts])} | parts


def read_facts(folder: Path, info: dict[str, Any]) -> dict[str, Any]:
    events, timing = read_events(folder / "events.jsonl"), folder / "timing.json"
    started = [event for event in events if event["event"] == "started"]
    command = started[0]["command"].replace("cli.py ", "clmoe ", 1) if started else ""
    facts = info | {"order": " ".join(info["order"]), "locator": info.get("locator") or ""}
    facts["command"] = command.replace(str(folder.resolve()), "RUN").replace(str(folder.resolve().parent), "OUT")
    facts["commit"] = " ".join(sorted({event["commit"] for event in started if event["commit"]}))
    facts["date"] = " ".join(sorted({event["time"][:10] for event in events}))
    facts["minutes"] = read_json(timing)["minutes"] if timing.exists() else None
    return facts


def read_more(group: Group) -> dict[str, Any]:
    """What the run has spent, its answers' form and words (means over the tasks), and the options chosen for it."""
    (run,) = group.runs
    forms, chosen = formats_frame([group]), run.tuned.get("chosen", {})
    return run.spent | {
        "any_form": forms.last_any_form.astype(float).mean(),
        "foreign": forms.foreign.astype(float).mean(),
        "tuned": " ".join(f"{key.removeprefix('options.')}={value}" for key, value in chosen.items()),
    }


def read_cells(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells of the matrix and of the row with the task known; and what every locator chose after each task."""
    cells = matrix_frame(run).reset_index().melt("after", var_name="task", value_name="score")
    cells["locator"] = run.locator
    if run.immediate and run.locator != "oracle":
        known = pd.DataFrame({"after": run.order, "task": run.order, "score": run.immediate, "locator": "oracle"})
        cells = pd.concat([cells, known])
    cells, located = cells.dropna(subset="score"), run.located.rename(columns={"located": "chosen"})
    keys = ["after", "task", "locator"]
    asked = located.groupby(keys)["count"].sum()
    right = located[located.task == located.chosen].groupby(keys)["count"].sum().reindex(asked.index, fill_value=0)
    answered = [_questions(run, *cell) for cell in cells[keys].itertuples(index=False)]
    cells = cells.join(pd.DataFrame({"questions": asked, "located": right / asked}), on=keys)
    return cells.assign(questions=cells.questions.fillna(pd.Series(answered, cells.index, dtype=float))), located


def _questions(run: Run, after: str, task: str, locator: str) -> int | None:
    """How many questions were asked for a cell; an untrained sequence has only those asked before it."""
    files = [summary_path(run.path, when, task, by) for when in (after, ZERO_SHOT) for by in (locator, "")]
    return next((read_json(file).get("questions") for file in files if file.is_file()), None)


def read_growth(run: Run) -> pd.DataFrame:
    added = run.expansion.groupby("task").added
    grown = pd.DataFrame(
        {"blocks": added.count(), "extended": added.agg(lambda own: (own > 0).sum()), "added": added.sum()}
    )
    return run.parameters.join(grown, on="task")
