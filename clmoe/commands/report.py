"""``clmoe report``: tables and pictures of runs."""

from __future__ import annotations

from argparse import Namespace
from typing import Any


def run(options: Namespace) -> Any:
    """``clmoe report``."""
    from clmoe.report.run import read_run
    from clmoe.report.write import report_text, write_report

    if options.json:
        return [{"run": str(read.path), "label": read.label, **read.metrics} for read in map(read_run, options.runs)]
    output = options.output or options.runs[0] / "report"
    written = write_report(options.runs, output, options.format, options.data)
    return report_text(options.runs) + "\nwritten: " + ", ".join(str(path) for path in written)
