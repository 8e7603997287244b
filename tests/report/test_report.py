"""Reports made from invented run folders: grouping, every format, pictures, and errors."""

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from clmoe.errors import ClmoeError
from clmoe.report.run import group_runs, read_run
from clmoe.report.tables import BLANK, comparison_table, task_table, to_latex, to_markdown, to_text
from clmoe.report.write import report_text, write_report
from tests.report.folders import TASKS, make_run, row_of


def test_comparison_averages_over_seeds(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "moe", seed, last) for seed, last in ((1, 50.0), (0, 44.0))]
    (runs[0] / "timing.json").write_text('{"minutes": 4}')
    groups = group_runs([*runs, make_run(tmp_path, "other", 0, 20.0, True, effective_scale=None)])
    assert [(group.label, group.seeds) for group in groups] == [("moe", (0, 1)), ("other", (0,))]
    table = comparison_table(groups)
    moe, other = row_of(table, "moe"), row_of(table, "other")
    # last: 60 and 56; mean 58, sample std 4 / sqrt(2) = 2.83. bwt_n: -20 and -24.
    assert moe["last"] == "58.00 ± 2.83"
    assert moe["bwt_n"] == "-22.00 ± 2.83"
    assert moe["immediate"] == "80.00 ± 0.00"
    assert moe["minutes"] == "4.0 (n=1)"
    assert (moe["trainable parameters"], moe["scale"], moe["projector"]) == ("90,624", "2", "frozen")
    assert (moe["immediate_known"], other["scale"]) == (BLANK, BLANK)
    assert other["immediate_known"] == "82.00"
    assert other["bwt_known"] == "-42.00"  # (20 - 81 + 20 - 82 + 80 - 83) / 3
    best = {(table.rows[r][0], table.header[c]) for r, c in table.best}
    assert ("moe", "last") in best
    assert ("moe", "forgetting_max") in best
    assert ("other", "last") not in best
    assert {("moe", "immediate"), ("other", "immediate")} <= best  # a tie is shared


def test_a_bound_is_never_the_best(tmp_path: Path) -> None:
    """The union of all tasks ends highest, but only what learns in sequence is compared."""
    runs = [make_run(tmp_path, "bound", 0, 90.0, method="multitask")]
    runs += [make_run(tmp_path, label, 0, last) for label, last in (("low", 20.0), ("high", 50.0))]
    table = comparison_table(group_runs(runs))
    assert {table.rows[r][0] for r, c in table.best if table.header[c] == "last"} == {"high"}
    assert comparison_table(group_runs(runs[:2])).best == frozenset()


def test_task_table_follows_names_when_seeds_have_other_orders(tmp_path: Path) -> None:
    groups = group_runs([make_run(tmp_path, "moe", 0, 50.0), make_run(tmp_path, "moe", 1, 30.0, order=TASKS[::-1])])
    row = row_of(task_table(groups), "moe", "last")
    # colour_letter ends at 50 in the first order and, trained last, at 80 in the other.
    assert row["colour_letter"] == "65.00 ± 21.21"
    assert row["count"] == "40.00 ± 14.14"
    assert row["mean"] == "53.33 ± 9.43"  # of 60 and 140 / 3


def test_rows_that_a_method_cannot_have_are_left_out(tmp_path: Path) -> None:
    """Adapters of one task each have no last row; all tasks at once have no row right after each."""
    apart, joint = make_run(tmp_path, "apart", 0, method="separate"), make_run(tmp_path, "joint", 0, method="multitask")
    (apart / "matrix.csv").write_text("after,colour_letter,count,box\ncolour_letter,80,,\ncount,,70,\nbox,,,90\n")
    (joint / "matrix.csv").write_text("after,colour_letter,count,box\nbox,70,80,90\n")
    table = task_table(group_runs([apart, joint]))
    assert [row[:2] for row in table.rows] == [("apart", "immediate"), ("joint", "last")]


