"""Writing a report folder from run folders."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import fill

from clmoe.errors import ClmoeError
from clmoe.report.growth import growing, growth_csv, growth_table
from clmoe.report.location import deciders, locator_csv, locator_table
from clmoe.report.run import Group, group_runs
from clmoe.report.tables import (
    Table,
    comparison_csv,
    comparison_table,
    limit_note,
    matrix_table,
    task_csv,
    task_table,
    to_latex,
    to_markdown,
    to_text,
)

FORMATS = ("md", "csv", "tex", "pdf", "html")


def write_report(
    runs: Sequence[Path], output: Path, formats: Sequence[str] = ("md", "csv"), data: Path | None = None
) -> list[Path]:
    """Write tables in the formats asked for, and the pictures, into the folder `output`.

    Files: `report.md`, `report.csv` (comparison) with `tasks.csv` (scores by task), `report.tex`;
    `matrix-<label>-seed<k>.png` per run, `comparison.png` and `forgetting.png`. Where runs have the files of
    `clmoe.report.records`, also `growth.csv`, `locator.csv`, `expansion-<label>-seed<k>.png`,
    `parameters.png` and `locator-<label>.png`. The format pdf writes each picture also as PDF; html is one page,
    `report.html`, that draws its own and needs no other file.

    Args:
        data: the benchmark's data folder, for the images on the page; see `clmoe.report.images`.

    Returns:
        The paths written. The same runs give the same bytes.

    Raises:
        ClmoeError: an unknown format, or what `clmoe.report.run.group_runs` raises.
    """
    for name in formats:
        if name not in FORMATS:
            nearest = get_close_matches(name, FORMATS, n=1, cutoff=0.0)[0]
            raise ClmoeError(f"unknown report format {name!r}; did you mean {nearest!r}? Known: {FORMATS}")
    groups = group_runs(runs)
    output.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(groups, output, ".png") if set(formats) != {"html"} else []
    vectors = _pictures(groups, output, ".pdf") if "pdf" in formats else []
    tables = report_tables(groups)
    texts: dict[str, str] = {}
    if "md" in formats:
        texts["report.md"] = _markdown(groups, tables, pictures)
    if "csv" in formats:
        texts["report.csv"] = comparison_csv(groups)
        texts["tasks.csv"] = task_csv(groups)
        if any(deciders(group) for group in groups):
            texts["locator.csv"] = locator_csv(groups)
        if growing(groups):
            texts["growth.csv"] = growth_csv(groups)
    if "tex" in formats:
        texts["report.tex"] = "\n".join(to_latex(table) for table in tables)
    if "html" in formats:
        from clmoe.report.html import page  # only it needs Pillow

        texts["report.html"] = page(groups, data)
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")
    return [*(output / name for name in texts), *pictures, *vectors]


def report_tables(groups: Sequence[Group]) -> list[Table]:
    """All tables: comparison, scores by task, locator and growth where recorded, an accuracy matrix per run."""
    recorded = [table for table in (locator_table(groups), growth_table(groups)) if table.rows]
    matrices = [matrix_table(run) for group in groups for run in group.runs]
    return [comparison_table(groups), task_table(groups), *recorded, *matrices]


def report_text(runs: Sequence[Path], width: int = 100, colour: bool = False) -> str:
    """The same tables for a terminal of `width` columns, and below them what `limit_note` says."""
    groups = group_runs(runs)
    note = fill(limit_note(groups), width, break_on_hyphens=False)
    return "\n".join([*(to_text(table, width, colour) for table in report_tables(groups)), *([note] if note else [])])


def _pictures(groups: Sequence[Group], output: Path, ending: str) -> list[Path]:
    # Imported here: matplotlib takes most of a second, and the terminal report draws nothing.
    from clmoe.report import growth_plots, location_plots, plots

    paths: list[Path] = []

    def free(stem: str) -> Path:
        """A file name not taken yet: two labels may differ only in characters that file names lack."""
        path, number = output / f"{stem}{ending}", 2
        while path in paths:
            path = output / f"{stem}-{number}{ending}"
            number += 1
        return path

    for group in groups:
        for run in group.runs:
            stem = f"{plots.file_stem(run.label)}-seed{run.seed}"
            paths.append(plots.heat_map(run, free(f"matrix-{stem}")))
            if any(plan.blocks for plan in run.expansion):
                paths.append(growth_plots.expansion_map(run, free(f"expansion-{stem}")))
        if deciders(group):
            path = free(f"locator-{plots.file_stem(group.label)}")
            paths.append(location_plots.confusion_map(group, groups[0].runs[0].order, path))
    if len(groups) > 1:
        paths.append(plots.comparison_heat_maps(groups, free("comparison")))
    paths.append(plots.forgetting_curves(groups, free("forgetting")))
    measured = [group for group in growing(groups) if any(run.parameters for run in group.runs)]
    if measured:
        order = groups[0].runs[0].order
        paths.append(growth_plots.trained_parameters(measured, order, free("parameters")))
    return paths


def _markdown(groups: Sequence[Group], tables: Sequence[Table], pictures: Sequence[Path]) -> str:
    first = groups[0].runs[0]
    orders = dict.fromkeys(run.order for group in groups for run in group.runs)
    steps = dict.fromkeys(run.steps_per_task for group in groups for run in group.runs)
    lines = [
        f"# Report: {first.benchmark}",
        "",
        *(f"Task order: {', '.join(order)}." for order in orders),
        f"Scores are in percent, scoring mode `{first.scoring}`; mean ± sample standard deviation over "
        f"seeds. Steps per task: {', '.join(map(str, steps))}. `–`: not measured.",
        "",
    ]
    for table in tables:
        lines += [f"## {table.title}", "", to_markdown(table)]
    note = limit_note(groups)
    lines += [note, ""] if note else []
    lines += ["## Pictures", ""]
    for picture in pictures:
        lines += [f"![{picture.stem}]({picture.name})", ""]
    return "\n".join(lines)
