"""Tables of a report, and their renderings: Markdown, CSV, LaTeX (booktabs) and the terminal.

A table for people holds formatted cells ("59.23 ± 0.31"); the CSV files hold raw numbers, mean and standard
deviation in columns of their own.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from clmoe.evaluate.matrix import METRICS, ZERO_SHOT, Spread, mean_spread
from clmoe.report.run import Group, Run
from clmoe.utils.files import csv_text

PLUS_MINUS = " ± "
BLANK = "–"
# fwt_n_minus_1 needs a zero-shot row, which few runs have; it stands in the CSV and in `clmoe metrics`.
COMPARED = tuple(name for name in METRICS if name != "fwt_n_minus_1")
_LOWER_IS_BETTER = {"forgetting_max"}
_TASK_ROWS = (ZERO_SHOT, "immediate", "immediate_known", "last")


@dataclass(frozen=True, slots=True)
class Table:
    """Formatted cells; the first `keys` columns name the row and are set flush left.

    `best` holds the (row, column) pairs to be set in bold.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    keys: int = 1
    best: frozenset[tuple[int, int]] = field(default_factory=frozenset)


def matrix_table(run: Run) -> Table:
    """Accuracy matrix of one run: row = after training that task, column = task, percent."""
    rows = tuple(
        (stage, *(show_number(value) for value in run.matrix.rows[stage]))
        for stage in run.matrix.stages
        if stage in run.matrix.rows
    )
    return Table(f"Accuracy matrix: {run.name}", ("after", *run.order), rows)


def comparison_table(groups: Sequence[Group]) -> Table:
    """One row per label: metrics over seeds in percent, parameters, scale, projector, minutes."""
    header = ("label", "seeds", *COMPARED, "trainable parameters", "scale", "projector", "minutes")
    rows = []
    for group in groups:
        seeds = len(group.seeds)
        rows.append(
            (
                group.label,
                str(seeds),
                *(show_spread(group.metric(name), seeds) for name in COMPARED),
                show_spread(group.field("trainable_parameters"), seeds, show_count),
                _distinct([BLANK if run.effective_scale is None else f"{run.effective_scale:g}" for run in group.runs]),
                _distinct(["trained" if run.projector_trained else "frozen" for run in group.runs]),
                show_spread(group.field("minutes"), seeds, lambda value: f"{value:.1f}"),
            )
        )
    return Table("Comparison", header, tuple(rows), best=_best(groups))


def task_table(groups: Sequence[Group]) -> Table:
    """Per label: each task right after its training and after the last one (and zero-shot), percent."""
    tasks = groups[0].runs[0].order
    rows = []
    for group in groups:
        for kind in _TASK_ROWS:
            cells = [group.task_score(kind, task) for task in tasks]
            if not has_row(group, kind):
                continue
            mean = mean_spread([_row_mean(run, kind) for run in group.runs])
            rows.append((group.label, kind, *(show_spread(cell, len(group.runs)) for cell in (*cells, mean))))
    return Table("Scores by task", ("label", "row", *tasks, "mean"), tuple(rows), keys=2)


def limit_note(groups: Sequence[Group]) -> str:
    """Which runs asked only some of the questions before the last row; empty where none is known to."""
    labels: dict[int, list[str]] = {}
    for group in groups:
        for limit in dict.fromkeys(run.limit for run in group.runs):
            if limit is not None and has_row(group, "immediate"):
                labels.setdefault(limit, []).append(group.label)
    return " ".join(
        f"{', '.join(names)}: rows before the last are over a sample of {limit} test questions per task, the last row "
        "is over all."
        for limit, names in sorted(labels.items())
    )


