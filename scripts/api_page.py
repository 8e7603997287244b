"""Write docs/api.md from the code, up to its hand-written tables: ``python scripts/api_page.py``.

A test compares the page with what this makes.
"""

import argparse
import dataclasses
import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import clmoe
from clmoe.cli import VERBS
from clmoe.config import Config
from clmoe.evaluate.loaded import Explanation, LoadedCheckpoint, RouterWeights
from clmoe.experts.config import ExpertConfig
from clmoe.experts.routing import RouteSelection, RouteTrace
from clmoe.locators import LOCATORS
from clmoe.methods import methods
from clmoe.sequence import Result

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
BY_HAND = "## Run folders\n"  # the page keeps what it says from here on


def table(header: str, rows: Iterable[tuple[str, ...]]) -> str:
    columns = tuple(header.split(", "))
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|", *lines]) + "\n"


def first_paragraph(thing: Any) -> str:
    return plain((inspect.getdoc(thing) or "").split("\n\n")[0])


def plain(text: str) -> str:
    """A docstring's text on one line of Markdown."""
    return " ".join(text.split()).replace("``", "`")


def meanings(kind: type) -> dict[str, str]:
    """Descriptions in the section "Attributes:" of a class and its bases; ``a, b: text`` describes both."""
    found: dict[str, str] = {}
    for ancestor in reversed(kind.__mro__[:-1]):
        section = inspect.cleandoc(ancestor.__doc__ or "").partition("Attributes:\n")[2].split("\n\n")[0]
        entries = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8,}.*)*)", section, re.MULTILINE)
        found |= {name: plain(meaning) for names, meaning in entries for name in names.split(", ")}
    return found


def type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return f"{type_name(arguments[0])}, {arguments[1]}"
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin in (types.UnionType, typing.Union):
        return " | ".join("null" if part is type(None) else type_name(part) for part in arguments)
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    return "mapping" if origin is dict else annotation.__name__


def key_table(kind: type, prefix: str = "") -> str:
    """Keys of a dataclass with type, default and meaning; those of nested dataclasses have tables of their own."""
    hints, said, rows = typing.get_type_hints(kind, include_extras=True), meanings(kind), []
    for field in dataclasses.fields(kind):
        if not dataclasses.is_dataclass(hints[field.name]):
            made = None if field.default_factory is dataclasses.MISSING else field.default_factory()
            default = made if field.default is dataclasses.MISSING else field.default
            required = field.default is field.default_factory is dataclasses.MISSING
            shown = "required" if required else f"`{json.dumps(default)}`"
            rows.append((f"`{prefix}{field.name}`", type_name(hints[field.name]), shown, said[field.name]))
    return table("key, type, default, meaning", rows) if rows else "No options of its own.\n"


def config_section() -> Iterator[str]:
    yield "## Configuration keys\n\n"
    yield "Set by a method's YAML, a benchmark's `recipe` (its `methods` is for single methods), a model's YAML "
    yield "and `key=value` on the command line; later ones override earlier ones.\n"
    yield f"\n### Top level\n\n{key_table(Config)}"
    for name, kind in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            yield f"\n### {name}\n\n{key_table(typing.cast(type, kind), f'{name}.')}"
    options = {f"method `{name}`": (kind.Options, "options.") for name, kind in methods().items()}
    options |= {f"locator `{name}`": (kind.Options, "locator.options.") for name, kind in LOCATORS.items()}
    for title, (kind, prefix) in options.items():
        if dataclasses.fields(kind):
            yield f"\n### Options of {title}\n\n{key_table(kind, prefix)}"


def verb_section() -> Iterator[str]:
    yield "## Verbs\n\nAn error that you can fix is one line on stderr and exit code 2. Exit code 75 means stopped by "
    yield "SIGTERM; the same command continues from there.\n"
    for name, (text, add_arguments) in VERBS.items():
        parser = argparse.ArgumentParser(add_help=False)
        add_arguments(parser)
        yield f"\n### clmoe {name}\n\n{text}\n\n{table('argument, default, meaning', map(option_row, parser._actions))}"


def option_row(action: argparse.Action) -> tuple[str, ...]:
    assert action.help, f"{action.dest} has no help"
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    shown = "|".join(action.choices) if action.choices else value
    default = "required" if action.required and action.nargs != "*" else ""
    if action.default not in (None, False, []):
        default = f"`{','.join(action.default) if isinstance(action.default, list) else action.default}`"
    return f"`{' '.join(filter(None, (*action.option_strings[:1], shown)))}`", default, action.help


def python_section() -> Iterator[str]:
    names = {name: getattr(importlib.import_module(module), name) for name, module in clmoe.PUBLIC.items()}
    yield "## Python\n\n`import clmoe` registers the adapter with peft. Public names:\n\n"
    yield table("name, what it is", [(f"`clmoe.{name}`", first_paragraph(thing)) for name, thing in names.items()])
    yield f"\n`clmoe.run{signature(names['run'])}` returns a `Result`;\n"
    yield f"`clmoe.load{signature(names['load'])}` a `LoadedCheckpoint`.\n"
    for kind in (Result, LoadedCheckpoint, Explanation, RouterWeights, ExpertConfig, RouteSelection, RouteTrace):
        yield f"\n### {kind.__name__}\n\n{first_paragraph(kind)}\n\n{table('member, meaning', members(kind))}"


def signature(function: Any) -> str:
    """Names and defaults without types."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "watch")]
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    return f"({', '.join(shown)})"


def members(kind: type) -> Iterator[tuple[str, ...]]:
    fields = meanings(kind)
    yield from ((f"`.{name}`", meaning) for name, meaning in fields.items())
    for name, thing in vars(kind).items():
        if name[0] != "_" and name not in fields and (callable(thing) or isinstance(thing, property)):
            yield f"`.{name}{signature(thing) if callable(thing) else ''}`", first_paragraph(thing)


def api_page() -> str:
    """The whole page."""
    head = "# API\n\n`python scripts/api_page.py` writes this page from the code, up to the run folders' files; "
    head += "`tests/docs/test_api.py` fails if page and code differ.\n\n"
    _, title, rest = PAGE.read_text(encoding="utf-8").partition(BY_HAND)
    return (
        head
        + "\n".join("".join(part()) for part in (python_section, verb_section, config_section))
        + "\n"
        + title
        + rest
    )


if __name__ == "__main__":
    PAGE.write_text(api_page(), encoding="utf-8")
    print(f"written: {PAGE}")
