"""Where a task's knowledge is kept: continual-learning methods, one file per paper.

A file of this folder registers its methods in a dictionary ``METHODS``; nothing else has to be edited.
"""

import importlib
import importlib.util
import pkgutil
import sys
from functools import cache
from pathlib import Path

from clmoe.errors import ClmoeError
from clmoe.methods.base import Method
from clmoe.utils.names import unknown


@cache
def methods() -> dict[str, type[Method]]:
    """All methods of this package by name."""
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "METHODS", {})
    return found


def method_class(name: str) -> type[Method]:
    """The method of that name, or of a Python file (``my_method.py``), which must register exactly one.

    Raises ClmoeError for an unknown name and for a file that does not.
    """
    if name.endswith(".py"):
        return _from_file(Path(name).expanduser().resolve())
    if name not in methods():
        raise ClmoeError(unknown("method", name, methods()))
    return methods()[name]


@cache
def _from_file(path: Path) -> type[Method]:
    if not path.is_file():
        raise ClmoeError(f"method {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"clmoe_method_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    registered = list(getattr(module, "METHODS", {}).values())
    if len(registered) != 1:
        raise ClmoeError(f"{path}: expected METHODS = {{name: class}} with one method, found {len(registered)}")
    return registered[0]
