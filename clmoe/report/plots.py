"""Pictures of a report: heat-maps of the accuracy matrix and forgetting curves, as PNG or PDF by the file's ending.

Drawn with matplotlib's Agg canvas and its bundled font, without pyplot's global state; the files carry no
date, so that the same runs give the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from clmoe.evaluate.matrix import ZERO_SHOT, mean_spread
from clmoe.report.panels import Panel, mean_panels
from clmoe.report.run import Group, Run

DPI = 150
INK = "#222222"
BLANK_GREY = "#d9d9d9"
CELL = 0.62  # inches
SCALE = Normalize(0.0, 100.0)
COLOURS = colormaps["YlGnBu"]
# Okabe and Ito's palette (readable with colour-blindness), yellow left out as too pale on white.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#222222")
DASHES = ("-", "--", ":")


def heat_map(run: Run, path: Path) -> Path:
    """Draw the accuracy matrix of one run: rows = after training, columns = tasks, blank cells grey."""
    last = run.metrics["last"]
    title = run.name if last is None else f"{run.name}: last {last:.1f}"
    return _heat_maps([Panel(title, (run.seed,), run.matrix)], path)


def comparison_heat_maps(groups: Sequence[Group], path: Path) -> Path:
    """Draw the matrices of all labels side by side, each the mean over its seeds."""
    return _heat_maps([panel for group in groups for panel in mean_panels(group)], path)


def forgetting_curves(groups: Sequence[Group], path: Path) -> Path:
    """Draw one panel per task: its score against the training stage, one line per label (mean over seeds).

    A dashed vertical line marks the stage that trained the task. Seeds whose task order is not the first
    run's are left out, since their stages are others; the legend counts the seeds drawn.
    """
    order = groups[0].runs[0].order
    start = 0 if any(ZERO_SHOT in run.matrix.rows for group in groups for run in group.runs) else 1
    columns = min(4, len(order))
    rows = math.ceil(len(order) / columns)
    size = (2.6 * columns + 0.5, 2.1 * rows + 1.0 + 0.22 * math.ceil(len(groups) / 4))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for position, ax in enumerate(axes.flat):
        if position >= len(order):
            ax.remove()
            continue
        _curve_panel(ax, groups, order, position, start)
        if position + columns >= len(order):
            ax.tick_params(labelbottom=True)
            ax.set_xlabel("after training task", fontsize=8, color=INK)
        if position % columns == 0:
            ax.set_ylabel("score (%)", fontsize=8, color=INK)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=8)
    return save(figure, path)


def file_stem(text: str) -> str:
    """A label as part of a file name: lower case, anything but letters, digits and dots becomes "-"."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "run"


def legend_label(group: Group, drawn: int) -> str:
    """The label, and the seeds drawn where it has several."""
    total = len(group.runs)
    if total == 1:
        return group.label
    return f"{group.label} ({total if drawn == total else f'{drawn} of {total}'} seeds)"


def draw_cell(ax: Axes, x: int, y: int, colour: object) -> None:
    """The background of one cell of a map."""
    ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", lw=1.2))


def percent_cell(ax: Axes, x: int, y: int, value: float | None, text: str) -> None:
    """A cell coloured by a percentage, grey if there is none, with `text` in an ink that can be read on it."""
    draw_cell(ax, x, y, BLANK_GREY if value is None else COLOURS(SCALE(value)))
    if value is not None:
        ax.text(x, y, text, ha="center", va="center", fontsize=7.5, color="white" if value > 55 else INK)


def name_cells(ax: Axes, columns: Sequence[str], rows: Sequence[str]) -> None:
    """Limits and names of the columns and rows of a map, the first row on top."""
    ax.set_xlim(-0.5, len(columns) - 0.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0, labelsize=7.5, colors=INK)
    ax.spines[:].set_visible(False)


