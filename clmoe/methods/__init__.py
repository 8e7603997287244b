"""Where a task's knowledge is kept: continual-learning methods, one file per paper.

A file in this folder registers its methods in a dictionary ``METHODS``; nothing else needs to change.
"""

import importlib
import pkgutil
from functools import cache

from clmoe.errors import ClmoeError
from clmoe.methods.base import Method
from clmoe.utils.names import unknown
from clmoe.utils.plugins import installed, named


@cache
def methods() -> dict[str, type[Method]]:
    """All methods of this package by name."""
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "METHODS", {})
    return found


def method_class(name: str) -> type[Method]:
    """The method given by name, Python file (``my_method.py``) or entry point ``clmoe.methods``.

    Raises ClmoeError for an unknown name and for a file that does not register exactly one method.
    """
    found = named(name, "METHODS", methods())
    if found is None:
        raise ClmoeError(unknown("method", name, methods() | installed("METHODS")))
    return found
