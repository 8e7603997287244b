"""The tables: means and deviations over seeds, and how each format renders them."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from clmoe.errors import ClmoeError
from clmoe.report import plots, tables
from clmoe.report.page import write_report
from clmoe.report.runs import group_runs
from clmoe.report.tables import BLANK, comparison_table, costs_table, mean_matrices, report_tables
from tests.report.folders import TASKS, block, layer, make_run, predict, row_of, write, write_expansion

HEADER, LOCATED = "after,colour_letter,count,box", "after,locator,task,located,count"


def two_seeds(root: Path) -> list[Path]:
    return [make_run(root, "moe", seed, last) for seed, last in ((1, 50.0), (0, 44.0))]


def located_run(root: Path, seed: int, right: int, order: list[str] = TASKS) -> Path:
    """A run that locates `right` of 10 `colour_letter` questions, the others as `box`; count has 15/20, box 30/30."""
    run, end = make_run(root, "moe", seed, order=order), order[-1]
    earlier = "count,vae,count,count,10"  # not shown
    counts = [f"colour_letter,colour_letter,{right}", f"colour_letter,box,{10 - right}"]
    counts += ["count,count,15", "count,colour_letter,5", "box,box,30"]
    return write(run / "locator.csv", LOCATED, earlier, *(f"{end},vae,{line}" for line in counts))


def test_comparison_averages_over_seeds(tmp_path: Path) -> None:
    others = [make_run(tmp_path, "other", seed, 20.0, True) for seed in (0, 1)]
    table = comparison_table(group_runs([*two_seeds(tmp_path), *others]))
    moe, other = row_of(table, "moe"), row_of(table, "other")
    # last: 60 and 56; mean 58, sample deviation 4 / sqrt(2) = 2.83. bwt_n: -20 and -24.
    assert (moe["seeds"], moe["last"], moe["bwt_n"]) == ("2", "58.00 ± 2.83", "-22.00 ± 2.83")
    assert (moe["immediate"], moe["immediate_known"]) == ("80.00 ± 0.00", BLANK)
    assert (other["immediate_known"], other["bwt_known"]) == (
        "82.00 ± 0.00",
        "-42.00 ± 0.00",
    )  # (20 - 81 + 20 - 82 + 80 - 83) / 3
    best = {(table.cells["label"][row], list(table.cells)[column]) for row, column in table.best}
    assert {("moe", "last"), ("moe", "forgetting_max")} <= best
    assert "immediate" not in {column for _, column in best}, "both are 80"


def test_general_ability_has_tables_where_it_was_measured(tmp_path: Path) -> None:
    runs = two_seeds(tmp_path)
    columns = list(comparison_table(group_runs(runs)).cells)
    assert tables.general_tables(group_runs(runs), tables.general_frame(group_runs(runs))) == []
    for run, loss in zip(runs, (13, 17), strict=True):
        lines = ("zero_shot,86,74", "colour_letter,84,70", f"box,{80 - loss},{80 - loss}")
        write(run / "general.csv", "after,pope,mme", *lines)
    groups = group_runs([*runs, make_run(tmp_path, "blank", 0)])
    assert list(comparison_table(groups).cells) == columns
    change, table = tables.general_tables(groups, tables.general_frame(groups))
    moe, blank = (row_of(change, label) for label in ("moe", "blank"))
    assert list(moe)[2:] == ["general_zero_shot", "general_last", "general_change"]
    assert (moe["general_zero_shot"], moe["general_change"]) == ("80.00 ± 0.00", "-15.00 ± 2.83")
    assert {blank[name] for name in list(moe)[2:]} == {BLANK}
    assert "general_change" in tables.report_text(runs)
    assert list(table.cells) == ["label", "after", "pope", "mme", "mean"]
    assert row_of(table, "moe", "zero_shot")["mean"] == "80.00 ± 0.00"
    assert row_of(table, "moe", "box")["mme"] == "65.00 ± 2.83"
    write(runs[0] / "general.csv", "after,pope", "later,80")
    with pytest.raises(ClmoeError, match=r"general\.csv, row 2: 'later'"):
        group_runs(runs)


@pytest.mark.parametrize(
    ("seeds", "lasts", "winner"),
    [
        ((0, 1), (50.0, 44.0), ["high"]),  # last is 60 and 56, deviation 2.8, against 48 without any
        ((0, 1), (50.0, 20.0), []),  # 60 and 40: 50 +- 14 reaches down to 48
        ((0,), (50.0,), []),  # one seed cannot show how far seeds differ
    ],
)
def test_nobody_wins_within_the_spread(tmp_path: Path, seeds: Any, lasts: Any, winner: list[str]) -> None:
    runs = [make_run(tmp_path, "high", seed, last) for seed, last in zip(seeds, lasts, strict=True)]
    table = comparison_table(group_runs([*runs, *(make_run(tmp_path, "low", seed, 32.0) for seed in seeds)]))
    column = list(table.cells).index("last")
    assert [table.cells["label"][row] for row, place in table.best if place == column] == winner


def test_who_learned_nothing_does_not_win_by_forgetting_nothing(tmp_path: Path) -> None:
    """Two methods end at 60 and 40; a third always says "yes", which is right for half of the questions."""
    runs = [make_run(tmp_path, label, seed, last) for label, last in (("a", 50.0), ("b", 20.0)) for seed in (0, 1)]
    idle = [make_run(tmp_path, "idle", seed) for seed in (0, 1)]
    for run in idle:
        write(run / "matrix.csv", HEADER, "colour_letter,50,,", "count,50,50,", "box,50,50,50")
    for task in TASKS:
        predict(idle[0], "box", task, {"x": ("yes", 1.0)}, answer="yes")
        path = idle[0] / f"predictions/box/{task}.jsonl"
        path.write_text(path.read_text() + path.read_text().replace('"x"', '"y"').replace('"yes"', '"no"'))
    groups = group_runs([*runs, *idle])
    table = comparison_table(groups)
    best = {(table.cells["label"][row], list(table.cells)[column]) for row, column in table.best}
    assert row_of(table, "idle")["forgetting_max"] == "0.00 ± 0.00"
    assert ("a", "forgetting_max") in best and "idle" not in {label for label, _ in best}
    assert row_of(report_tables(groups)[3], "chance", tables.CHANCE)["mean"] == "50.00"
    assert plots.comparison(groups).legend.keys() == {"immediate", "last", "chance"}


def test_rows_that_are_not_alike_are_told(tmp_path: Path) -> None:
    """Differences come from run.json and from the settings in sequence.json or a checkpoint's configuration."""
    runs = [make_run(tmp_path, "a", 0), make_run(tmp_path, "b", 0, effective_scale=0.25, steps_per_task=200)]
    bound = make_run(tmp_path, "zero", 0, method="zero_shot", effective_scale=None, trainable_parameters=0)
    recorded = {"adapter": {"rank": 8, "targets": ["q", "v"]}, "training": {"learning_rate": 0.1}, "train": {"x": "7"}}
    write(runs[0] / "sequence.json", json.dumps(recorded | {"seed": 0, "order": TASKS}))
    (runs[1] / "01_count").mkdir()
    other = {"adapter": {"rank": 16, "rank_is": "per_expert", "targets": ["q", "v"]}, "train": {"x": "8"}}
    write(runs[1] / "01_count" / "config.yaml", json.dumps(other | {"training": {"learning_rate": 0.2}}))
    write(runs[0] / "events.jsonl", *(f'{{"event": "started", "commit": "{commit}"}}' for commit in ("c1", "c2", "c1")))
    groups = group_runs([*runs, bound])
    note = tables.alike_note(groups)
    for told in ("effective_scale 2.0 (a), 0.25 (b)", "steps_per_task 300 (a), 200 (b)", "rank 8 (a), 16 (b)",
                 "training.learning_rate 0.1 (a), 0.2 (b)"):  # fmt: skip
        assert told in note
    assert "zero" not in note and "projector" not in note
    assert (
        row_of(costs_table(groups), "b")["rank"] == "16 per expert"
        and row_of(costs_table(groups), "zero")["rank"] == BLANK
    )
    table = tables.settings_table(groups)
    assert list(table.cells["key"]) == ["commit", "adapter.rank", "training.learning_rate"]
    assert row_of(table, "commit")["a"] == "c1 c2" and row_of(table, "adapter.rank")["zero"] == BLANK
    write_report(runs, tmp_path / "out", ["md", "html"])
    assert all("rank 8 (a), 16 (b)" in (tmp_path / f"out/report.{ending}").read_text() for ending in ("md", "html"))
    assert tables.alike_note(group_runs([runs[0], bound])) == ""