def percent_bar(figure: Figure, axes: Sequence[Axes], label: str, shrink: float) -> None:
    """The colour bar of percentages, right of `axes`."""
    bar = figure.colorbar(ScalarMappable(SCALE, COLOURS), ax=axes, aspect=25, shrink=shrink, pad=0.02)
    bar.set_label(label, fontsize=8, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=2, color=INK)


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG or a PDF without the metadata that changes between machines and days."""
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pdf":
        with rc_context({"pdf.fonttype": 42}):  # TrueType: publishers refuse matplotlib's default Type 3
            figure.savefig(path, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    else:
        figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _heat_maps(panels: Sequence[Panel], path: Path) -> Path:
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    tasks = max(len(panel.matrix.tasks) for panel in panels)
    stages = _stages_drawn(panels)
    names = max(len(stage) for panel in panels for stage in panel.matrix.stages)
    margin = 0.35 + 0.075 * names
    width = columns * (tasks * CELL + margin) + 0.9
    height = rows * (len(stages) * CELL * 0.75 + 0.75 * margin + 0.55)
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        _heat_panel(ax, panel, stages)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    percent_bar(figure, list(axes.flat[: len(panels)]), "score (%)", shrink=0.9 / rows)
    return save(figure, path)


def _stages_drawn(panels: Sequence[Panel]) -> list[int]:
    """Numbers of the stages that any panel has measured, so that all panels have the same rows; else 1..N."""
    total = len(panels[0].matrix.stages)
    measured = [t for t in range(total) if any(p.matrix.stages[t] in p.matrix.rows for p in panels)]
    return measured or list(range(1, total))


def _heat_panel(ax: Axes, panel: Panel, drawn: Sequence[int]) -> None:
    matrix = panel.matrix
    stages = [matrix.stages[t] for t in drawn]
    for y, stage in enumerate(stages):
        for x, value in enumerate(matrix.row(stage)):
            percent_cell(ax, x, y, value, "" if value is None else f"{value:.1f}")
            if value is not None and matrix.tasks[x] == stage:  # the task just trained
                frame = Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor=INK, lw=1.1)
                ax.add_patch(frame)
    name_cells(ax, matrix.tasks, stages)
    ax.set_ylabel("after training", fontsize=8, color=INK)
    ax.set_title(panel.title, fontsize=9, color=INK, loc="left")


def _curve_panel(ax: Axes, groups: Sequence[Group], order: tuple[str, ...], position: int, start: int) -> None:
    """One task's panel; the stages drawn run from `start` (0 is the untrained model) to the last task."""
    task = order[position]
    ax.axvline(position + 1, color="#999999", lw=0.8, ls=(0, (3, 3)), zorder=0)
    for g, group in enumerate(groups):
        runs = [run for run in group.runs if run.order == order]
        if not runs:
            continue
        # A stage that was not measured is NaN, at which matplotlib interrupts the line.
        stages = range(start, len(order) + 1)
        spreads = [mean_spread([run.matrix.cell(t, position + 1) for run in runs]) for t in stages]
        mean = [math.nan if spread.mean is None else spread.mean for spread in spreads]
        std = [spread.std or 0.0 for spread in spreads]
        colour, dash = LINES[g % len(LINES)], DASHES[g // len(LINES) % len(DASHES)]
        label = legend_label(group, len(runs))
        ax.plot(stages, mean, color=colour, ls=dash, lw=1.4, marker="o", ms=3, label=label)
        low = [max(m - s, 0.0) for m, s in zip(mean, std, strict=True)]
        high = [m + s for m, s in zip(mean, std, strict=True)]
        ax.fill_between(stages, low, high, color=colour, alpha=0.15, lw=0)
    ax.set_title(task, fontsize=9, color=INK, loc="left")
    ax.set_xlim(start - 0.4, len(order) + 0.4)
    ax.set_ylim(-4, 104)
    ax.set_xticks(range(start, len(order) + 1))
    ax.set_yticks(range(0, 101, 25))
    ax.grid(axis="y", color="#e6e6e6", lw=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(length=2, labelsize=7, colors=INK)
    ax.spines[["top", "right"]].set_visible(False)