def test_markdown_and_latex_mark_the_best_and_escape(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "a|b_50%", 0), make_run(tmp_path, "plain", 0, 40.0)]
    table = comparison_table(group_runs(runs))
    markdown = to_markdown(table).splitlines()
    assert len({line.replace("\\|", "").count("|") for line in markdown}) == 1
    assert markdown[2].startswith("| a\\|b_50% | 1 | **60.00** |")
    latex = to_latex(table)
    assert r"a|b\_50\% & 1 & \textbf{60.00} &" in latex
    assert r"plain & 1 & 53.33 &" in latex
    for rule in ("toprule", "midrule", "bottomrule"):
        assert latex.count(rule) == 1


@pytest.mark.parametrize("width", [100, 60])
def test_terminal_tables_fit_and_lose_nothing(tmp_path: Path, width: int) -> None:
    runs = [make_run(tmp_path, f"variant_with_a_long_name_{i}", s, 40.0 + s) for i in range(3) for s in range(2)]
    text = report_text(runs, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for table in (comparison_table(group_runs(runs)), task_table(group_runs(runs))):
        shown = to_text(table, width)
        for row in table.rows:
            for cell in row[table.keys :]:
                assert all(part in shown for part in cell.split(" ± "))
    assert "\x1b[" not in text
    assert "\x1b[" in report_text(runs, width, colour=True)


def test_csv_files_hold_raw_numbers(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "moe", seed, last) for seed, last in ((0, 50.0), (1, 44.0))]
    write_report(runs, tmp_path / "out", ["csv"])
    (row,) = csv.DictReader((tmp_path / "out/report.csv").open())
    assert (row["label"], row["seeds"], row["scoring"]) == ("moe", "0 1", "fixed")
    assert float(row["last"]) == 58.0
    assert float(row["last_std"]) == pytest.approx(8**0.5, rel=1e-8)
    assert (row["immediate_known"], row["trainable_parameters"]) == ("", "90624")
    tasks = list(csv.DictReader((tmp_path / "out/tasks.csv").open()))
    assert {(line["row"], line["task"]) for line in tasks} == {
        (kind, task) for kind in ("immediate", "last") for task in TASKS
    }
    assert {line["n"] for line in tasks} == {"2"}