def test_a_bound_is_never_the_best(tmp_path: Path) -> None:
    """The union of all tasks ends highest, but only methods that learn in sequence are compared."""
    lasts = {"bound": 90.0, "low": 20.0, "high": 50.0}
    kinds = {"bound": "multitask", "low": "lora", "high": "lora"}
    runs = [make_run(tmp_path, x, seed, lasts[x], method=kinds[x]) for x in kinds for seed in (0, 1)]
    table = comparison_table(group_runs(runs))
    last = list(table.cells).index("last")
    assert [table.cells["label"][row] for row, column in table.best if column == last] == ["high"]
    assert comparison_table(group_runs(runs[:4])).best == frozenset()


def test_costs(tmp_path: Path) -> None:
    runs = [*two_seeds(tmp_path), make_run(tmp_path, "other", 0, effective_scale=None, projector_trained=True)]
    write(runs[0] / "timing.json", '{"minutes": 4}')
    for run in runs[:2]:
        write_expansion(run, [{}, {layer(i): block([1.0, 0.5], 0.2, i) for i in range(3)}])
    write(runs[1] / "matrix.csv", HEADER, "colour_letter,80,,", "count,80,80,")  # unfinished: may still add some
    table = costs_table(group_runs(runs))
    moe, other = row_of(table, "moe"), row_of(table, "other")
    assert (moe["trainable_parameters"], moe["minutes"], moe["experts_added"]) == ("90,624", "4.0 (n=1)", "3 (n=1)")
    assert (moe["effective_scale"], moe["projector_trained"]) == ("2.0", "false")
    assert (other["effective_scale"], other["projector_trained"], other["minutes"]) == (BLANK, "true", BLANK)
    assert "peak_memory_mib" not in table.cells  # none was recorded


