"""Pictures of an adapter's growth: the map of extended blocks, and parameters trained by task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from clmoe.report.growth import trained_in
from clmoe.report.names import block_names
from clmoe.report.plots import BLANK_GREY, COLOURS, DPI, INK, LINES, draw_cell, legend_label, name_cells, save
from clmoe.report.records import BlockExpansion
from clmoe.report.run import Group, Run
from clmoe.report.tables import show_count

CELL_WIDTH, CELL_HEIGHT = 0.8, 0.38  # inches
TITLE_CHARACTER = 0.068  # inches a character takes, so that no title or legend is cut
LEGEND_CHARACTER = 0.065
NOTE = "small: most active probe against the threshold; grey: not probed"


def expansion_map(run: Run, path: Path) -> Path:
    """Draw a map block x task of one run: experts added, and the most active probe against the limit."""
    plans = {plan.task: plan.blocks for plan in run.expansion}
    blocks = block_names([name for plan in plans.values() for name in plan])
    title = f"{run.name}: experts added"
    margin = 0.5 + 0.06 * max(map(len, blocks.values()))
    width = max(len(run.order) * CELL_WIDTH + margin, TITLE_CHARACTER * max(len(title), len(NOTE)))
    height = len(blocks) * CELL_HEIGHT + 0.06 * max(map(len, run.order)) + 0.85
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    top = max(block.added for plan in plans.values() for block in plan.values())
    for y, name in enumerate(blocks):
        for x, task in enumerate(run.order):
            _expansion_cell(ax, x, y, plans.get(task, {}).get(name), top)
    name_cells(ax, run.order, list(blocks.values()))
    figure.suptitle(f"{title}\n{NOTE}", x=0.01, ha="left", fontsize=9, color=INK)
    return save(figure, path)


def trained_parameters(groups: Sequence[Group], tasks: Sequence[str], path: Path) -> Path:
    """Draw the parameters trained in each task as bars, one per label: mean over seeds, the deviation as a line."""
    labels = [legend_label(group, sum(bool(run.parameters) for run in group.runs)) for group in groups]
    entry = 0.55 + LEGEND_CHARACTER * max(map(len, labels))
    width = max(5.0, len(tasks) * (0.35 + 0.14 * len(groups)) + 1.2, entry)
    legend_columns = int(width / entry)
    height = 3.1 + 0.2 * math.ceil(len(labels) / legend_columns)
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    share = 0.8 / len(groups)
    for g, (group, label) in enumerate(zip(groups, labels, strict=True)):
        spreads = [trained_in(group, task) for task in tasks]
        places = [x - 0.4 + share * (g + 0.5) for x in range(len(tasks))]
        heights = [spread.mean or 0.0 for spread in spreads]
        colour, hatch = LINES[g % len(LINES)], (None, "//", "..")[g // len(LINES) % 3]
        ax.bar(places, heights, 0.9 * share, color=colour, hatch=hatch, edgecolor="white", lw=0, label=label)
        spans = [(x, s.mean, s.std) for x, s in zip(places, spreads, strict=True) if s.mean is not None and s.std]
        for x, mean, std in spans:
            ax.plot([x, x], [max(mean - std, 0.0), mean + std], color=INK, lw=0.8)
    ax.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_xlim(-0.5, len(tasks) - 0.5)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show_count(value)))
    ax.set_ylabel("parameters trained", fontsize=8, color=INK)
    ax.grid(axis="y", color="#e6e6e6", lw=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(length=2, labelsize=7.5, colors=INK)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=legend_columns, frameon=False, fontsize=8)
    return save(figure, path)


def _expansion_cell(ax: Axes, x: int, y: int, block: BlockExpansion | None, top: int) -> None:
    if block is None:
        draw_cell(ax, x, y, BLANK_GREY)
        return
    # The lower half of the colours only, where dark ink can be read.
    draw_cell(ax, x, y, COLOURS(0.45 * block.added / max(top, 1)))
    ax.text(x, y - 0.17, str(block.added), ha="center", va="center", fontsize=8.5, color=INK)
    ax.text(x, y + 0.24, _comparison(block), ha="center", va="center", fontsize=5.8, color=INK)


def _comparison(block: BlockExpansion) -> str:
    """ "0.42 > 0.31", with more decimals where two would show the same number."""
    sign = ">" if block.probe > block.limit else "≤"
    shown = [(f"{block.probe:.{digits}f}", f"{block.limit:.{digits}f}") for digits in (2, 3, 4)]
    probe, limit = next((pair for pair in shown if pair[0] != pair[1]), shown[0])
    return f"{probe} {sign} {limit}"
