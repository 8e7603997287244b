"""``clmoe metrics``: of any accuracy matrix."""

from __future__ import annotations

from argparse import Namespace
from typing import Any


def run(options: Namespace) -> Any:
    """``clmoe metrics``."""
    from clmoe.evaluate.continual import metrics_from_files

    result = metrics_from_files(options.matrix, options.immediate)
    rounded = {name: None if value is None else round(value, 2) for name, value in result.items()}
    if options.json:
        return rounded
    return "\n".join(f"{name:<16}{'' if value is None else format(value, '8.2f')}" for name, value in rounded.items())
