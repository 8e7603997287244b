"""Imports go one way: a module may import only from its own room and from rooms below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import clmoe

PACKAGE = Path(clmoe.__file__).parent
ROOMS = (
    "cli",
    "commands",
    "demo",
    "report",
    "evaluate",
    "convert",
    "train",
    "methods",
    "benchmarks",
    "data",
    "model",
    "config",
    "utils",
    "system",
)
FROM_ANYWHERE = ("errors",)


def room(module: str) -> str:
    """``clmoe.train.task`` -> ``train``."""
    return module.split(".")[1] if "." in module else ""


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every clmoe module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the room"
            # ``from clmoe import commands`` imports a module, ``from clmoe.errors import ClmoeError`` a name
            names = [f"clmoe.{alias.name}" for alias in node.names] if node.module == "clmoe" else [node.module or ""]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "clmoe")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def own_room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_file_is_in_a_known_room() -> None:
    assert {own_room(path) for path in FILES} <= {*ROOMS, *FROM_ANYWHERE}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    own = own_room(path)
    allowed = {own, *FROM_ANYWHERE, *(ROOMS[ROOMS.index(own) :] if own in ROOMS else ())}
    wrong = [f"line {line}: {name}" for line, name in imported(path) if room(name) not in allowed]
    assert not wrong, f"{path.relative_to(PACKAGE)} is in room {own!r} and imports upwards: {wrong}"


def test_the_parser_sees_every_form_of_import(tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text(
        "from typing import TYPE_CHECKING\n"
        "import clmoe.cli\n"
        "from clmoe import commands\n"
        "if TYPE_CHECKING:\n"
        "    from clmoe.train.task import TrainRequest\n"
        "def f():\n"
        "    from clmoe.report.run import read_run\n"
    )
    assert [name for _, name in imported(source)] == [
        "clmoe.cli", "clmoe.commands", "clmoe.train.task", "clmoe.report.run",
    ]  # fmt: skip