def test_scores_follow_task_names_when_seeds_have_other_orders(tmp_path: Path) -> None:
    groups = group_runs([make_run(tmp_path, "moe", 0, 50.0), make_run(tmp_path, "moe", 1, 30.0, order=TASKS[::-1])])
    row = row_of(report_tables(groups)[3], "moe", "last")
    # colour_letter ends at 50 in the first order and, trained last, at 80 in the other.
    assert (row["colour_letter"], row["count"]) == ("65.00 ± 21.21", "40.00 ± 14.14")
    assert row["mean"] == "53.33 ± 9.43"  # of 60 and 140 / 3
    assert list(mean_matrices(groups)) == ["moe, seed 0", "moe, seed 1"]


def test_rows_of_the_bounds(tmp_path: Path) -> None:
    """Training on all tasks at once gives no row right after each; the page says how each bound was made."""
    runs = [make_run(tmp_path, name, 0, method=name) for name in ("separate", "multitask", "zero_shot")]
    write(runs[0] / "matrix.csv", HEADER, "colour_letter,80,,", "count,80,70,", "box,80,70,90")
    write(runs[1] / "matrix.csv", HEADER, "box,70,80,90")
    write(runs[2] / "matrix.csv", HEADER, "zero_shot,10,20,30")
    table = report_tables(group_runs(runs))[3].cells
    found = [f"{row.label} {row.row} {row.mean}" for row in table.itertuples()]
    ends = ["separate immediate 80.00", "separate last 80.00", "multitask last 80.00"]
    assert found == [*ends, "zero_shot zero_shot 20.00", f"zero_shot last {BLANK}"]
    (path,) = write_report(runs, tmp_path / "out", ["html"])
    assert all(note in path.read_text() for note in ("; a fresh adapter", "; all tasks at once", "; untrained"))


