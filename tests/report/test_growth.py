"""The report of growth: parameters by task and blocks extended, from invented run folders."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from clmoe.errors import ClmoeError
from clmoe.report import growth_plots
from clmoe.report.growth import growth_table
from clmoe.report.names import block_names
from clmoe.report.records import share_in_use
from clmoe.report.run import group_runs, read_run
from clmoe.report.tables import BLANK
from clmoe.report.write import report_text, write_report
from tests.report.folders import TASKS, block, layer, make_run, row_of


def write_parameters(run: Path, trainable: list[int], stored: list[int], order: list[str] = TASKS) -> None:
    rows = [f"{task},{a},{b}" for task, a, b in zip(order, trainable, stored, strict=False)]
    (run / "parameters.csv").write_text("\n".join(["task,trainable,stored", *rows]) + "\n")


def write_expansion(run: Path, blocks: list[dict[str, Any]], order: list[str] = TASKS) -> None:
    plans = [{"task": task, "blocks": plan} for task, plan in zip(order, blocks, strict=False)]
    (run / "expansion.json").write_text(json.dumps(plans))


def grown_run(root: Path, label: str, seed: int, third: int = 0, order: list[str] = TASKS) -> Path:
    """Trains 90,624, 1,000 and `third` parameters; the probes extend one of four decisions, or `third` > 0 two."""
    run = make_run(root, label, seed, order=order)
    write_parameters(run, [90_624, 1_000, third], [90_624, 91_624, 91_624 + third], order)
    second = {layer(10): block([0.5, 0.1], 0.2, 0), layer(2): block([0.3, 0.42], 0.31, 1)}
    last = {layer(10): block([0.2, 0.1], 0.15, 2 if third else 0), layer(2): block([0.6, 0.1, 0.0], -0.2, 0)}
    write_expansion(run, [{}, second, last], order)
    return run


def texts(ax: Any) -> dict[tuple[int, int], list[str]]:
    """The texts written in each cell (column, row) of a map."""
    cells: dict[tuple[int, int], list[str]] = {}
    for text in ax.texts:
        x, y = text.get_position()
        cells.setdefault((round(x), round(y)), []).append(text.get_text())
    return cells


def test_growth_table_means_over_seeds(tmp_path: Path) -> None:
    runs = [grown_run(tmp_path, "grown", 0), grown_run(tmp_path, "grown", 1, third=1_000)]
    table = growth_table(group_runs([*runs, make_run(tmp_path, "plain", 0)]))
    assert [row[0] for row in table.rows] == ["grown"]
    row = row_of(table, "grown")
    assert row["colour_letter"] == "90,624"
    assert row["count"] == "1,000"
    assert row["box"] == "500 ± 707"  # of 0 and 1000
    assert row["stored at end"] == "92,124 ± 707"  # of 91,624 and 92,624
    assert row["blocks extended (%)"] == "37.50 ± 17.68"  # 1 of 4 and 2 of 4
    assert row["experts added"] == "2 ± 1.4"  # 1 and 3


def test_experts_in_use(tmp_path: Path) -> None:
    """Perplexity over count: one expert for all tokens 1 / n, all alike 1, two of three alike 2 / 3."""
    assert share_in_use([0.0, 2.0, 0.0, 0.0]) == pytest.approx(1 / 4)
    assert share_in_use([0.5] * 4) == pytest.approx(1)
    assert share_in_use([1.0, 1.0, 0.0]) == pytest.approx(2 / 3)
    assert share_in_use([0.7, -0.1]) is None and share_in_use([0.0, 0.0]) is None
    run = make_run(tmp_path, "grown", 0)
    write_expansion(run, [{}, {layer(0): block([1.0, 1.0], 0.5, 0)}, {layer(0): block([2.0, 0.0], 0.5, 0)}])
    assert row_of(growth_table(group_runs([run])), "grown")["experts in use (%)"] == "75.00"  # of 100 and 50


def test_growth_follows_task_names_when_orders_differ(tmp_path: Path) -> None:
    groups = group_runs([grown_run(tmp_path, "grown", 0), grown_run(tmp_path, "grown", 1, 600, TASKS[::-1])])
    row = row_of(growth_table(groups), "grown")
    assert row["colour_letter"] == "45,612 ± 63,657"  # 90,624 first, 600 last
    assert row["stored at end"] == "91,924 ± 424"  # 91,624 and 92,224, each after the run's own last task


def test_either_file_alone_and_unfinished_runs(tmp_path: Path) -> None:
    only_parameters = make_run(tmp_path, "parameters", 0)
    write_parameters(only_parameters, [5, 6, 7], [5, 11, 18])
    only_expansion = make_run(tmp_path, "expansion", 0)
    write_expansion(only_expansion, [{}, {}, {}])
    unfinished = make_run(tmp_path, "unfinished", 0)
    write_parameters(unfinished, [5, 6], [5, 11])
    write_expansion(unfinished, [{}, {layer(0): block([0.1, 0.9], 0.5, 1)}])
    runs = [only_parameters, only_expansion, unfinished]
    rows = [row[1:] for row in growth_table(group_runs(runs)).rows]
    assert rows[0] == ("5", "6", "7", "18", BLANK, BLANK, BLANK)
    assert rows[1] == (BLANK, BLANK, BLANK, BLANK, BLANK, "0", BLANK)  # no decision, so no share of them
    assert rows[2] == ("5", "6", BLANK, BLANK, BLANK, BLANK, BLANK)
    names = {path.name for path in write_report(runs, tmp_path / "out", ["md"])}
    assert {name for name in names if name.startswith("expansion")} == {"expansion-unfinished-seed0.png"}


def test_growth_csv_and_every_format(tmp_path: Path) -> None:
    runs = [grown_run(tmp_path, "grown", 0), grown_run(tmp_path, "grown", 1, third=1_000)]
    write_report(runs, tmp_path / "out", ["md", "csv", "tex"])
    lines = list(csv.DictReader((tmp_path / "out/growth.csv").open()))
    # in use: exp(entropy) / count of (5, 1), (3, 4.2), (2, 1) and (6, 1, 0): 78.46, 98.61, 94.49 and 50.23 %
    found = {(line["quantity"], line["task"]): (float(line["mean"]), line["n"]) for line in lines}
    assert found == {
        ("trainable_parameters", "colour_letter"): (90_624, "2"),
        ("trainable_parameters", "count"): (1_000, "2"),
        ("trainable_parameters", "box"): (500, "2"),
        ("stored_parameters", ""): (92_124, "2"),
        ("blocks_extended_percent", ""): (37.5, "2"),
        ("experts_added", ""): (2, "2"),
        ("experts_in_use_percent", ""): (pytest.approx(80.45, abs=0.01), "2"),
    }
    assert float(lines[2]["std"]) == pytest.approx(500 * 2**0.5)
    markdown = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert "| grown | 90,624 | 1,000 | 500 ± 707 | 92,124 ± 707 | 37.50 ± 17.68 | 2 ± 1.4 | " in markdown
    assert all(
        f"]({name}.png)" in markdown for name in ("expansion-grown-seed0", "expansion-grown-seed1", "parameters")
    )
    assert r"blocks extended (\%)" in (tmp_path / "out/report.tex").read_text(encoding="utf-8")
    assert "92,124" in report_text(runs)


def test_runs_without_the_files_show_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, "plain", 0)
    names = {path.name for path in write_report([run], tmp_path / "out", ["md", "csv", "tex"])}
    assert names == {"report.md", "report.csv", "tasks.csv", "report.tex", "matrix-plain-seed0.png", "forgetting.png"}
    assert "Growth" not in report_text([run])
    write_parameters(run, [7, 7, 7], [7, 7, 7])
    assert "Growth" not in report_text([run]), "no adapter grew: there is nothing to compare"


def test_pictures_have_the_same_bytes_again(tmp_path: Path) -> None:
    runs = [grown_run(tmp_path, "grown", 0), grown_run(tmp_path, "grown", 1, third=1_000)]
    write_report(runs, tmp_path / "one", ["md"])
    write_report(runs, tmp_path / "two", ["md"])
    for name in ("expansion-grown-seed0.png", "expansion-grown-seed1.png", "parameters.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_expansion_map_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(growth_plots, "save", lambda figure, path: figures.append(figure))
    growth_plots.expansion_map(read_run(grown_run(tmp_path, "grown", 0, third=1_000)), tmp_path / "x.png")
    (ax,) = figures[0].axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["layer 2", "layer 10"]
    assert [label.get_text() for label in ax.get_xticklabels()] == TASKS
    assert texts(ax) == {
        (1, 0): ["1", "0.42 > 0.31"],
        (1, 1): ["0", "0.10 ≤ 0.20"],
        (2, 0): ["0", "0.00 ≤ 0.00"],  # a threshold below 0 counts as 0, and only the last expert is a probe
        (2, 1): ["2", "0.10 ≤ 0.15"],
    }
    colours = {(round(cell.get_x() + 0.5), round(cell.get_y() + 0.5)): cell.get_facecolor() for cell in ax.patches}
    grey = colours[0, 0]
    assert grey[:3] == pytest.approx((0xD9 / 255,) * 3)
    assert [place for place, colour in colours.items() if colour == grey] == [(0, 0), (0, 1)]
    assert colours[1, 1] == colours[2, 0]  # nothing added
    assert len({colours[1, 0], colours[1, 1], colours[2, 1], grey}) == 4


def test_close_calls_get_more_decimals_and_several_probes_their_largest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, "close", 0)
    close = block([0.9, 0.3112, 0.3138, 0.1], 0.3134, 1, probes=3)
    write_expansion(run, [{}, {layer(0): close}, {layer(0): block([0.5, 0.25], 0.25, 0)}])
    figures: list[Any] = []
    monkeypatch.setattr(growth_plots, "save", lambda figure, path: figures.append(figure))
    growth_plots.expansion_map(read_run(run), tmp_path / "x.png")
    cells = texts(figures[0].axes[0])
    assert cells[1, 0][1] == "0.314 > 0.313"
    assert cells[2, 0][1] == "0.25 ≤ 0.25"


def test_parameter_bars_are_the_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [grown_run(tmp_path, "grown", 0), grown_run(tmp_path, "grown", 1, third=1_000)]
    other = make_run(tmp_path, "other", 0)
    write_parameters(other, [7, 8], [7, 15])  # unfinished: no bar for box
    figures: list[Any] = []
    monkeypatch.setattr(growth_plots, "save", lambda figure, path: figures.append(figure) or path)
    write_report([*runs, make_run(tmp_path, "plain", 0), other], tmp_path / "out", ["md"])
    (ax,) = figures[-1].axes
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in ax.containers}
    assert heights == {"grown (2 seeds)": [90_624, 1_000, 500], "other": [7, 8, 0]}
    assert all([round(bar.get_x() + bar.get_width() / 2) for bar in bars] == [0, 1, 2] for bars in ax.containers)
    spans = [list(line.get_ydata()) for line in ax.lines]
    assert spans == [[0, pytest.approx(500 + 500 * 2**0.5)]]  # cut at 0; the other tasks do not vary


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["layers.10.mlp", "layers.9.mlp"], {"layers.9.mlp": "layer 9", "layers.10.mlp": "layer 10"}),
        (["layers.0.mlp", "layers.0.attn"], {"layers.0.attn": "layer 0 attn", "layers.0.mlp": "layer 0 mlp"}),
        (["projector", "layers.0"], {"projector": "projector", "layers.0": "layer 0"}),
        (["b.layers.0.mlp", "a.layers.0.mlp"], {name: name for name in ("a.layers.0.mlp", "b.layers.0.mlp")}),
    ],
)
def test_block_names(names: list[str], short: dict[str, str]) -> None:
    assert list(block_names(names).items()) == list(short.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task,trainable\n", "header: expected 'task,trainable,stored', found 'task,trainable'"),
        ("", "found an empty file"),
        ("task,trainable,stored\ncount,1\n", "row 2: 2 cells for the 3 columns"),
        ("task,trainable,stored\ncount,1.5,2\n", "row 2, column 'trainable': '1.5' is not a whole number"),
        ("task,trainable,stored\ncount,1,-2\n", "row 2, column 'stored': '-2' is not a whole number"),
        ("task,trainable,stored\ncuont,1,2\n", "row 2, column 'task': 'cuont' is no task"),
        ("task,trainable,stored\nbox,1,2\n\ncount,1,2\n", "row 4, column 'task': 'count' comes after 'box'"),
        ("task,trainable,stored\nbox,1,2\nbox,1,2\n", "row 3, column 'task': 'box' comes after 'box'"),
    ],
)
def test_malformed_parameters_are_named(tmp_path: Path, text: str, message: str) -> None:
    run = make_run(tmp_path, "moe", 0)
    (run / "parameters.csv").write_text(text)
    with pytest.raises(ClmoeError, match=r"parameters\.csv") as error:
        read_run(run)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected one JSON list, found dict"),
        ([3], "entry 1: expected an object with 'task' and 'blocks', found int"),
        ([{"blocks": {}}], "entry 1: field 'task' is missing"),
        ([{"task": "count"}], "entry 1: field 'blocks' is missing"),
        ([{"task": "x", "blocks": {}}], "entry 1, field 'task': 'x' is no task"),
        ([{"task": t, "blocks": {}} for t in ("box", "count")], "entry 2, field 'task': 'count' comes after 'box'"),
        ([{"task": "box", "blocks": {"b": 1}}], "task 'box', block 'b': expected an object, found int"),
    ],
)
def test_malformed_expansion_is_named(tmp_path: Path, content: Any, message: str) -> None:
    run = make_run(tmp_path, "moe", 0)
    (run / "expansion.json").write_text(json.dumps(content))
    with pytest.raises(ClmoeError, match=r"expansion\.json") as error:
        read_run(run)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("activations", [0.1, "x"], "field 'activations' must be a list of finite numbers"),
        ("activations", [0.1, float("nan")], "field 'activations' must be a list of finite numbers"),
        ("activations", [], "field 'probes' is 1; expected 1 to 0"),
        ("probes", 0, "field 'probes' is 0; expected 1 to 2"),
        ("threshold", "0.3", "field 'threshold' is '0.3'; expected int or float"),
        ("threshold", float("inf"), "field 'threshold' is inf; expected a finite number"),
        ("added", True, "field 'added' is True; expected int"),
        ("added", -1, "field 'added' is -1; expected at least 0"),
        ("probed", None, "field 'probed' is None; expected int"),
        ("margin", [], "field 'margin' is []; expected int or float"),
    ],
)
def test_malformed_block_is_named(tmp_path: Path, field: str, value: Any, message: str) -> None:
    run = make_run(tmp_path, "moe", 0)
    write_expansion(run, [{layer(3): block([0.1, 0.2], 0.3, 0) | {field: value}}])
    with pytest.raises(ClmoeError, match=r"expansion\.json, task 'colour_letter', block '.*layers\.3\.mlp'") as error:
        read_run(run)
    assert message in str(error.value)
