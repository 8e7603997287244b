"""The tables: means and deviations over seeds, and what each rendering makes of them."""

from pathlib import Path

import pandas as pd

from clmoe.report import tables
from clmoe.report.page import write_report
from clmoe.report.runs import group_runs
from clmoe.report.tables import BLANK, comparison_table, costs_table, mean_matrices, report_tables
from tests.report.folders import TASKS, block, layer, make_run, row_of, write, write_expansion

HEADER, LOCATED = "after,colour_letter,count,box", "after,locator,task,located,count"


def two_seeds(root: Path) -> list[Path]:
    return [make_run(root, "moe", seed, last) for seed, last in ((1, 50.0), (0, 44.0))]


def located_run(root: Path, seed: int, right: int, order: list[str] = TASKS) -> Path:
    """Of 10 `colour_letter` questions `right` are located, the others taken for `box`; count 15/20, box 30/30."""
    run, end = make_run(root, "moe", seed, order=order), order[-1]
    earlier = "count,vae,count,count,10"  # not shown
    counts = [f"colour_letter,colour_letter,{right}", f"colour_letter,box,{10 - right}"]
    counts += ["count,count,15", "count,colour_letter,5", "box,box,30"]
    return write(run / "locator.csv", LOCATED, earlier, *(f"{end},vae,{line}" for line in counts))


def test_comparison_averages_over_seeds(tmp_path: Path) -> None:
    table = comparison_table(group_runs([*two_seeds(tmp_path), make_run(tmp_path, "other", 0, 20.0, True)]))
    moe, other = row_of(table, "moe"), row_of(table, "other")
    # last: 60 and 56; mean 58, sample deviation 4 / sqrt(2) = 2.83. bwt_n: -20 and -24.
    assert (moe["seeds"], moe["last"], moe["bwt_n"]) == ("2", "58.00 ± 2.83", "-22.00 ± 2.83")
    assert (moe["immediate"], moe["immediate_known"]) == ("80.00 ± 0.00", BLANK)
    assert (other["immediate_known"], other["bwt_known"]) == ("82.00", "-42.00")  # (20 - 81 + 20 - 82 + 80 - 83) / 3
    best = {(table.cells["label"][row], list(table.cells)[column]) for row, column in table.best}
    assert {("moe", "last"), ("moe", "forgetting_max"), ("moe", "immediate"), ("other", "immediate")} <= best
    assert ("other", "last") not in best


def test_a_bound_is_never_the_best(tmp_path: Path) -> None:
    """The union of all tasks ends highest, but only what learns in sequence is compared."""
    runs = [make_run(tmp_path, "bound", 0, 90.0, method="multitask")]
    runs += [make_run(tmp_path, label, 0, last) for label, last in (("low", 20.0), ("high", 50.0))]
    table = comparison_table(group_runs(runs))
    last = list(table.cells).index("last")
    assert [table.cells["label"][row] for row, column in table.best if column == last] == ["high"]
    assert comparison_table(group_runs(runs[:2])).best == frozenset()


def test_costs(tmp_path: Path) -> None:
    runs = [*two_seeds(tmp_path), make_run(tmp_path, "other", 0, effective_scale=None, projector_trained=True)]
    write(runs[0] / "timing.json", '{"minutes": 4}')
    for run in runs[:2]:
        write_expansion(run, [{}, {layer(i): block([1.0, 0.5], 0.2, i) for i in range(3)}])
    write(runs[1] / "matrix.csv", HEADER, "colour_letter,80,,", "count,80,80,")  # unfinished: may yet add experts
    table = costs_table(group_runs(runs))
    moe, other = row_of(table, "moe"), row_of(table, "other")
    assert (moe["trainable_parameters"], moe["minutes"], moe["experts_added"]) == ("90,624", "4.0 (n=1)", "3 (n=1)")
    assert (moe["effective_scale"], moe["projector_trained"]) == ("2.0", "false")
    assert (other["effective_scale"], other["projector_trained"], other["minutes"]) == (BLANK, "true", BLANK)
    assert "peak_memory_mib" not in table.cells  # none was recorded


