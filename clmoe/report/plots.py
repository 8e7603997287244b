"""Figures of a report: panels apart on the page (SVG), to fit a phone, and on one grid for papers (PDF, PNG)."""

import html
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from types import MappingProxyType

import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from clmoe.evaluate.matrix import ZERO_SHOT
from clmoe.report import tables
from clmoe.report.answers import OUTCOMES
from clmoe.report.runs import Group

# Okabe and Ito's palette (readable with colour-blindness), yellow left out as too pale on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555559")
INK, SOFT, GRID, BLANK, PAPER = "#1c2128", "#6b7581", "#dfe3e8", "#e9ebee", "#fefefe"
# On the page these colours are variables, which the style sheet sets for light and dark.
VARIABLES = {INK: "currentColor", SOFT: "var(--soft)", GRID: "var(--edge)", BLANK: "var(--blank)", PAPER: "var(--card)"}
VARIABLES |= {colour: f"var(--line-{i})" for i, colour in enumerate(PALETTE)}
OUTCOME_COLOURS = dict(zip(OUTCOMES.values(), (PALETTE[2], PALETTE[1], PALETTE[4], GRID), strict=True))
HEAT = colormaps["YlGnBu"]
REFERENCES = {"chance": (SOFT, ":"), "zero-shot": (SOFT, "--")}  # levels that a method has to exceed
WIDTH = 3.4  # inches: a panel fits a phone
Styles = dict[str, tuple[str, str]]  # label -> colour, dash
METADATA = {  # left out, so that the same runs give the same bytes
    ".pdf": ("Creator", "Producer", "CreationDate"),
    ".png": ("Software",),
    ".svg": ("Creator", "Date", "Format", "Type"),
}
STYLE = Path(__file__).parent / "templates" / "figures.mplstyle"


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes: `draw` shows the numbers of `cells` on them; `size` is in inches."""

    title: str
    cells: pd.DataFrame
    size: tuple[float, float]
    draw: Callable[[Axes, pd.DataFrame], None]

    @property
    def alt(self) -> str:
        """The numbers in words, for screen readers."""
        rows = [(name, row.dropna().items()) for name, row in self.cells.iterrows()]
        told = [(name, list(row)) for name, row in rows]  # of a long curve, only as many points as one listens to
        shown = [(name, row[:: math.ceil(len(row) / 24) or 1]) for name, row in told]
        texts = (f"{name}: " + ", ".join(f"{column} {value:.3g}" for column, value in row) for name, row in shown)
        return f"{self.title}. {'; '.join(texts)}"


@dataclass(frozen=True, slots=True)
class Picture:
    """Panels that belong together, and their legend: text -> (colour, dash); without a dash it is a filled square."""

    name: str
    panels: list[Panel]
    legend: Styles = field(default_factory=dict)


def save(picture: Picture, paths: Sequence[Path]) -> None:
    """Write all panels on one grid, as PNG, PDF or SVG by the ending of each path."""
    count = len(picture.panels)
    columns = 2 if count == 4 else min(3, count)
    rows = math.ceil(count / columns)
    width, height = (max(panel.size[side] for panel in picture.panels) for side in (0, 1))
    size = (width * columns, (height + 0.2) * rows + 0.3 * bool(picture.legend))
    with rc_context({"svg.hashsalt": picture.name}, STYLE):
        figure = Figure(size, dpi=200, layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax, panel in zip(axes, picture.panels, strict=False):
            panel.draw(ax, panel.cells)
            ax.set_title(panel.title)
        for ax in axes[count:]:
            ax.remove()
        if picture.legend:
            lines = [Line2D([], [], color=c, ls=d or "none", marker="so"[bool(d)]) for c, d in picture.legend.values()]
            figure.legend(lines, list(picture.legend), loc="outside lower center", ncols=2 * columns, frameon=False)
        for path in paths:
            figure.savefig(path, metadata=dict.fromkeys(METADATA[path.suffix]))
            figure.set_layout_engine("none")  # laid out by now


def to_svg(picture: Picture, panel: Panel) -> str:
    """A panel as an `svg` element for HTML: without title, in the page's font and colours."""
    content = io.StringIO()
    with rc_context({"svg.hashsalt": f"{picture.name} {panel.title}"}, STYLE):  # ids differ between panels
        figure = Figure(panel.size, layout="constrained")
        panel.draw(figure.subplots(), panel.cells)
        figure.savefig(content, format="svg", facecolor="none", metadata=dict.fromkeys(METADATA[".svg"]))
    text = content.getvalue()[content.getvalue().index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</defs>| font-family: [^;]*;", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(panel.alt)}" ', 1)


def styles(groups: Sequence[Group], labels: pd.Series) -> Styles:
    """Colour and dash of those labels that occur, the same in all figures."""
    size = len(PALETTE)
    found = {g.label: (PALETTE[i % size], ("-", "--", ":")[i // size % 3]) for i, g in enumerate(groups)}
    return {label: style for label, style in found.items() if label in set(labels)}


def comparison(groups: Sequence[Group]) -> Picture:
    """One row per label: the mean score right after training, and at the end; the line between them was forgotten.

    Vertical lines: what chance and the untrained model reach.
    """
    legend = {"immediate": (PALETTE[1], ""), "last": (PALETTE[0], "")}
    seeds = tables.metrics_frame(groups).groupby("label", sort=False)[list(legend)]
    stds, levels = seeds.std().fillna(0.0), tables.references(groups).mean(skipna=False).dropna()

    def dumbbells(ax: Axes, means: pd.DataFrame) -> None:
        rows = range(len(means))
        ax.hlines(rows, means.min(axis=1), means.max(axis=1), color=SOFT, lw=1.5, zorder=1)
        for column, (colour, _) in legend.items():
            ax.errorbar(means[column], rows, xerr=stds[column], fmt="o", color=colour, ms=6, lw=1.2)
        for name, level in levels.items():
            ax.axvline(level, color=SOFT, ls=REFERENCES[str(name)][1], lw=1, zorder=0)
        ax.set_yticks(rows, _short(means.index))
        ax.set(ylim=(len(means) - 0.5, -0.5), xlim=(-4, 104), xticks=range(0, 101, 25))
        ax.grid(axis="x")

    panel = Panel("mean score (%)", seeds.mean(), (WIDTH, 0.75 + 0.27 * len(groups)), dumbbells)
    return Picture("comparison", [panel], legend | {name: REFERENCES[name] for name in map(str, levels.index)})


def matrices(groups: Sequence[Group]) -> Picture:
    """The accuracy matrix of each label, mean over its seeds; all with the stages that any of them has."""
    found, panels = tables.mean_matrices(groups), []
    measured = {stage for cells in found.values() for stage in cells.index}
    for title, cells in found.items():
        stages = pd.Index([stage for stage in (ZERO_SHOT, *cells) if stage in measured], name="after")
        panels.append(heat_panel(title, cells.reindex(stages)))
    return Picture("matrices", panels)


def curves_frame(groups: Sequence[Group]) -> pd.DataFrame:
    """label, task, after, mean, std, n: score of a task after each stage, for the seeds in the first run's order."""
    order = groups[0].runs[0].order
    same = [Group(group.label, tuple(run for run in group.runs if run.order == order)) for group in groups]
    return tables.over_seeds(tables.matrices_frame(same), ["label", "task", "after"])


def forgetting(groups: Sequence[Group]) -> Picture:
    """One panel per task: its score after each stage, a line per label, the deviation as a band."""
    frame, order, panels = curves_frame(groups), groups[0].runs[0].order, []
    stages = [stage for stage in (ZERO_SHOT, *order) if stage in set(frame["after"])]
    drawn, levels = styles(groups, frame["label"]), tables.references(groups)
    for task in order:
        own, known = frame[frame["task"] == task], {str(n): float(v) for n, v in levels.loc[task].dropna().items()}
        means, stds = (own.pivot(index="label", columns="after", values=name) for name in ("mean", "std"))
        means, stds = (values.reindex(index=list(drawn), columns=stages) for values in (means, stds))
        draw = partial(_lines, drawn=drawn, stds=stds.fillna(0.0), mark=task, levels=known)
        panels.append(Panel(task, means, (2.65, 1.95), draw))
    return Picture("forgetting", panels, drawn | {n: REFERENCES[n] for n in map(str, levels.dropna(axis=1, how="all"))})


def general(groups: Sequence[Group], frame: pd.DataFrame) -> Picture:
    """One panel per set of general ability: its score after each stage, a line per label, the deviation as a band."""
    found, panels = tables.over_seeds(frame, ["label", "set", "after"]), []
    stages = [stage for stage in (ZERO_SHOT, *groups[0].runs[0].order) if stage in set(found["after"])]
    drawn = styles(groups, found["label"])
    for name, own in found.groupby("set", sort=False):
        means, stds = (own.pivot(index="label", columns="after", values=value) for value in ("mean", "std"))
        means, stds = (values.reindex(index=list(drawn), columns=stages) for values in (means, stds))
        panels.append(Panel(str(name), means, (2.65, 1.95), partial(_lines, drawn=drawn, stds=stds.fillna(0.0))))
    return Picture("general", panels, drawn)


def losses(groups: Sequence[Group]) -> Picture:
    """One panel per task: the training loss, mean over the seeds, a line per label; not of probes and the like."""
    return _curves("losses", groups, [], "loss", "log")


def measured(groups: Sequence[Group]) -> Picture:
    """As ``losses``, a panel per task and number that the methods log."""
    return _curves("measured", groups, ["name"], "value", "linear")


def _curves(table: str, groups: Sequence[Group], by: list[str], value: str, scale: str) -> Picture:
    frame, panels = tables.run_frame(groups, table), []
    frame = frame[frame["phase"].isin(("trained", ""))]
    drawn = styles(groups, frame["label"])
    for keys, own in frame.groupby([*by, "task"], sort=False):
        means = tables.over_seeds(own, ["label", "step"], value).pivot(index="label", columns="step", values="mean")
        draw = partial(_losses, drawn=drawn, name=value, scale=scale)
        panels.append(Panel(": ".join(keys), means.reindex(list(drawn)), (2.65, 1.95), draw))
    return Picture(table, panels, drawn)


def answers(counts: pd.DataFrame) -> Picture:
    """One panel per label: what became of the answers to each task's questions, in percent."""
    panels = []
    for label, own in counts.groupby("label", sort=False):
        shares = own.set_index("task")[list(OUTCOME_COLOURS)]
        shares = shares.mul(100).div(shares.sum(axis=1), axis=0)
        panels.append(Panel(str(label), shares, (2.65, 0.55 + 0.22 * len(own)), _stacks))
    return Picture("answers", panels, {name: (colour, "") for name, colour in OUTCOME_COLOURS.items()})


def locator(groups: Sequence[Group]) -> Picture:
    """A confusion matrix for each label and locator, mean over the seeds, percent of the row."""
    order, panels = list(groups[0].runs[0].order), []
    for (label, name), own in tables.located_frame(groups).groupby(["label", "locator"], sort=False):
        seeds, cells = own["seed"].nunique(), tables.over_seeds(own, ["task", "located"])
        cells = cells[cells["n"] == seeds].pivot(index="task", columns="located", values="mean")
        title = f"{label}: {name}" + (f" (mean of {seeds} seeds)" if seeds > 1 else "")
        panels.append(heat_panel(title, cells.reindex(index=order, columns=order)))
    return Picture("locator", panels)


def experts(groups: Sequence[Group]) -> Picture:
    """Experts added to each block by each task; the first seed of each label. A blank task was not probed."""
    panels = []
    for title, own in _first_seeds(tables.run_frame(groups, "expansion")):
        wide = own.pivot(index="block", columns="task", values="added").astype(float)
        wide = wide.reindex(index=own["block"].unique(), columns=list(groups[0].runs[0].order))
        panels.append(heat_panel(title, wide, top=2 * max(wide.max(axis=None), 1)))
    return Picture("experts", panels)


def usage(groups: Sequence[Group]) -> Picture:
    """One panel per label and task: the share of each expert (column) of each block (row), probes last."""
    panels = []
    for title, frame in _first_seeds(tables.run_frame(groups, "usage")):
        for task, own in frame.groupby("task", sort=False):
            probe = "p" + (own.groupby(["block", "kind"]).cumcount() + 1).astype(str)
            own = own.assign(expert=own["expert"].astype(object).where(own["kind"] == "expert", probe))
            wide = 100 * own.pivot(index="block", columns="expert", values="share")
            columns = sorted(wide, key=lambda name: (isinstance(name, str), name))
            panels.append(heat_panel(f"{title}: {task}", wide.reindex(index=own["block"].unique(), columns=columns)))
    return Picture("usage", panels)


def parameters(groups: Sequence[Group]) -> Picture:
    """Parameters trained in each task, and stored after it, a line per label."""
    frame, order, panels = tables.run_frame(groups, "parameters"), list(groups[0].runs[0].order), []
    drawn = styles(groups, frame["label"])
    for title, column in (("trained in each task", "trainable"), ("stored after each task", "stored")):
        means = tables.over_seeds(frame, ["label", "task"], column).pivot(index="label", columns="task", values="mean")
        means = means.reindex(index=list(drawn), columns=order)
        panels.append(Panel(title, means, (WIDTH, 2.3), partial(_lines, drawn=drawn)))
    return Picture("parameters", panels, drawn)


def heat_panel(title: str, cells: pd.DataFrame, top: float = 100, stds: pd.DataFrame | None = None) -> Panel:
    """Cells coloured from 0 to `top`, without numbers where there are too many rows to read them; `stds` go beside."""
    longest, widest = (max(map(len, _short(names))) for names in (cells.index, cells.columns))
    row = 0.28 if len(cells) <= 40 else 0.09
    column = 0.44 if stds is None or stds.isna().all(axis=None) else 0.68
    wide = max(column * len(cells.columns), 0.075 * len(title))
    size = (min(WIDTH, 0.4 + 0.065 * longest + wide), 0.5 + 0.045 * widest + row * len(cells))
    return Panel(title, cells, size, partial(_heat, top=top, numbers=row > 0.1, stds=stds))


def _heat(ax: Axes, cells: pd.DataFrame, top: float, numbers: bool, stds: pd.DataFrame | None = None) -> None:
    """The first row is on top, NaN is blank; cells whose row and column have the same name are framed."""
    ax.set_facecolor(BLANK)
    ax.pcolormesh(cells.to_numpy(float), cmap=HEAT, vmin=0, vmax=top, edgecolors=PAPER, linewidth=0.8 * numbers)
    for (y, row), (x, column) in product(enumerate(cells.index), enumerate(cells)):
        value = cells.iat[y, x]
        if numbers and not math.isnan(value):
            ink = "white" if value > 0.55 * top else "black"
            spread = "" if stds is None or math.isnan(stds.iat[y, x]) else f" ±{stds.iat[y, x]:.1f}"
            text = f"{value:.0f}{spread}"
            ax.text(x + 0.5, y + 0.5, text, ha="center", va="center_baseline", fontsize=7.5, color=ink)
        if row == column:
            ax.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, fill=False, edgecolor=PALETTE[1], lw=1.3))
    step = 1 if numbers else math.ceil(len(cells) / 32)
    ax.set_yticks([y + 0.5 for y in range(0, len(cells), step)], _short(cells.index[::step]))
    name_columns(ax, cells, 0.5)
    ax.invert_yaxis()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel=cells.columns.name or "", ylabel=cells.index.name or "")


def _losses(ax: Axes, means: pd.DataFrame, drawn: Styles, name: str, scale: str) -> None:
    """A line per row, over the steps that were logged."""
    for label, values in means.iterrows():
        colour, dash = drawn[str(label)]
        ax.plot(values.dropna().index, values.dropna(), color=colour, ls=dash, lw=1.4, marker="o", ms=2)
    ax.set(xlabel="step", ylabel=name, yscale=scale)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="y")


