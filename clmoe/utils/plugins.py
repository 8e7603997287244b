"""Methods and locators from outside the package: a Python file, or an installed package's entry point."""

import importlib.util
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from clmoe.errors import ClmoeError

GROUPS = {"METHODS": "clmoe.methods", "LOCATORS": "clmoe.locators"}
"""The dictionary that a file registers its class in, and the group of entry points, which name the class itself."""


@cache
def from_file(path: Path, registry: str) -> Any:
    """The class that a file registers, ``METHODS = {name: class}``; the same one each time.

    Raises ClmoeError, naming the file, if it does not exist, cannot be run, or does not register exactly one.
    """
    kind = registry.lower().removesuffix("s")
    if not path.is_file():
        raise ClmoeError(f"{kind} {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"clmoe_{kind}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    registered = list(getattr(module, registry, {}).values())
    if len(registered) != 1:
        raise ClmoeError(f"{path}: expected {registry} = {{name: class}} with one {kind}, found {len(registered)}")
    return registered[0]


def installed(registry: str) -> dict[str, Any]:
    """The entry points of installed packages by name, not yet loaded: ``load`` imports the class."""
    return {point.name: point for point in entry_points(group=GROUPS[registry])}


def named(name: str, registry: str, known: dict[str, Any]) -> Any:
    """The class of that name, of a file's path ending in ``.py``, or of an entry point; None for an unknown name.

    A name of the package wins over an entry point's.
    """
    if name.endswith(".py"):
        return from_file(Path(name).expanduser().resolve(), registry)
    if name not in known and name in (others := installed(registry)):
        return others[name].load()
    return known.get(name)