def test_report_files_pictures_and_same_bytes_again(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "moe/x", seed) for seed in (0, 1)]
    runs += [make_run(tmp_path, "moe-x", 0, 30.0, scoring="fixed")]
    paths = write_report(runs, tmp_path / "one", ["md", "csv", "tex"])
    names = {path.name for path in paths}
    assert names == {path.name for path in (tmp_path / "one").iterdir()}
    assert names >= {"report.md", "report.csv", "tasks.csv", "report.tex", "comparison.png", "forgetting.png"}
    assert {name for name in names if name.startswith("matrix")} == {
        "matrix-moe-x-seed0.png",
        "matrix-moe-x-seed0-2.png",
        "matrix-moe-x-seed1.png",
    }
    text = (tmp_path / "one/report.md").read_text(encoding="utf-8")
    assert all(f"]({name})" in text for name in names if name.endswith(".png"))
    assert "scoring mode `fixed`" in text
    write_report(runs, tmp_path / "two", ["md", "csv", "tex"])
    for path in paths:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_limit_is_said_below_the_tables_of_the_rows_that_it_holds_for(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, label, 0, limit=limit) for label, limit in (("a", 7), ("b", None), ("c", 7), ("d", 9))]
    older = make_run(tmp_path, "older", 0)  # does not record it
    joint = make_run(tmp_path, "joint", 0, limit=7)  # has no row before the last
    (joint / "matrix.csv").write_text("after,colour_letter,count,box\nbox,70,80,90\n")
    said = (
        "a, c: rows before the last are over a sample of 7 test questions per task, the last row is over all. "
        "d: rows before the last are over a sample of 9 test questions per task, the last row is over all."
    )
    assert " ".join(report_text([*runs, older, joint]).split()).endswith(said)
    write_report([*runs, older, joint], tmp_path / "out", ["md", "csv", "html"])
    assert f"\n{said}\n" in (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert f'"limit":"{said}"' in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    rows = csv.DictReader((tmp_path / "out/report.csv").open())
    assert [row["limit"] for row in rows] == ["7", "", "7", "9", "", "7"]
    assert "sample of" not in report_text([older, joint])


def test_heat_map_draws_scores_and_leaves_blanks_grey(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0, last=0.0)
    write_report([run], tmp_path / "out", ["md"])
    image = matplotlib.image.imread(tmp_path / "out/matrix-moe-seed0.png")[..., :3]

    def share(red: float, green: float, blue: float) -> float:
        return float((abs(image - [red, green, blue]).max(axis=2) < 0.004).mean())

    cells = image.shape[0] * image.shape[1]
    assert cells > 100_000
    grey, pale = share(*[0xD9 / 255] * 3), share(1.0, 1.0, 0xD9 / 255)
    assert grey > 0.05  # three cells above the diagonal
    assert grey / 3 == pytest.approx(pale / 2, rel=0.15)  # two cells score 0, minus their digits


def test_unfinished_and_last_row_only_runs_are_drawn(tmp_path: Path) -> None:
    unfinished = make_run(tmp_path, "unfinished", 0)
    (unfinished / "matrix.csv").write_text("after,colour_letter,count,box\n")
    joint = make_run(tmp_path, "multitask", 0)
    (joint / "matrix.csv").write_text("after,colour_letter,count,box\nbox,70,80,90\n")
    write_report([unfinished, joint], tmp_path / "out", ["md"])
    table = task_table(group_runs([unfinished, joint]))
    assert [row[:2] for row in table.rows] == [("unfinished", "last"), ("multitask", "last")]
    assert row_of(table, "unfinished", "last")["mean"] == BLANK
    assert row_of(comparison_table(group_runs([joint])), "multitask")["last"] == "80.00"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", "0", "field 'seed' is '0'; expected int"),
        ("seed", True, "field 'seed' is True; expected int"),
        ("effective_scale", "2", "expected int or float or null"),
        ("order", [1, 2, 3], "field 'order' must be a list of task names"),
        ("scoring", "oficial", "allowed: fixed, official"),
    ],
)
def test_malformed_run_json_is_named(tmp_path: Path, field: str, value: Any, message: str) -> None:
    run = make_run(tmp_path, "moe", 0)
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {field: value}))
    with pytest.raises(ClmoeError, match=r"run\.json") as error:
        read_run(run)
    assert message in str(error.value)


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    with pytest.raises(ClmoeError, match=r"run\.json is missing"):
        read_run(tmp_path)
    run = make_run(tmp_path, "moe", 0)
    (run / "run.json").write_text(json.dumps({"method": "x"}))
    with pytest.raises(ClmoeError, match="field 'benchmark' is missing"):
        read_run(run)
    other = make_run(tmp_path, "moe", 1)
    (other / "matrix.csv").write_text("after,count,colour_letter,box\n")
    with pytest.raises(ClmoeError, match=r"are not the order in run\.json"):
        read_run(other)


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    first = make_run(tmp_path / "x", "moe", 0)
    with pytest.raises(ClmoeError, match="both hold moe, seed 0"):
        group_runs([first, make_run(tmp_path / "y", "moe", 0)])
    for field, value in (("benchmark", "coin"), ("scoring", "official"), ("order", ["a", "b", "c"])):
        other = make_run(tmp_path / field, "other", 0, **{field: value})
        with pytest.raises(ClmoeError, match=field if field != "order" else "tasks"):
            group_runs([first, other])
    with pytest.raises(ClmoeError, match="no run folder"):
        group_runs([])
    with pytest.raises(ClmoeError, match="did you mean 'md'"):
        write_report([first], tmp_path / "out", ["mdd"])