def test_mean_matrices_leave_a_cell_blank_that_a_seed_lacks(tmp_path: Path) -> None:
    runs = two_seeds(tmp_path)
    (found,) = mean_matrices(group_runs(runs)).values()
    assert found.loc["box"].tolist() == [47, 47, 80] and pd.isna(found.loc["count", "box"])
    write(runs[0] / "matrix.csv", HEADER, "colour_letter,80,,", "count,,80,")
    ((title, found),) = mean_matrices(group_runs(runs)).items()
    assert title == "moe (mean of 2 seeds)" and list(found.index) == ["colour_letter", "count"]  # one lacks row box
    assert found.loc["count"].tolist()[1] == 80 and pd.isna(found.loc["count", "colour_letter"])


def test_locator_accuracy_by_task_and_overall(tmp_path: Path) -> None:
    runs = [located_run(tmp_path, 0, 9), located_run(tmp_path, 1, 3, TASKS[::-1]), make_run(tmp_path, "plain", 0)]
    table = report_tables(group_runs(runs))[4]
    assert list(table.cells["label"]) == ["moe"]
    row = row_of(table, "moe", "vae")
    assert row["colour_letter"] == "60.00 ± 42.43"  # 90 and 30
    assert (row["count"], row["box"]) == ("75.00 ± 0.00", "100.00 ± 0.00")
    assert row["overall"] == "85.00 ± 7.07"  # 54 and 48 of 60 questions, not a mean of tasks
    found = tables.located_frame(group_runs(runs[:1])).set_index(["task", "located"])["value"]
    assert found["colour_letter"].to_dict() == {"colour_letter": 90, "count": 0, "box": 10}


def test_a_row_per_locator_and_blanks_for_what_was_not_asked(tmp_path: Path) -> None:
    lines = ["box,own,colour_letter,box,4", "box,vae,box,box,2", "box,vae,box,count,1", "box,vae,count,count,0"]
    run = write(make_run(tmp_path, "moe", 0) / "locator.csv", LOCATED, *lines)
    table = report_tables(group_runs([run, make_run(tmp_path, "moe", 1)]))[4]
    assert list(table.cells["locator"]) == ["own", "vae"]
    vae = row_of(table, "moe", "vae")
    assert vae["box"] == "66.67 (n=1)" and "count" not in vae and "overall" not in vae  # never of some tasks only
    assert row_of(table, "moe", "own")["colour_letter"] == "0.00 (n=1)"


def test_markdown_and_latex_mark_the_best_and_escape(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, label, s, last) for label, last in (("a|b_50%", 50.0), ("plain", 40.0)) for s in (0, 1)]
    write_report(runs, tmp_path / "out", ["md", "tex"])
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    markdown = [line for line in text.split("### ")[1].splitlines() if line.startswith("|")]
    assert len(markdown) == 4 and len({line.replace("\\|", "").count("|") for line in markdown}) == 1
    assert markdown[2].startswith("| a\\|b_50% | 2 | **60.00 ± 0.00** |")
    latex = (tmp_path / "out/report.tex").read_text(encoding="utf-8").split("\n\n")[0]
    assert r"a|b\_50\% & 2 & \textbf{60.00 $\pm$ 0.00} &" in latex and r"plain & 2 & 53.33 $\pm$ 0.00 &" in latex
    assert all(latex.count(part) == latex.count(r"\begin{table}") for part in ("toprule", "midrule", r"{tabular}}"))
    assert latex.count("{") == latex.count("}")
    assert r"58.00 $\pm$ 2.83" in tables.to_latex(comparison_table(group_runs(two_seeds(tmp_path))))