def _lines(
    ax: Axes,
    means: pd.DataFrame,
    drawn: Styles,
    stds: pd.DataFrame | None = None,
    mark: str = "",
    levels: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """A line per row, a gap where NaN: scores with their deviations, or else counts.

    `mark` names a column, `levels` are from `REFERENCES`.
    """
    for name, level in levels.items():
        ax.axhline(level, color=SOFT, ls=REFERENCES[name][1], lw=1, zorder=0)
    if mark in means:
        ax.axvline(list(means).index(mark), color=SOFT, lw=0.8, ls=(0, (3, 3)), zorder=0)
    for i, (label, values) in enumerate(means.iterrows()):
        colour, dash = drawn[str(label)]
        # A line is wider than the equal ones that are drawn on top of it
        hidden = sum(values.equals(means.iloc[later]) for later in range(i + 1, len(means)))
        ax.plot(list(values), color=colour, ls=dash, lw=1.4 + 2.2 * hidden, marker="o", ms=3 + 3 * hidden)
        if stds is not None:
            low, high = ((values + sign * stds.loc[label]).clip(0, 100) for sign in (-1, 1))
            ax.fill_between(range(len(values)), low, high, color=colour, alpha=0.15, lw=0)
    name_columns(ax, means, 0)
    ax.grid(axis="y")
    if stds is not None:
        ax.set(xlim=(-0.3, means.shape[1] - 0.7), ylabel="score (%)", ylim=(-4, 104), yticks=range(0, 101, 25))
    else:
        ax.set_ylim(0, 1.1 * max(means.max(axis=None), 1))
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tables.show_count(value)))


