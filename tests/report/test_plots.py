"""The pictures draw the numbers of the tables, and their files are the same every time."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy
import pandas as pd
import pytest
from matplotlib.figure import Figure

from clmoe.report import plots
from clmoe.report.answers import OUTCOMES
from clmoe.report.page import write_report
from clmoe.report.runs import group_runs
from tests.report.folders import TASKS, block, layer, make_run, write, write_expansion


def drawn(panel: plots.Panel) -> Any:
    """The axes that a panel was drawn on."""
    ax = Figure().subplots()
    panel.draw(ax, panel.cells)
    return ax


def texts(ax: Any) -> dict[tuple[int, ...], str]:
    """The texts written in each cell (column, row) of a map."""
    return {tuple(map(int, text.get_position())): text.get_text() for text in ax.texts}


def test_heat_maps_draw_scores_frame_the_diagonal_and_leave_blanks(tmp_path: Path) -> None:
    (panel,) = plots.matrices(group_runs([make_run(tmp_path, "moe", 0, last=0.0)])).panels
    ax = drawn(panel)
    assert texts(ax) == {(0, 0): "80", (0, 1): "70", (1, 1): "80", (0, 2): "0", (1, 2): "0", (2, 2): "80"}
    mesh = ax.collections[0].get_array()
    assert numpy.ma.getmaskarray(mesh).sum() + numpy.isnan(mesh.filled(0)).sum() == 3
    assert [(int(frame.get_x()), int(frame.get_y())) for frame in ax.patches] == [(0, 0), (1, 1), (2, 2)]
    assert ax.yaxis_inverted() and [label.get_text() for label in ax.get_yticklabels()] == TASKS
    assert panel.alt.endswith("box: colour_letter 0, count 0, box 80")


def test_forgetting_curves_are_means_and_deviations_of_the_first_order(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "moe", seed, last) for seed, last in ((0, 50.0), (1, 44.0))]
    runs += [make_run(tmp_path, "moe", 2, 0.0, order=TASKS[::-1]), make_run(tmp_path, "plain", 0, 20.0)]
    write(runs[3] / "matrix.csv", "after,colour_letter,count,box", "colour_letter,80,,", "box,20,20,80")
    picture = plots.forgetting(group_runs(runs))
    assert [panel.title for panel in picture.panels] == TASKS and list(picture.legend) == ["moe", "plain"]
    mark, moe, plain = drawn(picture.panels[0]).lines
    assert list(mark.get_xdata()) == [0, 0]
    assert list(moe.get_ydata()) == [80, 70, 47]
    assert list(plain.get_ydata()[[0, 2]]) == [80, 20] and numpy.isnan(plain.get_ydata()[1])  # a gap, not a line
    band = drawn(picture.panels[0]).collections[0].get_paths()[0].vertices[:, 1]
    assert (min(band), max(band[band < 60])) == pytest.approx((47 - 18**0.5, 47 + 18**0.5))  # of 50 and 44


def test_levels_are_drawn_where_the_runs_know_them(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0)
    write(run / "matrix.csv", "after,colour_letter,count,box", "zero_shot,10,20,30", "colour_letter,80,,")
    picture = plots.forgetting(group_runs([run]))
    (level,) = [line for line in drawn(picture.panels[1]).lines if len(set(line.get_ydata())) == 1][:1]
    assert set(level.get_ydata()) == {20} and list(picture.legend) == ["moe", "zero-shot"]


def test_losses_are_those_of_the_tasks_training_the_later_one_of_a_step_that_came_twice(tmp_path: Path) -> None:
    def step(number: int, loss: float) -> str:
        return f'{{"event": "step", "task": "count", "step": {number}, "loss": {loss}}}'

    def end(phase: str) -> str:
        return f'{{"event": "trained", "task": "count", "phase": "{phase}"}}'

    runs = [make_run(tmp_path, "moe", seed) for seed in (0, 1)]
    write(runs[0] / "events.jsonl", step(1, 9), end("probe"), step(1, 8), step(2, 7), step(2, 4), end("trained"))
    write(runs[1] / "events.jsonl", step(1, 6))
    groups = group_runs(runs)
    (panel,) = plots.losses(groups).panels
    assert panel.title == "count"
    (line,) = drawn(panel).lines
    assert list(line.get_xdata()) == [1, 2] and list(line.get_ydata()) == [7, 4]  # mean of 8 and 6; one seed has step 2
    assert groups[0].runs[0].losses.to_numpy().tolist() == [
        ["count", "probe", 1, 9], ["count", "trained", 1, 8], ["count", "trained", 2, 4],
    ]  # fmt: skip


def test_outcomes_are_stacked_to_the_whole(tmp_path: Path) -> None:
    counts = pd.DataFrame([["moe", "count", 1, 1, 2, 0]], columns=["label", "task", *OUTCOMES.values()])
    (panel,) = plots.answers(counts).panels
    bars = drawn(panel).patches
    assert [(bar.get_x(), bar.get_width()) for bar in bars] == [(0, 25), (25, 25), (50, 50), (100, 0)]


def test_locator_maps_are_means_blank_where_a_seed_asked_nothing(tmp_path: Path) -> None:
    header = "after,locator,task,located,count"
    first, second = make_run(tmp_path, "moe", 0), make_run(tmp_path, "moe", 1)
    write(first / "locator.csv", header, "box,vae,count,box,1", "box,vae,count,count,9", "box,vae,box,box,5")
    write(second / "locator.csv", header, "box,vae,count,count,7", "box,vae,count,colour_letter,3")
    (panel,) = plots.locator(group_runs([first, second])).panels
    assert panel.title == "moe: vae (mean of 2 seeds)"
    assert texts(drawn(panel)) == {(0, 1): "15", (1, 1): "80", (2, 1): "5"}  # (column, row): the row is the true task


def test_experts_and_probes_of_each_block(tmp_path: Path) -> None:
    grown = block([0.5, 0.25, 0.15, 0.1], 0.1, 2, probes=2)
    plans = [{}, {layer(10): block([3.0, 1.0], 9, 0), layer(2): grown}]
    groups = group_runs([write_expansion(make_run(tmp_path, "moe", 0), plans)])
    (panel,) = plots.experts(groups).panels
    assert texts(drawn(panel)) == {(1, 0): "2", (1, 1): "0"}  # the other tasks were not probed
    (panel,) = plots.usage(groups).panels
    assert panel.title == "moe, seed 0: count" and list(panel.cells) == [0, 1, "p1", "p2"]
    shares = {(0, 0): "50", (1, 0): "25", (2, 0): "15", (3, 0): "10", (0, 1): "75", (2, 1): "25"}
    assert texts(drawn(panel)) == shares


def test_svg_takes_the_pages_colours_and_no_name_can_leave_it(tmp_path: Path) -> None:
    label = '<b onclick="x">$\\frac{1}{0}$ & more'
    picture = plots.matrices(group_runs([make_run(tmp_path, label, 0, benchmark="x", order=["a$b$", "<i>", "c"])]))
    svg = plots.to_svg(picture, picture.panels[0])
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img" and label in (root.get("aria-label") or "")
    assert "<i>" in "".join(root.itertext()) and "a$b$" in "".join(root.itertext())
    assert {"currentColor", "var(--blank)", "var(--card)"} <= set(re.findall(r"currentColor|var\(--[\w-]+\)", svg))
    assert plots.INK not in svg and "<style" not in svg and "font-family" not in svg
    other = plots.to_svg(plots.Picture("other", picture.panels), picture.panels[0])
    ids = [set(re.findall(r'id="([^"]*)"', text)) for text in (svg, other)]
    assert not ids[0] & ids[1], "two figures of a page would share an id"


@pytest.mark.slow
def test_pictures_are_the_same_bytes_again_with_fonts_that_publishers_take(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, label, seed) for label in ("a", "b") for seed in (0, 1)]
    paths = write_report(runs, tmp_path / "one", ["pdf", "svg", "md"])
    stems = ("comparison", "matrices", "forgetting")
    assert {path.name for path in paths} == {"report.md", *(s + end for s in stems for end in (".png", ".pdf", ".svg"))}
    write_report(runs, tmp_path / "two", ["pdf", "svg", "md"])
    for path in paths:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert all(b"/Type3" not in path.read_bytes() for path in paths)
    text = (tmp_path / "one/report.md").read_text(encoding="utf-8")
    assert all(f"]({stem}.png)" in text for stem in stems)
