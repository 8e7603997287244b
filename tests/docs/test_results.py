"""docs/results.md is what scripts/results.py makes of the tables, and finished runs can be added to the tables."""

import csv
import json
import statistics
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import yaml

from clmoe.config import load_config
from clmoe.errors import ClmoeError
from clmoe.utils.logging import EventLog
from tests.report.folders import block, layer, predict
from tests.support import load_script

TASKS = ("a", "b", "c")
STUDY = "playground-coin"
BLOCKS = (
    "methods", "methods_spent", "by_task", "by_locator", "and_lora", "trials", "matched", "clmoe", "llava_cmoe",
    "origins", "head_start",
)  # fmt: skip


@pytest.fixture
def results() -> ModuleType:
    return load_script("results")


@pytest.fixture
def empty(results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with tables that have no rows, and with a short template."""
    for path in results.TABLES.glob("*.csv"):
        (tmp_path / path.name).write_text(path.read_text().split("\n", 1)[0] + "\n")
    (tmp_path / "paper.yaml").write_text((results.TABLES / "paper.yaml").read_text())
    (tmp_path / "paper_tables.yaml").write_text("{tasks: [A, B, C], misprints: [], tables: []}")
    (tmp_path / "page.template.md").write_text(
        "\n".join(["{claims}", *(f"{{{name}[{STUDY}]}}" for name in BLOCKS), ""])
    )
    for name, value in (("TABLES", tmp_path), ("PAGE", tmp_path / "page.md"), ("STUDIES", (STUDY,))):
        monkeypatch.setattr(results, name, value)
    return results


def make_run(
    folder: Path, label: str, seed: int, last: float = 50.0, known: bool = False, commit: str = "abc", **info: Any
) -> Path:
    """A run whose tasks score 80 right after training; `a` scores 70 after `b`; `a` and `b` score `last` at the end."""
    run = folder / f"{label}-seed{seed}"
    run.mkdir(parents=True)
    matrix = f"after,a,b,c\na,80,,\nb,70,80,\nc,{last},{last},80\n"
    (run / "matrix.csv").write_text(matrix)
    if known:
        (run / "immediate.csv").write_text("after,a,b,c\nimmediate,81,82,83\n")
    facts = {
        "label": label, "method": label, "seed": seed, "benchmark": STUDY, "order": TASKS, "scoring": "fixed",
        "trainable_parameters": 90_624, "adapter_parameters": 120_000, "projector_trained": False,
        "effective_scale": 2.0, "steps_per_task": 200, "limit": None,
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(facts | info))
    EventLog(run / "events.jsonl").write("started", commit=commit, command=f"clmoe run x --output {run.resolve()}")
    return run


def build(results: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Run the script with these arguments and return the page."""
    monkeypatch.setattr("sys.argv", ["results.py", *map(str, arguments)])
    assert results.main() == 0
    return str(results.PAGE.read_text())


def line_of(page: str, start: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return line[2:-2].split(" | ")


def row_of(page: str, label: str) -> dict[str, str]:
    """A label's cells by column, from all tables that have one row per method."""
    found, header = {}, [""]
    for line in page.splitlines():
        cells = line[2:-2].split(" | ")
        header = cells if cells[0] == "method" else header
        if cells[0] == label and header[1] == "seeds":
            found |= dict(zip(header, cells, strict=True))
    return found


@pytest.mark.slow
def test_the_page_is_what_the_tables_say(results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["results.py", "--check"])
    assert results.main() == 0, "run `python scripts/results.py`"
    monkeypatch.setattr(results, "PAGE", tmp_path / "results.md")
    results.PAGE.write_text("26.39\n")
    assert (results.main(), results.PAGE.read_text()) == (1, "26.39\n")


def test_a_printed_mean_is_that_of_the_cells(results: ModuleType) -> None:
    """Oracle: row `lora` of the first table, computed with the standard library alone."""
    by_seed: dict[str, list[float]] = {}
    for row in csv.DictReader((results.TABLES / f"{STUDY}.csv").open()):
        if row["label"] == "lora" and row["after"] == "digits":
            by_seed.setdefault(row["seed"], []).append(float(row["score"]))
    ends = [statistics.mean(scores) for scores in by_seed.values()]
    shown = f"{statistics.mean(ends):.2f} ± {statistics.stdev(ends):.2f}"
    shown += f" [{min(ends):.2f}, {max(ends):.2f}]" if len(ends) >= 5 else ""
    page = results.PAGE.read_text()
    assert f"| lora | {len(ends)} | {shown} |" in page[page.index(f"All methods on {STUDY}") :]


def test_the_papers_cells_and_ours_in_pairs(results: ModuleType) -> None:
    lines = [line for line in results.PAGE.read_text().split("### Table 1: ")[1].splitlines() if line.startswith("| l")]
    cells = {tuple(line[2:-2].split(" | ")[:3]): line[2:-2].split(" | ")[3:] for line in lines}
    assert cells["llava_cmoe", "last", "paper"][-4:] == ["59.44", "59.23", "-3.58", ""]
    table = results.PAGE.read_text().split("All methods on playground-coin")[1].split("\n## ")[0]

    def without_range(shown: list[str]) -> list[str]:
        return [cell.partition(" [")[0] for cell in shown]

    last, immediate = cells["lora", "last", "here"], cells["llava_cmoe", "immediate", "here"]
    assert without_range(last[:-1]) == without_range(line_of(table, "lora | Last")[3:])
    assert without_range(immediate[:-2]) == without_range(line_of(table, "llava_cmoe | Immediate")[3:-1])


def test_the_tables_agree_with_each_other(results: ModuleType) -> None:
    runs = results.read_table("runs")
    assert not runs.duplicated(["study", "label", "seed"]).any()
    for study in results.STUDIES:
        cells = results.read_table(study)
        assert not cells.duplicated(["label", "seed", "after", "task", "locator"]).any()
        of_study = runs[runs.study == study]
        assert set(zip(cells.label, cells.seed, strict=True)) == set(zip(of_study.label, of_study.seed, strict=True))
        right = cells.score * cells.questions / 100
        assert (abs(right - right.round()) < 1e-6).all(), "a score is a share of whole questions"
        located = results.read_table("located").query("study == @study")
        assert (located.groupby(["label", "seed", "locator", "task"])["count"].sum() == 300).all()
    growth = results.read_table("growth")
    last = growth.groupby(["study", "label", "seed"]).trainable.last()
    said = runs.set_index(["study", "label", "seed"]).trainable_parameters
    assert (last == said[last.index]).all()


def test_every_label_of_the_papers_file_is_a_row_of_a_grid(results: ModuleType) -> None:
    paper, grids = (yaml.safe_load(path.read_text()) for path in (results.TABLES / "paper.yaml", results.GRIDS))
    sections = [labels for grid in grids["grids"].values() for labels in grid["sections"].values()]
    rows = {label for labels in sections for label in labels}
    assert set(paper["figures"]) <= rows
    assert {label for claim in paper["claims"] for label in (claim["better"], *claim["than"])} <= rows


@pytest.mark.slow
def test_added_runs_are_compared(empty: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    for seed in (0, 1, 2):
        for label, last in (("clmoe", 50.0 + seed), ("lora", 20.0), ("clmoe_rmoe_off", 51.0)):
            make_run(out, label, seed, last)
    make_run(out, "ewc", 0, 20.0, commit="def")
    page = build(empty, monkeypatch, "--add", *out.iterdir())
    # (2 (50 + s) + 80) / 3 - 40 for s = 0, 1, 2: 20, 20.67, 21.33; times t_2(0.975) = 4.303: 4.303 * 0.667 / sqrt 3
    assert "| CL-MoE ends higher (AP) than lora | holds, +20.7 (+19.0 to +22.3) |" in page
    assert "ends higher than clmoe_rmoe_off | no difference shown, +0.0 (-1.7 to +1.7) |" in page
    assert "| CL-MoE ends higher (AP) than ewc | not verified (1 seed), +20.0 * |" in page, (
        "the rows have no commit in common"
    )
    assert "| CL-MoE ends higher (AP) than mas | not run |" in page
    # per task, the best score before the end minus the last: 80 - 20 for a and b; 80 - (50 + s)
    assert "| CL-MoE forgets less (AF) than lora | holds, +31.0 (+28.5 to +33.5) |" in page
    assert f"- {STUDY}: 38 comparisons: holds 2, no difference shown 1, not verified 2, not run 33." in page
    ends = (20, 20, 80, 40, -40)  # a, b, c, their mean, and BWT
    assert line_of(page, "lora | Last")[3:] == [f"{value:.2f} ± 0.00" for value in ends]
    assert line_of(page, "lora | 0 1 2")[3:] == ["abc", "`clmoe run x --output RUN`"]
    assert "Not run on playground-coin: clmoe_mmoe_off, clmoe_both_off, clmoe_beta0," in page
    assert "<svg" in (empty.TABLES / f"{STUDY}.svg").read_text()


@pytest.mark.slow
def test_an_added_run_replaces_its_older_rows(
    empty: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(empty, monkeypatch, "--add", *(make_run(tmp_path / "x", "lora", seed, 20.0) for seed in (0, 1)))
    before = {path.name: path.read_text() for path in empty.TABLES.glob("*.csv")}
    build(empty, monkeypatch, "--add", make_run(tmp_path / "y", "lora", 0, 20.0))
    assert {path.name: path.read_text() for path in empty.TABLES.glob("*.csv")} == before
    build(empty, monkeypatch, "--add", make_run(tmp_path / "z", "lora", 1, 26.0))
    cells = empty.read_table(STUDY).set_index(["seed", "after", "task"]).score
    assert (len(cells), cells[0, "c", "a"], cells[1, "c", "a"]) == (12, 20.0, 26.0)


@pytest.mark.slow
def test_locator_and_growth_are_kept(empty: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "out", "llava_cmoe", 0, known=True, locator="vae")
    (run / "locator.csv").write_text(
        "after,locator,task,located,count\na,vae,a,a,4\nc,vae,a,a,3\nc,vae,a,b,1\nc,vae,b,c,4\nc,vae,c,c,4\n"
        "c,nearest_mean,a,a,4\nc,nearest_mean,b,b,4\nc,nearest_mean,c,c,4\n"
    )  # fmt: skip
    (run / "parameters.csv").write_text("task,trainable,stored\na,100,400\nb,150,550\nc,110,660\n")
    blocks = {"b": (1, 0), "c": (2, 1)}
    plans = {task: {layer(i): block([0.1], 0.0, n) for i, n in enumerate(added)} for task, added in blocks.items()}
    (run / "expansion.json").write_text(json.dumps([{"task": t, "blocks": plan} for t, plan in plans.items()]))
    page = build(empty, monkeypatch, "--add", run)
    assert line_of(page, "llava_cmoe | vae") == ["llava_cmoe", "vae", "1", "75.00", "0.00", "100.00", "58.33"]
    assert line_of(page, "llava_cmoe | nearest_mean")[3:] == ["100.00"] * 4
    # known 81, 82, 83; at the end 50, 50, 80
    assert line_of(page, "llava_cmoe | Immediate")[3:] == ["81.00", "82.00", "83.00", "82.00", ""]
    assert line_of(page, "llava_cmoe | Last")[-1] == "-22.00"
    row = row_of(page, "llava_cmoe")
    assert (row["task found (%)"], row["blocks extended (%)"], row["experts added"]) == ("58.33", "75.00", "4.00")
    assert (row["trained per task, mean"], row["bwt_known"]) == ("120", "-22.00")
    assert page.endswith("\n300\n"), "stored after the first task, and not trained in it"
    assert list(empty.read_table("growth").added) == [pd.NA, 1, 3]


@pytest.mark.parametrize(
    ("info", "file", "text", "message"),
    [
        ({"steps_per_task": 20}, "", "", r"run\.json: steps_per_task is 20"),
        ({"limit": 20}, "", "", r"run\.json: limit is 20"),
        ({"benchmark": "coin"}, "", "", r"run\.json: benchmark 'coin'"),
        ({}, "locator.csv", "after,locator,task,located,count\n", r"run\.json: field 'locator'"),
        ({"seed": 0}, "", "", r"x/lora-seed0: .*seed 0|y/lora-seed1: .*seed 0"),
    ],
)
def test_a_run_that_cannot_be_compared_is_refused(
    empty: ModuleType, tmp_path: Path, info: dict[str, Any], file: str, text: str, message: str
) -> None:
    first = make_run(tmp_path / "x", "lora", 0)
    empty.add([first])
    run = make_run(tmp_path / "y", "lora", 1)
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | info))
    if file:
        (run / file).write_text(text)
    before = {path.name: path.read_text() for path in empty.TABLES.glob("*.csv")}
    with pytest.raises(ClmoeError, match=message):
        empty.add([first, run])
    assert {path.name: path.read_text() for path in empty.TABLES.glob("*.csv")} == before


def test_what_is_not_finished_is_left_out_and_named(
    empty: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid"
    for label, seed in (("lora", 0), ("lora", 1), ("hide", 0), ("agem", 0)):
        make_run(grid, label, seed)
    (grid / "lora-seed1" / "matrix.csv").write_text("after,a,b,c\na,80,,\n")
    (grid / "hide-seed0" / "run.json").unlink()
    (grid / "agem-seed0" / "sequence.json").write_text("{}")  # as in a run that has not written spent.json yet
    (grid / "logs").mkdir()
    page = build(empty, monkeypatch, "--add", grid)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert [line.split(": ")[1] for line in told] == ["agem-seed0", "hide-seed0", "lora-seed1"]
    assert "spent.json" in told[0] and "run.json" in told[1] and "matrix.csv" in told[2]
    assert set(empty.read_table("runs").label) == {"lora"} and row_of(page, "lora")["seeds"] == "1"


@pytest.mark.slow
def test_a_row_is_measured_again_as_a_whole(empty: ModuleType, tmp_path: Path) -> None:
    empty.add([make_run(tmp_path / "old", "lora", seed, 20.0) for seed in (0, 1)])
    new = [make_run(tmp_path / "new", "lora", seed, 26.0, commit="d0d0d0d") for seed in (0, 1)]
    (said,) = empty.add(new[:1])
    assert "lora" in said and "0 1" in said
    assert set(empty.read_table("runs").commit) == {"abc"}, "no row of two commits"
    assert empty.add(new) == []
    assert list(empty.read_table("runs").commit) == ["d0d0d0d"] * 2
    assert empty.read_table(STUDY).query("after == 'c' and task == 'a'").score.tolist() == [26.0] * 2
    assert empty.add([make_run(tmp_path / "more", "lora", 2, commit="d0d0d0d")]) == []
    (said,) = empty.add([*new, make_run(tmp_path / "other", "lora", 2, commit="eee")])
    assert "d0d0d0d, eee" in said, "a grid that went on at another commit"
    grids = yaml.safe_load(empty.GRIDS.read_text())["grids"]
    assert (
        line_of(empty.origins(empty.read_study(empty.TABLES, STUDY, grids)), "lora | 0 1 2")[3]
        == "d0d0d0d (0 1), eee (2)"
    )


@pytest.mark.slow
def test_what_a_row_keeps_how_it_answers_and_how_it_was_tuned(empty: ModuleType, tmp_path: Path) -> None:
    """Five seeds of a new method with all files, a run under a budget, a tuned one, and three seeds of lora."""
    runs = [make_run(tmp_path, "dgg", seed, 10.0 + seed) for seed in range(5)]
    spent = {
        "active_parameters": 90_624,
        "stored_bytes": 12_345_678,
        "stored_samples": 800,
        "training_flops": 56 * 10**13,
    }
    trials = [{"settings": {"options.per_task": n}, "last": {"100": n}, "mean": n} for n in (50, 100)]
    tuned = {"order": ["c", "a"], "trials": trials, "chosen": {"options.per_task": 100}}
    for run in runs:
        (run / "spent.json").write_text(json.dumps(spent))
        predict(run, "c", "a", {"1": ("Red.", 0.0)}, answer="red")  # right except for its form
        predict(run, "c", "b", {"1": ("red", 0.0)}, answer="two")  # a word of task a
        predict(run, "c", "c", {"1": ("yes", 1.0)}, answer="yes")
    budgeted = make_run(tmp_path, "ewc_matched", 0, method="ewc")
    own = make_run(tmp_path / "tuned", "ewc", 0)
    for run in (budgeted, own):
        (run / "tuned.json").write_text(json.dumps(tuned))
    lora = [make_run(tmp_path, "lora", seed, 60.0) for seed in range(3)]
    assert empty.add([*runs, *lora, budgeted, own]) == []
    study = empty.read_study(empty.TABLES, STUDY, yaml.safe_load(empty.GRIDS.read_text())["grids"])
    assert (study.methods, study.matched) == (["lora", "dgg", "ewc_tuned"], ["ewc_matched"])
    row = row_of(empty.compare(study, study.methods, empty.SCORES | empty.COUNTS | empty.SPENT), "dgg")
    # (2 (10 + s) + 80) / 3 for s = 0 to 4: 34.67 ± 1.05
    assert (row["seeds"], row["last (AP)"]) == ("5", "34.67 ± 1.05 [33.33, 36.00]")
    assert (row["any form"], row["another task's words (%)"]) == (
        "66.67 ± 0.00 [66.67, 66.67]",
        "33.33 ± 0.00 [33.33, 33.33]",
    )
    assert (row["active"], row["bytes stored"], row["samples stored"]) == ("90,624", "12.3 M", "800")
    assert row["training FLOP"] == "560.0 T"
    assert "another task's words (%)" not in row_of(empty.compare(study, ["lora"], empty.SCORES), "lora")
    against = empty.beaten(study, study.methods, "lora")
    # 2 (10 + s - 60) / 3 for s = 0, 1, 2: -33.33, -32.67, -32: mean -32.67, 4.303 * 0.667 / sqrt 3 = 1.656
    assert line_of(against, "dgg")[2:] == ["3", "-32.7 (-34.3 to -31.0)", "below"]
    assert against.index("- below: dgg") < against.index("- not verified: ewc_tuned")
    told = empty.under_budget(study)
    assert "Not run yet." in told, "lora_matched is missing"
    assert "chose: `ewc_matched` per_task=100." in told


def test_the_trials_and_the_methods_own_setting(
    empty: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table shows the methods' own settings: lambda 1000 for EWC, and gamma 0.7 and beta 0.5 for CL-MoE."""
    study = SimpleNamespace(name=STUDY)
    monkeypatch.setattr(empty, "CHOICES", tmp_path / "tuned")
    assert empty.trials(study) == "No method's options have been tuned yet."
    (tmp_path / "tuned" / STUDY).mkdir(parents=True)
    for method, grid, best in (
        ("ewc", {"options.weight": [1000, 1e5]}, {"options.weight": 1000}),
        ("clmoe", {"options.gamma": [0.3], "options.beta": [0.25, 0.5]}, {"options.gamma": 0.3, "options.beta": 0.25}),
    ):
        trials = [
            {"settings": dict(zip(grid, values, strict=True)), "last": {}, "mean": 10.0 * number}
            for number, values in enumerate(product(*grid.values()))
        ]
        found = {"order": ["c", "a"], "grid": grid, "trials": trials, "chosen": best}
        (tmp_path / "tuned" / STUDY / f"{method}.json").write_text(json.dumps(found))
    table = empty.trials(study)
    assert line_of(table, "ewc | weight")[2:] == ["1000: 0.00; 100000: 10.00", "1000", "as chosen", "c a"]
    expected = ["0.3, 0.25: 0.00; 0.3, 0.5: 10.00", "0.3, 0.25", "0.7, 0.5", "c a"]
    assert line_of(table, "clmoe | gamma, beta")[2:] == expected


def test_every_committed_choice_is_one_that_the_method_takes(results: ModuleType) -> None:
    """A choice's grid is the method's own, all combinations were tried, and the best one won (in a tie, the first)."""
    for path in sorted(results.CHOICES.glob("*/*.json")):
        found, config = json.loads(path.read_text()), load_config(path.stem, {}, [])
        assert found["grid"] == config.tune, path
        tried = sorted(tuple(trial["settings"].values()) for trial in found["trials"])
        assert tried == sorted(product(*found["grid"].values())), path
        means = [trial["mean"] for trial in found["trials"]]
        assert found["trials"][means.index(max(means))]["settings"] == found["chosen"], path
        assert {key.removeprefix("options."): value for key, value in found["chosen"].items()}.items() <= (
            load_config(path.stem, {}, [f"tuned={path}"]).options.items()
        )


def test_the_two_misprinted_means(results: ModuleType) -> None:
    printed = yaml.safe_load((results.TABLES / "paper_tables.yaml").read_text())
    means = {(row["table"], row["row"]) for row in printed["misprints"] if row["figure"] != "bwt"}
    assert means == {("Table 1", "lwf"), ("Table 7", "rank 128")}
    tables = {table["table"]: table["rows"] for table in printed["tables"]}
    assert {f"Table {number}" for number in range(1, 10)} <= {name.split(",")[0] for name in tables}
    first = next(row for row in tables["Table 1"] if row["row"] == "llava_cmoe")
    matrix = [row["after"] for row in tables["Table 9"]]
    assert [row[task] for task, row in enumerate(matrix)] == first["immediate"]
    assert matrix[-1][:-1] == first["last"][:-1], "a task's own cell is with the task known"
