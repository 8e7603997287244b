"""A report folder from run folders. Its page needs no other file; its policy keeps models' answers from running."""

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from clmoe.errors import ClmoeError
from clmoe.report import plots, tables
from clmoe.report.answers import OUTCOMES, explore, image_folders, thumbnail
from clmoe.report.formats import formats_frame
from clmoe.report.runs import Group, group_runs
from clmoe.report.tables import Table
from clmoe.utils.names import unknown

REPORT = "report"  # the default folder of a report: beside several runs, or in one
FORMATS = ("md", "csv", "tex", "pdf", "svg", "html")


@dataclass(frozen=True, slots=True)
class Section:
    """One subject of the report; `data` are the raw numbers, which go to the CSV file `name`."""

    name: str
    title: str
    data: pd.DataFrame
    picture: plots.Picture | None = None
    tables: Sequence[Table] = ()


def write_report(
    runs: Sequence[Path], output: Path, formats: Sequence[str] = ("md", "csv"), data: Path | None = None
) -> list[Path]:
    """Write a report of run folders into the folder `output`, and return the paths; equal runs give equal bytes.

    csv: `report.csv` (one line per run) and the numbers behind each other section; pdf, svg: each picture. Pictures
    are also written as PNG unless html is the only format. `data` is the benchmark's data folder now, for the page's
    images. Raises ClmoeError for an unknown format, for an `output` in a run folder other than its `report`, and as
    `group_runs` does.
    """
    for name in formats:
        if name not in FORMATS:
            raise ClmoeError(unknown("report format", name, FORMATS))
    for folder in (output, *output.parents):
        if (folder / "run.json").is_file() and output.relative_to(folder).parts[:1] != (REPORT,):
            raise ClmoeError(f"--output {output} is in the run folder {folder}, whose files have the same names")
    groups = group_runs(runs)
    counts, shown = explore(groups)
    found = sections(groups, counts)
    output.mkdir(parents=True, exist_ok=True)
    texts: dict[str, str] = {}
    if "md" in formats:
        texts["report.md"] = _render("report.md", groups, sections=found)
    if "tex" in formats:
        texts["report.tex"] = "\n".join(tables.to_latex(table) for section in found for table in section.tables)
    if "csv" in formats:
        texts |= {f"{section.name}.csv": _csv(section.data) for section in found}
    if "html" in formats:
        texts["report.html"] = page(groups, found, shown, data)
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8", errors="replace")  # an answer may hold half a character
    written = [output / name for name in texts]
    endings = [".png"] * (set(formats) != {"html"}) + [f".{name}" for name in ("pdf", "svg") if name in formats]
    for picture in [section.picture for section in found if section.picture and endings]:
        paths = [output / f"{picture.name}{ending}" for ending in endings]
        plots.save(picture, paths)
        written += paths
    return written


def default_folder(runs: Sequence[Path]) -> Path:
    """`report` in the run's folder; for several runs, in the nearest folder that holds them all."""
    if len(runs) == 1:
        return runs[0] / REPORT
    common = Path(os.path.commonpath([run.resolve().parent for run in runs]))
    return (common.relative_to(Path.cwd()) if common.is_relative_to(Path.cwd()) else common) / REPORT


def sections(groups: Sequence[Group], counts: pd.DataFrame) -> list[Section]:
    """All sections that have something to show; `counts` and, below, `shown` are from `explore`."""
    comparison, spent, costs, scores, located, *matrices = tables.report_tables(groups)
    settings, formats, general = tables.settings_frame(groups), formats_frame(groups), tables.general_frame(groups)
    ability = plots.general(groups, general), tables.general_tables(groups, general)
    tuned, glance = tables.tuned_frame(groups), [comparison, spent, costs]
    found = [
        Section("report", "At a glance", tables.metrics_frame(groups), plots.comparison(groups), glance),
        Section("tasks", "Scores by task", tables.scores_frame(groups), None, [scores]),
        Section("matrices", "Accuracy matrices", tables.matrices_frame(groups), plots.matrices(groups), matrices),
        Section("forgetting", "Forgetting curves", plots.curves_frame(groups), plots.forgetting(groups)),
        Section("general", "General ability", general, *ability),
        Section("losses", "Training loss", tables.run_frame(groups, "losses"), plots.losses(groups)),
        Section("measured", "Numbers of the methods", tables.run_frame(groups, "measured"), plots.measured(groups)),
        Section("answers", "Answers then and now", counts, plots.answers(counts)),
        Section("formats", "Only the form forgotten?", formats, None, [tables.formats_table(groups, formats)]),
        Section("locator", "Task locator", tables.located_frame(groups), plots.locator(groups), [located]),
        Section("experts", "Expert growth", tables.run_frame(groups, "expansion"), plots.experts(groups)),
        Section("usage", "Router usage", tables.run_frame(groups, "usage"), plots.usage(groups)),
        Section("parameters", "Parameters", tables.run_frame(groups, "parameters"), plots.parameters(groups)),
        Section("tuned", "Options", tuned, None, [tables.tuned_table(tuned)]),
        Section("settings", "Settings", settings, None, [tables.settings_table(groups)] if len(settings) else []),
    ]
    return [s for s in found if len(s.data) and (s.picture is None or s.picture.panels)]


def page(groups: Sequence[Group], found: Sequence[Section], shown: pd.DataFrame, data: Path | None = None) -> str:
    """The whole page."""
    script = (files("clmoe.report") / "templates" / "page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    columns = ["label", "seed", "task", "question", "prompt", "reference", "then", "then_right", "now", "now_right"]
    return _render(
        "page.html",
        groups,
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        script=Markup(script),
        version=version("clmoe"),
        sections=found,
        colours=plots.VARIABLES,
        questions=_questions(groups, shown, data),
        samples=shown.reindex(columns=[*columns, "located", "outcome"]),
        asked=int(shown.groupby("task")["asked"].first().sum()) if len(shown) else 0,
        outcomes=list(OUTCOMES.values()),
    )


def _render(template: str, groups: Sequence[Group], **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("clmoe.report"),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "breakable": lambda name: re.sub(r"_(?=[a-z]{3})", "_\u200b", name),
        "csv": _data_uri,
        "joined": lambda cell: cell.replace("± ", "±\u00a0"),
        "markdown": tables.to_markdown,
        "svg": lambda panel, picture: Markup(plots.to_svg(picture, panel)),
    }
    remarks = [note for note in (tables.alike_note(groups), tables.limit_note(groups)) if note]
    values |= {"groups": groups, "runs": tables.all_runs(groups), "remarks": remarks}
    return environment.get_template(template).render(values)


def _questions(groups: Sequence[Group], shown: pd.DataFrame, data: Path | None) -> list[dict[str, Any]]:
    """The questions with their image, and the answers of all runs."""
    folders = image_folders(groups, data)
    found = []
    for (task, _), rows in shown.groupby(["task", "question"], sort=False) if len(shown) else ():
        answers = rows.to_dict("records")
        image = answers[0]["image"]
        uri, problem = (None, "no image") if image is None else thumbnail(image, folders[task])
        found.append(answers[0] | {"uri": uri, "problem": problem, "answers": answers})
    return found


def _csv(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, float_format="%.10g", lineterminator="\n")


def _data_uri(frame: pd.DataFrame) -> str:
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(_csv(frame).encode("utf-8", "replace")).decode()
