"""The report of the task locator, from invented run folders."""

import csv
from pathlib import Path
from typing import Any

import pytest

from clmoe.errors import ClmoeError
from clmoe.report import location_plots
from clmoe.report.location import confusion_percent, locator_table
from clmoe.report.run import group_runs, read_run
from clmoe.report.tables import BLANK
from clmoe.report.write import report_text, write_report
from tests.report.folders import TASKS, make_run, row_of

HEADER = "after,decider,task,located,count"
BOX_ONLY = "box,vae,box,box,4"


def write_located(run: Path, *rows: str) -> Path:
    (run / "locator.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    return run


def located_run(root: Path, label: str, seed: int, right: int) -> Path:
    """Of 10 `colour_letter` questions `right` are located, the others taken for `box`; count 15/20, box 30/30."""
    return write_located(
        make_run(root, label, seed),
        "colour_letter,vae,colour_letter,colour_letter,10",
        "count,vae,colour_letter,count,10",  # an earlier stage, not shown
        f"box,vae,colour_letter,colour_letter,{right}",
        f"box,vae,colour_letter,box,{10 - right}",
        "box,vae,count,count,15",
        "box,vae,count,colour_letter,5",
        "box,vae,box,box,30",
    )


def test_accuracy_by_task_and_overall(tmp_path: Path) -> None:
    runs = [located_run(tmp_path, "moe", 0, 9), located_run(tmp_path, "moe", 1, 3)]
    runs += [make_run(tmp_path, "plain", 0)]
    table = locator_table(group_runs(runs))
    assert [row[:2] for row in table.rows] == [("moe", "VAE bank")]
    row = row_of(table, "moe")
    assert row["colour_letter"] == "60.00 ± 42.43"  # 90 and 30
    assert (row["count"], row["box"]) == ("75.00 ± 0.00", "100.00 ± 0.00")
    assert row["overall"] == "85.00 ± 7.07"  # 54 and 48 of 60 questions, not a mean of tasks


def test_end_is_each_runs_own_last_task(tmp_path: Path) -> None:
    first = located_run(tmp_path, "moe", 0, 9)
    other = make_run(tmp_path, "moe", 1, order=TASKS[::-1])
    rows = [f"colour_letter,vae,{task},{task},5" for task in TASKS]
    write_located(other, "box,vae,box,box,1", "box,vae,count,box,7", *rows)
    row = row_of(locator_table(group_runs([first, other])), "moe")
    assert row["count"] == "87.50 ± 17.68"  # 75 and 100
    assert row["colour_letter"] == "95.00 ± 7.07"


def test_a_row_per_decider_and_blanks_for_what_was_not_asked(tmp_path: Path) -> None:
    run = write_located(
        make_run(tmp_path, "moe", 0),
        "box,prototype,colour_letter,box,4",
        "box,vae,box,box,2",
        "box,vae,box,count,1",
        "box,vae,count,count,0",
    )
    runs = [run, make_run(tmp_path, "moe", 1), write_located(make_run(tmp_path, "early", 0), "count,vae,count,count,5")]
    table = locator_table(group_runs(runs))
    assert [row[:2] for row in table.rows] == [("moe", "VAE bank"), ("moe", "nearest class mean")]
    assert row_of(table, "moe", "VAE bank")["box"] == "66.67 (n=1)"
    assert row_of(table, "moe", "VAE bank")["count"] == BLANK  # no question
    assert row_of(table, "moe", "VAE bank")["overall"] == BLANK  # of some tasks only
    assert row_of(table, "moe", "nearest class mean")["colour_letter"] == "0.00 (n=1)"


def test_files_of_every_format(tmp_path: Path) -> None:
    runs = [located_run(tmp_path, "moe x", 0, 9), located_run(tmp_path, "moe x", 1, 3), make_run(tmp_path, "plain", 0)]
    paths = write_report(runs, tmp_path / "out", ["md", "csv", "tex"])
    assert {path.name for path in paths if path.name.startswith("locator")} == {"locator.csv", "locator-moe-x.png"}
    lines = list(csv.DictReader((tmp_path / "out/locator.csv").open()))
    assert [(line["decider"], line["task"], line["n"]) for line in lines] == [
        ("vae", task, "2") for task in (*TASKS, "overall")
    ]
    assert [float(line["mean"]) for line in lines] == [60, 75, 100, 85]
    assert float(lines[3]["std"]) == pytest.approx(5 * 2**0.5)
    markdown = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "| moe x | VAE bank | 60.00 ± 42.43 | 75.00 ± 0.00 | 100.00 ± 0.00 | 85.00 ± 7.07 |" in markdown
    assert "](locator-moe-x.png)" in markdown
    assert r"85.00 $\pm$ 7.07" in (tmp_path / "out/report.tex").read_text(encoding="utf-8")
    assert "Task locator" in report_text(runs)
    write_report(runs, tmp_path / "two", ["md"])
    assert (tmp_path / "out/locator-moe-x.png").read_bytes() == (tmp_path / "two/locator-moe-x.png").read_bytes()


def test_confusion_map_is_the_mean_of_the_rows_in_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [located_run(tmp_path, "moe", 0, 9), located_run(tmp_path, "moe", 1, 3)]
    with (runs[0] / "locator.csv").open("a") as stream:
        stream.write("box,prototype,count,box,1\nbox,prototype,count,count,3\n")
    figures: list[Any] = []
    monkeypatch.setattr(location_plots, "save", lambda figure, path: figures.append(figure))
    location_plots.confusion_map(group_runs(runs)[0], TASKS, tmp_path / "x.png")
    vae, prototype, _ = figures[0].axes  # the third is the colour bar
    assert [ax.get_title(loc="left") for ax in (vae, prototype)] == [
        "VAE bank (mean of 2 seeds)",
        "nearest class mean",
    ]
    shown = [{text.get_position(): text.get_text() for text in ax.texts if text.get_text()} for ax in (vae, prototype)]
    # (column, row): the row is the true task.
    assert shown[0] == {(0, 0): "60.0", (2, 0): "40.0", (0, 1): "25.0", (1, 1): "75.0", (2, 2): "100.0"}
    assert shown[1] == {(1, 1): "75.0", (2, 1): "25.0"}
    grey = [patch for patch in prototype.patches if patch.get_facecolor()[:3] == pytest.approx((0xD9 / 255,) * 3)]
    assert len(grey) == 6  # two tasks of which nothing was asked


def test_confusion_of_a_task_that_one_seed_did_not_ask_is_grey(tmp_path: Path) -> None:
    (group,) = group_runs([located_run(tmp_path, "moe", 0, 9), write_located(make_run(tmp_path, "moe", 1), BOX_ONLY)])
    assert confusion_percent(group, "vae", "box", "box") == 100
    assert confusion_percent(group, "vae", "box", "count") == 0
    assert confusion_percent(group, "vae", "count", "count") is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("box,vea,box,box,1", "row 3, column 'decider': 'vea' is none of vae, prototype"),
        ("bix,vae,box,box,1", "row 3, column 'after': 'bix' is none of colour_letter, count, box"),
        ("box,vae,bix,box,1", "row 3, column 'task': 'bix'"),
        ("box,vae,box,bix,1", "row 3, column 'located': 'bix'"),
        ("box,vae,box,count,1e3", "row 3, column 'count': '1e3' is not a whole number"),
        ("box,vae,box,box,1", "row 3: second row for box,vae,box,box; remove one"),
        ("box,vae,box,box", "row 3: 4 cells for the 5 columns"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, row: str, message: str) -> None:
    run = write_located(make_run(tmp_path, "moe", 0), "box,vae,box,box,2", row)
    with pytest.raises(ClmoeError, match=r"locator\.csv") as error:
        read_run(run)
    assert message in str(error.value)
