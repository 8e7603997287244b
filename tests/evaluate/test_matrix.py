"""Metrics against numbers worked out by hand and against published tables; errors in CSV files."""

import re
from pathlib import Path

import pytest

from clmoe.errors import ClmoeError
from clmoe.evaluate.matrix import (
    METRICS,
    AccuracyMatrix,
    metrics,
    metrics_from_files,
    read_immediate_csv,
    write_table,
)

TASKS = ("a", "b", "c")
#            a    b    c
ROWS = {
    "zero_shot": (10.0, 20.0, 30.0),
    "a": (80.0, 26.0, None),
    "b": (90.0, 70.0, 34.0),
    "c": (50.0, 60.0, 100.0),
}


def test_all_metrics_by_hand() -> None:
    result = metrics(AccuracyMatrix(TASKS, ROWS), (84.0, 72.0, 99.0))
    assert tuple(result) == METRICS
    expected = {
        "last": 70.0,  # (50 + 60 + 100) / 3
        "immediate": 250 / 3,  # (80 + 70 + 100) / 3
        "maa": (80 + 80 + 70) / 3,  # 80; (90 + 70) / 2; 70
        "bwt_n": -40 / 3,  # (50 - 80 + 60 - 70) / 3
        "bwt_n_minus_1": -20.0,  # the same sum / 2
        "forgetting_max": 25.0,  # (90 - 50 + 70 - 60) / 2
        "fwt_n_minus_1": 5.0,  # (26 - 20 + 34 - 30) / 2
        "immediate_known": 85.0,
        "bwt_known": -15.0,  # (50 - 84 + 60 - 72 + 100 - 99) / 3
    }
    assert result == pytest.approx(expected, abs=1e-12)


def test_single_task_and_one_that_improved_to_the_end() -> None:
    assert metrics(AccuracyMatrix(("a", "b"), {"a": (40.0, None), "b": (50.0, 60.0)}))["forgetting_max"] == -10
    result = metrics(AccuracyMatrix(("a",), {"zero_shot": (5.0,), "a": (40.0,)}))
    assert (result["last"], result["immediate"], result["maa"], result["bwt_n"]) == (40.0, 40.0, 40.0, 0.0)
    for name in ("bwt_n_minus_1", "forgetting_max", "fwt_n_minus_1", "immediate_known", "bwt_known"):
        assert result[name] is None


@pytest.mark.parametrize(
    ("after", "task", "lost"),
    [
        ("a", "c", set()),  # above the diagonal and not next to it: no metric reads it
        ("zero_shot", "a", set()),
        ("zero_shot", "b", {"fwt_n_minus_1"}),
        ("a", "b", {"fwt_n_minus_1"}),
        ("b", "a", {"maa", "forgetting_max"}),
        ("b", "b", {"immediate", "maa", "bwt_n", "bwt_n_minus_1", "forgetting_max"}),
        ("c", "a", {"last", "maa", "bwt_n", "bwt_n_minus_1", "forgetting_max"}),
        ("c", "c", {"last", "immediate", "maa"}),
    ],
)
def test_a_blank_cell_blanks_exactly_the_metrics_that_need_it(after: str, task: str, lost: set[str]) -> None:
    row = tuple(None if name == task else value for name, value in zip(TASKS, ROWS[after], strict=True))
    result = metrics(AccuracyMatrix(TASKS, {**ROWS, after: row}))
    assert {name for name, value in result.items() if value is None} == lost | {"immediate_known", "bwt_known"}


def test_published_coin_divides_by_n() -> None:
    """CoIN prints BWT -32.62 for eight tasks whose drops sum to -261.0; N - 1 would give -37.3."""
    drops = (61.5, 21.0, 86.0, 20.0, 23.0, 30.0, 19.5, 0.0)  # invented drops that add up to the published sum
    tasks = tuple("stigvrqo")
    rows = {task: tuple(90.0 if i == t else None for i in range(8)) for t, task in enumerate(tasks)}
    rows["o"] = tuple(90.0 - drop for drop in drops)
    result = metrics(AccuracyMatrix(tasks, rows))
    assert result["bwt_n"] == pytest.approx(-32.625)
    assert result["bwt_n_minus_1"] == pytest.approx(-37.3, abs=0.05)


def test_published_disco_divides_by_n_minus_1() -> None:
    """MCITlib prints -7.45 for DISCO on six tasks with mean last 69.66 and mean immediate 75.87."""
    tasks = tuple("abcdef")
    rows = {task: tuple(75.87 if i == t else None for i in range(6)) for t, task in enumerate(tasks)}
    last = (69.66 * 6 - 75.87) / 5
    rows["f"] = (last,) * 5 + (75.87,)
    result = metrics(AccuracyMatrix(tasks, rows))
    assert result["last"] == pytest.approx(69.66)
    assert f"{result['bwt_n_minus_1']:.2f}" == "-7.45"