def test_scores_follow_task_names_when_seeds_have_other_orders(tmp_path: Path) -> None:
    groups = group_runs([make_run(tmp_path, "moe", 0, 50.0), make_run(tmp_path, "moe", 1, 30.0, order=TASKS[::-1])])
    row = row_of(report_tables(groups)[2], "moe", "last")
    # colour_letter ends at 50 in the first order and, trained last, at 80 in the other.
    assert (row["colour_letter"], row["count"]) == ("65.00 ± 21.21", "40.00 ± 14.14")
    assert row["mean"] == "53.33 ± 9.43"  # of 60 and 140 / 3
    assert list(mean_matrices(groups)) == ["moe, seed 0", "moe, seed 1"]


def test_rows_of_the_bounds(tmp_path: Path) -> None:
    """All tasks at once have no row right after each; the page tells how each bound was made."""
    runs = [make_run(tmp_path, name, 0, method=name) for name in ("separate", "multitask", "zero_shot")]
    write(runs[0] / "matrix.csv", HEADER, "colour_letter,80,,", "count,80,70,", "box,80,70,90")
    write(runs[1] / "matrix.csv", HEADER, "box,70,80,90")
    write(runs[2] / "matrix.csv", HEADER, "zero_shot,10,20,30")
    table = report_tables(group_runs(runs))[2].cells
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
    assert title == "moe (mean of 2 seeds)" and list(found.index) == ["colour_letter", "count"]  # one has no row box
    assert found.loc["count"].tolist()[1] == 80 and pd.isna(found.loc["count", "colour_letter"])


def test_locator_accuracy_by_task_and_overall(tmp_path: Path) -> None:
    runs = [located_run(tmp_path, 0, 9), located_run(tmp_path, 1, 3, TASKS[::-1]), make_run(tmp_path, "plain", 0)]
    table = report_tables(group_runs(runs))[3]
    assert list(table.cells["label"]) == ["moe"]
    row = row_of(table, "moe", "VAE bank")
    assert row["colour_letter"] == "60.00 ± 42.43"  # 90 and 30
    assert (row["count"], row["box"]) == ("75.00 ± 0.00", "100.00 ± 0.00")
    assert row["overall"] == "85.00 ± 7.07"  # 54 and 48 of 60 questions, not a mean of tasks
    found = tables.located_frame(group_runs(runs[:1])).set_index(["task", "located"])["value"]
    assert found["colour_letter"].to_dict() == {"colour_letter": 90, "count": 0, "box": 10}


def test_a_row_per_locator_and_blanks_for_what_was_not_asked(tmp_path: Path) -> None:
    lines = ["box,own,colour_letter,box,4", "box,vae,box,box,2", "box,vae,box,count,1", "box,vae,count,count,0"]
    run = write(make_run(tmp_path, "moe", 0) / "locator.csv", LOCATED, *lines)
    table = report_tables(group_runs([run, make_run(tmp_path, "moe", 1)]))[3]
    assert list(table.cells["locator"]) == ["own", "VAE bank"]
    vae = row_of(table, "moe", "VAE bank")
    assert vae["box"] == "66.67 (n=1)" and "count" not in vae and "overall" not in vae  # not of some tasks only
    assert row_of(table, "moe", "own")["colour_letter"] == "0.00 (n=1)"


def test_markdown_and_latex_mark_the_best_and_escape(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "a|b_50%", 0), make_run(tmp_path, "plain", 0, 40.0)]
    write_report(runs, tmp_path / "out", ["md", "tex"])
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    markdown = [line for line in text.split("### ")[1].splitlines() if line.startswith("|")]
    assert len(markdown) == 4 and len({line.replace("\\|", "").count("|") for line in markdown}) == 1
    assert markdown[2].startswith("| a\\|b_50% | 1 | **60.00** |")
    latex = (tmp_path / "out/report.tex").read_text(encoding="utf-8").split("\n\n")[0]
    assert r"a|b\_50\% & 1 & \textbf{60.00} &" in latex and r"plain & 1 & 53.33 &" in latex
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