def _stacks(ax: Axes, shares: pd.DataFrame) -> None:
    ends = shares.cumsum(axis=1)
    for outcome, colour in OUTCOME_COLOURS.items():
        ax.barh(range(len(shares)), shares[outcome], 0.72, ends[outcome] - shares[outcome], color=colour)
    ax.set_yticks(range(len(shares)), _short(shares.index))
    ax.set(ylim=(len(shares) - 0.5, -0.5), xlim=(0, 100), xticks=range(0, 101, 25), xlabel="questions (%)")


def name_columns(ax: Axes, columns: Iterable[object], shift: float) -> None:
    """Write the columns' names below the axis, turned if they are long; `shift` moves them from 0, 1, 2, ..."""
    names = _short(columns)
    turned = max(map(len, names)) > 4
    places = [x + shift for x in range(len(names))]
    ax.set_xticks(places, names, rotation=40 * turned, ha="right" if turned else "center")
    ax.tick_params("x", rotation_mode="anchor")


def _short(names: Iterable[object]) -> list[str]:
    return [name if len(name) <= 22 else name[:21] + "…" for name in map(str, names)]


def _first_seeds(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Title and rows of each label's first seed: experts of different seeds are not the same experts."""
    firsts = frame.groupby("label", sort=False)["seed"].first().items()
    return [(f"{label}, seed {n}", frame[(frame["label"] == label) & (frame["seed"] == n)]) for label, n in firsts]