def test_csv_round_trip_is_exact(tmp_path: Path) -> None:
    matrix = AccuracyMatrix(TASKS, {**ROWS, "b": (100 / 3, None, 0.1 + 0.2)})
    matrix.write_csv(tmp_path / "m.csv")
    assert AccuracyMatrix.read_csv(tmp_path / "m.csv") == matrix
    assert (tmp_path / "m.csv").read_text().splitlines()[2] == "a,80.0,26.0,"
    write_table(tmp_path / "i.csv", TASKS, [("immediate", (1.5, None, 3.0))])
    assert read_immediate_csv(tmp_path / "i.csv", TASKS) == (1.5, None, 3.0)
    assert read_immediate_csv(tmp_path / "i.csv", TASKS[::-1]) == (3.0, None, 1.5), "by name"
    (tmp_path / "spreadsheet.csv").write_bytes(b"\xef\xbb\xbfafter, a ,b\r\n\r\nb, 1 ,\r\n,,\r\n")
    assert AccuracyMatrix.read_csv(tmp_path / "spreadsheet.csv") == AccuracyMatrix(("a", "b"), {"b": (1.0, None)})


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "header"),
        ("task,a,b\na,1,2\n", "header"),
        ("after\n", "header"),
        ("after,a,a\n", "header: task 2 is 'a'"),
        ("after,a,\n", "header: task 2 is ''"),
        ("after,zero_shot\n", "header: task 1 is 'zero_shot'"),
        ("after,a,b\na,1\n", "row 2"),
        ("after,a,b\na,1,\nc,1,2\n", "row 3, column 'after': 'c'"),
        ("after,a,b\na,1,\na,1,2\n", "row 3, column 'after': 'a'"),
        ("after,a,b\nb,1,2\na,1,2\n", "row 3, column 'after': 'a'"),
        ("after,a,b\na,1,\nb,1,x\n", "row 3, column 'b': 'x'"),
        ("after,a,b\na,nan,\n", "row 2, column 'a': 'nan'"),
        ("after,a,b\na,-1,\n", "row 2, column 'a': '-1'"),
        (None, "cannot be read"),
        ("\xff", "cannot be read"),
    ],
)
def test_malformed_matrix_names_file_row_and_column(tmp_path: Path, text: str | None, where: str) -> None:
    path = tmp_path / "m.csv"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(ClmoeError, match=f"{re.escape(str(path))}.*{re.escape(where)}"):
        AccuracyMatrix.read_csv(path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("after,b\nx,1\n", "header: task 'a'"),
        ("after,a,b,c\nx,1,2,3\n", "header: task 'c'"),
        ("after,a,b\n", "one row"),
        ("after,a,b\nx,1,2\ny,1,2\n", "one row"),
    ],
)
def test_malformed_immediate_row(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "i.csv").write_text(text)
    with pytest.raises(ClmoeError, match=f"i.csv.*{named}"):
        read_immediate_csv(tmp_path / "i.csv", ("a", "b"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("after,a,b\n", "score below the header"),
        ("after,a,b\na,,\n", "score below the header"),
        ("after,a,b,mean\na,80,,80\nb,60,70,65\n", "column 'mean'"),
        ("after,Average,a,b\nb,1,60,70\n", "column 'Average'"),  # refused by its name, whatever it holds
        ("after,a,b,X\na,80,,80\nb,60,71,65.5\n", "column 'X'"),
        ("after,a,b\na,0.8,\nb,0.6,1\n", "--unit"),
    ],
)
def test_a_table_that_means_something_else_is_refused(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ClmoeError, match=rf"m\.csv.*{named}"):
        metrics_from_files(tmp_path / "m.csv")


def test_shares_count_as_percent_where_the_unit_says_so_and_a_task_may_be_called_mean(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("after,a,mean\na,0.8,\nmean,0.5,0.9\n")
    (tmp_path / "i.csv").write_text("after,a,mean\nknown,0.82,0.92\n")
    both = tmp_path / "m.csv", tmp_path / "i.csv"
    for unit, factor in (("fraction", 100), ("percent", 1)):
        found, _ = metrics_from_files(*both, unit)  # type: ignore[arg-type]
        expected = {"last": 0.7, "immediate": 0.85, "bwt_n_minus_1": -0.3, "immediate_known": 0.87, "bwt_known": -0.17}
        assert {name: found[name] for name in expected} == pytest.approx({k: factor * v for k, v in expected.items()})
    (tmp_path / "i.csv").write_text("after,a,mean\nknown,82,92\n")
    with pytest.raises(ClmoeError, match=r"i\.csv: 92 "):
        metrics_from_files(*both, "fraction")


def test_a_metric_that_is_blank_says_which_cell_it_lacks(tmp_path: Path) -> None:
    """Filling in the named cells, one after the other, gives every metric."""
    cells = {(after, task): "" for after in ("zero_shot", *TASKS, "--immediate") for task in TASKS}
    cells["a", "a"] = "80"
    named = dict[str, str]()
    for _ in range(len(cells)):
        for name, stages in (("m.csv", ("zero_shot", *TASKS)), ("i.csv", ("--immediate",))):
            rows = [f"{after},{','.join(cells[after, task] for task in TASKS)}\n" for after in stages]
            (tmp_path / name).write_text("after,a,b,c\n" + "".join(rows))
        if not any(cells["--immediate", task] for task in TASKS):
            cells["--immediate", "a"] = "50"
            continue
        found, lacking = metrics_from_files(tmp_path / "m.csv", tmp_path / "i.csv")
        assert {name for name, value in found.items() if value is None} == set(lacking)
        named |= lacking
        for after, task in {re.fullmatch(r"needs row (\S+), column (\S+)", text).groups() for text in lacking.values()}:  # type: ignore[union-attr]
            assert cells[after, task] == ""
            cells[after, task] = "50"
    assert not lacking and set(named) == set(METRICS)
    (tmp_path / "m.csv").write_text("after,a\na,80\n")
    _, lacking = metrics_from_files(tmp_path / "m.csv")
    assert lacking["bwt_n_minus_1"] == "needs two tasks" and "--immediate" in lacking["bwt_known"]
