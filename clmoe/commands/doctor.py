"""``clmoe doctor``: what is installed and usable here."""

from __future__ import annotations

from argparse import Namespace
from typing import Any


def run(options: Namespace) -> Any:
    """``clmoe doctor``: what is installed and usable here."""
    from clmoe.system.doctor import examine, report_text

    findings = examine()
    options.exit_code = int(any(finding.broken for finding in findings))
    return [finding.as_json() for finding in findings] if options.json else report_text(findings)
