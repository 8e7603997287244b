"""The confusion matrices of the task locator at the end of the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clmoe.report.location import confusion_percent, deciders, runs_with
from clmoe.report.plots import CELL, DPI, INK, name_cells, percent_bar, percent_cell, save
from clmoe.report.records import DECIDERS
from clmoe.report.run import Group


def confusion_map(group: Group, tasks: Sequence[str], path: Path) -> Path:
    """Draw one matrix per decider side by side: rows = true task, columns = task taken, percent of the row."""
    drawn = deciders(group)
    margin = 0.4 + 0.075 * max(map(len, tasks))
    panel = max(len(tasks) * CELL * 0.85 + margin, 2.6)
    height = len(tasks) * CELL * 0.65 + 0.75 * margin + 0.85
    figure = Figure(figsize=(len(drawn) * panel + 0.9, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for ax, decider in zip(axes, drawn, strict=True):
        _panel(ax, group, decider, tasks)
    axes[0].set_ylabel("question of", fontsize=8, color=INK)
    percent_bar(figure, list(axes), "questions of the row (%)", shrink=0.9)
    figure.suptitle(group.label, x=0.01, ha="left", fontsize=9, color=INK)
    return save(figure, path)


def _panel(ax: Axes, group: Group, decider: str, tasks: Sequence[str]) -> None:
    for y, task in enumerate(tasks):
        for x, located in enumerate(tasks):
            value = confusion_percent(group, decider, task, located)
            percent_cell(ax, x, y, value, f"{value:.1f}" if value else "")  # an exact 0 is told by its colour
    name_cells(ax, tasks, tasks)
    ax.set_xlabel("taken for", fontsize=8, color=INK)
    seeds = runs_with(group, decider)
    title = DECIDERS[decider] if seeds == 1 else f"{DECIDERS[decider]} (mean of {seeds} seeds)"
    ax.set_title(title, fontsize=9, color=INK, loc="left")