def to_markdown(table: Table) -> str:
    """A GitHub table, without its title; the best cells in bold."""
    marks = ["---" if column < table.keys else "---:" for column in range(len(table.header))]
    lines = [table.header, marks]
    for r, row in enumerate(table.rows):
        cells = [cell.replace("|", "\\|") for cell in row]
        lines.append([f"**{cell}**" if (r, c) in table.best else cell for c, cell in enumerate(cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def to_latex(table: Table) -> str:
    """A booktabs `table` environment, at most one line wide (needs booktabs and graphicx)."""
    columns = "l" * table.keys + "r" * (len(table.header) - table.keys)
    body = []
    for r, row in enumerate(table.rows):
        cells = [_latex(cell) for cell in row]
        cells = [rf"\textbf{{{cell}}}" if (r, c) in table.best else cell for c, cell in enumerate(cells)]
        body.append(" & ".join(cells) + r" \\")
    lines = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{_latex(table.title)}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(_latex(name) for name in table.header) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_text(table: Table, width: int = 100, colour: bool = False) -> str:
    """The table for a terminal of `width` columns.

    Long headers and "mean ± spread" cells take two lines. What still does not fit continues in further
    blocks below, each beginning with the key columns again.
    """
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        highlight=False,
        legacy_windows=False,
    )
    console.print(Text(table.title, style="bold"))
    for columns in _blocks(table, width):
        grid = RichTable(box=None, padding=(0, 1, 0, 0), header_style="bold" if colour else "", pad_edge=False)
        for column in columns:
            key = column < table.keys
            grid.add_column(
                _fold_header(table.header[column]),
                justify="left" if key else "right",
                no_wrap=not key,
                overflow="fold",
            )
        for r, row in enumerate(table.rows):
            grid.add_row(*(Text(_fold_cell(row[c]), style="bold" if (r, c) in table.best else "") for c in columns))
        console.print(grid)
        console.print()
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def comparison_csv(groups: Sequence[Group]) -> str:
    """Raw numbers, one row per label: every metric and its `_std` over seeds, parameters, steps, minutes."""
    numbers = (*METRICS, "trainable_parameters", "adapter_parameters", "minutes")
    fixed = ("scoring", "effective_scale", "projector_trained", "steps_per_task", "limit")
    header = ["label", "method", "seeds", *(name + end for name in numbers for end in ("", "_std")), *fixed]
    rows: list[list[str]] = []
    for group in groups:
        row = [group.label, _distinct([run.method for run in group.runs]), " ".join(map(str, group.seeds))]
        for name in numbers:
            spread = group.metric(name) if name in METRICS else group.field(name)
            row += [raw(spread.mean), raw(spread.std)]
        row += [_distinct([raw(getattr(run, name)) for run in group.runs]) for name in fixed]
        rows.append(row)
    return csv_text([header, *rows])


def task_csv(groups: Sequence[Group]) -> str:
    """Raw numbers, one line per label, kind of row and task: mean, deviation and count over seeds."""
    rows = [["label", "row", "task", "mean", "std", "n"]]
    for group in groups:
        for kind in _TASK_ROWS:
            for task in groups[0].runs[0].order:
                spread = group.task_score(kind, task)
                if spread.n:
                    rows.append([group.label, kind, task, raw(spread.mean), raw(spread.std), str(spread.n)])
    return csv_text(rows)


def _best(groups: Sequence[Group]) -> frozenset[tuple[int, int]]:
    """Cells with the best mean of their metric, as printed, among at least two labels; ties share it.

    Bounds (`multitask`, `separate`, `zero_shot`) do not learn the tasks one after another and are not compared.
    """
    best = set()
    compared = {r: group for r, group in enumerate(groups) if group.runs[0].chain == "sequence"}
    for column, name in enumerate(COMPARED, start=2):
        means = {r: group.metric(name).mean for r, group in compared.items()}
        shown = {r: round(mean, 2) for r, mean in means.items() if mean is not None}
        if len(shown) > 1:
            target = min(shown.values()) if name in _LOWER_IS_BETTER else max(shown.values())
            best |= {(r, column) for r, mean in shown.items() if mean == target}
    return frozenset(best)


def has_row(group: Group, kind: str) -> bool:
    """Whether any run has such a row.

    `immediate` needs a stage before the last one; `last` stands unless each task had an adapter of its own, of which
    the last one knows no other task.
    """
    if kind == "immediate":
        return any(task in run.matrix.rows for run in group.runs for task in run.order[:-1])
    if kind == "last":
        return group.runs[0].chain != "separate"
    return any(score is not None for run in group.runs for score in run.scores(kind).values())


def _row_mean(run: Run, kind: str) -> float | None:
    values = list(run.scores(kind).values())
    return mean_spread(values).mean if None not in values else None


def _blocks(table: Table, width: int) -> list[list[int]]:
    """Split the columns into blocks that fit; the key columns, at most half the width, begin each block."""
    widths = [
        max(
            len(line)
            for text in (_fold_header(table.header[c]), *(_fold_cell(row[c]) for row in table.rows))
            for line in text.split("\n")
        )
        + 1
        for c in range(len(table.header))
    ]
    keys = list(range(table.keys))
    room = max(width - sum(widths[c] for c in keys), width // 2)
    blocks: list[list[int]] = []
    used = room + 1
    for c in range(table.keys, len(table.header)):
        if used + widths[c] > room:
            blocks.append(list(keys))
            used = 0
        blocks[-1].append(c)
        used += widths[c]
    return blocks


def _fold_header(name: str) -> str:
    """Break a long heading at its first underscore or blank."""
    if len(name) <= 9:
        return name
    for mark, kept in (("_", "_"), (" ", "")):
        if mark in name:
            head, tail = name.split(mark, 1)
            return f"{head}{kept}\n{tail}"
    return name


def _fold_cell(text: str) -> str:
    return text.replace(PLUS_MINUS, "\n" + PLUS_MINUS.strip())


def show_number(value: float | None) -> str:
    """Two decimals, or the mark of a value that was not measured."""
    return BLANK if value is None else f"{value:.2f}"


def show_count(value: float) -> str:
    """A parameter count: 90,624 or 61.9 M."""
    return f"{value / 1e6:.1f} M" if value >= 1e7 else f"{round(value):,}"


def show_spread(value: Spread, seeds: int, show: Callable[[float], str] = show_number) -> str:
    """ "mean ± std"; the std is left out for one value, and n is added if some seeds lack the value."""
    if value.mean is None:
        return BLANK
    text = show(value.mean)
    if value.std is not None and not (value.std == 0 and show is show_count):
        text += PLUS_MINUS + show(value.std)
    return text if value.n == seeds else f"{text} (n={value.n})"


def _distinct(values: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def raw(value: float | bool | str | None) -> str:
    """A value in a CSV file: ten digits, and nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _latex(text: str) -> str:
    for plain, escaped in (
        ("\\", r"\textbackslash "),
        *((mark, "\\" + mark) for mark in "&%$#_{}"),
        ("~", r"\textasciitilde "),
        ("^", r"\textasciicircum "),
        ("±", r"$\pm$"),
        (BLANK, "--"),
    ):
        text = text.replace(plain, escaped)
    return text
