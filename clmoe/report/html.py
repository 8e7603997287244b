"""The report as one page that needs nothing else: no network, no further file.

The numbers travel as JSON and the script in `page/` draws them, with texts set as text only. A content security policy
allows the page's own script and style by their hashes and nothing else, so that no answer of a model can run or load
anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from clmoe.report.figures import figures
from clmoe.report.run import Group
from clmoe.report.samples import read_answers, sample_data
from clmoe.report.tables import limit_note

SCRIPTS = ("dom.js", "charts.js", "figures.js", "overview.js", "samples.js", "main.js")
# How scripts/sequence.sh runs a method -> what readers should know of it.
_CHAINS = {
    "sequence": "",
    "separate": "a fresh adapter for each task",
    "union": "all tasks at once, not continual",
    "none": "untrained",
}


def page(groups: Sequence[Group], data: Path | None = None) -> str:
    """The whole page.

    Args:
        data: the benchmark's data folder, for the images of the sample predictions; see `clmoe.report.images`.
    """
    answers = read_answers(groups)
    content = {
        "about": _about(groups),
        "figures": {name: figure.as_json() for name, figure in figures(groups, answers).items()},
        "samples": sample_data(groups, answers, data),
    }
    style, script = _asset("page.css"), "\n".join(_asset(name) for name in SCRIPTS)
    parts = {
        "title": html.escape(f"clmoe report: {groups[0].runs[0].benchmark}"),
        "policy": f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}",
        "style": style,
        "script": script,
        # "<" cannot stand in a script element: "</script>" would end it, whatever its type.
        "data": json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"),
    }
    # All at once, so that nothing inserted is searched again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html"))


def _about(groups: Sequence[Group]) -> dict[str, Any]:
    runs = [run for group in groups for run in group.runs]
    first = runs[0]
    return {
        "benchmark": first.benchmark,
        "scoring": first.scoring,
        "tasks": first.order,
        "orders": list(dict.fromkeys(run.order for run in runs)),
        "limit": limit_note(groups),
        "steps": sorted({run.steps_per_task for run in runs if run.steps_per_task}),
        "version": version("clmoe"),
        "methods": [
            {
                "label": group.label,
                "chain": group.runs[0].chain,
                "note": _CHAINS[group.runs[0].chain],
                "seeds": group.seeds,
            }
            for group in groups
        ],
    }


def _asset(name: str) -> str:
    return (files("clmoe.report") / "page" / name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