def test_terminal_tables_fit_and_lose_nothing(tmp_path: Path) -> None:
    width = 80
    runs = [make_run(tmp_path, f"variant_with_a_long_name_{i}", s, 40.0 + s) for i in range(3) for s in range(2)]
    text = tables.report_text(runs, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for table in report_tables(group_runs(runs)):
        shown = tables.to_text(table, width)
        assert shown in text or table.cells.empty
        assert all(cell in shown for row in table.cells.itertuples(index=False) for cell in row)
        assert all(name in shown for name in table.cells.columns[table.keys :])


def test_a_limit_is_said_of_the_rows_that_it_holds_for(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, label, 0, limit=limit) for label, limit in (("a", 7), ("b", None), ("c", 7), ("d", 9))]
    joint = make_run(tmp_path, "joint", 0, limit=7)  # has no row before the last
    others = [make_run(tmp_path, "older", 0), write(joint / "matrix.csv", HEADER, "box,70,80,90")]
    said = tables.limit_note(group_runs([*runs, *others]))
    first, second = said.split(" d: ")
    assert first.startswith("a, c: ") and " 7 " in first and " 9 " in second
    assert said in " ".join(tables.report_text([*runs, *others]).split())
    write_report([*runs, *others], tmp_path / "out", ["md", "html"])
    assert all(said in (tmp_path / f"out/report.{ending}").read_text() for ending in ("md", "html"))
    assert tables.limit_note(group_runs(others)) == ""


def test_what_a_row_spent_stands_beside_its_scores_and_its_trials_in_a_table(tmp_path: Path) -> None:
    runs = two_seeds(tmp_path)
    spent = {"active_parameters": 30_208, "stored_bytes": 12_345_678, "stored_samples": 0, "training_flops": None}
    for run, question in zip(runs, (2e12, 4e12), strict=True):
        write(run / "spent.json", json.dumps(spent | {"question_flops": question}))
    trials = [
        {"settings": {"options.beta": beta}, "last": {"100": last}, "mean": last} for beta, last in ((0, 5), (1, 7.5))
    ]
    tuned = {"method": "moelora", "order": ["box", "count"], "trials": trials, "chosen": {"options.beta": 1}}
    write(runs[1] / "tuned.json", json.dumps(tuned))  # seed 0, the first
    groups = group_runs([*runs, make_run(tmp_path, "older", 0)])
    moe, older = (row_of(tables.spent_table(groups), label) for label in ("moe", "older"))
    assert (moe["adapter_parameters"], moe["active_parameters"], moe["stored_bytes"]) == ("120,000", "30,208", "12.3 M")
    assert (moe["stored_samples"], moe["question_flops"]) == ("0", "3.0 T ± 1.4 T")
    assert "training_flops" not in moe and older["adapter_parameters"] == "120,000"
    assert older["active_parameters"] == BLANK
    assert [table.title for table in report_tables(groups)[:2]] == ["Comparison", "What a row keeps and computes"]
    assert not {*list(moe)[1:]} & {*comparison_table(groups).cells}
    table = tables.tuned_table(tables.tuned_frame(groups))
    assert table.cells.to_numpy().tolist() == [
        ["moe", "beta=0", "5.00", "", "box count"],
        ["moe", "beta=1", "7.50", "chosen", "box count"],
    ]
    assert "beta=1" in tables.report_text(runs)
    write_report(runs, tmp_path / "out", ["md", "csv", "html"])
    assert all("beta=1" in (tmp_path / "out" / name).read_text() for name in ("report.md", "tuned.csv", "report.html"))
    write(runs[0] / "spent.json", "[1]")
    with pytest.raises(ClmoeError, match=r"spent\.json"):
        group_runs(runs)


def test_a_count_is_whole_or_in_its_largest_unit() -> None:
    counts = (0, 90_624, 9_999_999, 10_000_000, 959_403_000, 1_102_500_000, 8_759_100_000_000, 2.5e15)
    shown = ["0", "90,624", "9,999,999", "10.0 M", "959.4 M", "1.1 G", "8.8 T", "2.5 P"]
    assert list(map(tables.show_count, counts)) == shown
