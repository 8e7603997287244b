"""The layout of the code: rooms, imports, and the names that a room keeps to itself. docs/design.md shows the same."""

import ast
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import clmoe
from clmoe.config import load_config
from clmoe.evaluate.relocate import usable_locators
from clmoe.methods import methods

PACKAGE = Path(clmoe.__file__).parent
DOCS = PACKAGE.parent / "docs"
SVG = "{http://www.w3.org/2000/svg}"

ORDER = (
    "cli > commands > report, demo > convert > contract, doctor > sequence > evaluate, plan > train > methods > "
    "locators > experts > bases > benchmarks > embedded > data > config > utils > errors"
)
"""A file imports from its own room and from rooms further right; rooms joined by a comma do not know each other."""

LEVELS = {room: level for level, rooms in enumerate(ORDER.split(" > ")) for room in rooms.split(", ")}

LATE = {
    "commands": {"clmoe"},  # its page needs gradio; two verbs draw with matplotlib
    "doctor": {"torch"},  # reports a torch that cannot be imported
    "embedded.scenes": {"sklearn"},
    "evaluate.scoring": {"pycocoevalcap"},
    "locators.gaussian": {"sklearn"},
    "train.state": {"deepspeed"},
}
"""Modules that import inside a function what is optional, or slow and seldom needed; ``cli`` may import anything so."""

BASE_ONLY = r"\b(LlavaForConditionalGeneration|vision_tower|language_model)\b"

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or path.name not in ("__init__.py", "__main__.py")
}
"""``train.task`` -> its file; a package stands for its ``__init__.py``."""


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports(source: str) -> Iterator[tuple[int, str, bool]]:
    """For everything that a file imports: its line, its dotted name, and whether it is inside a function."""
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the room"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name, id(node) in inside) for name in names)


def target(name: str) -> str | None:
    """The module that holds an imported name (``config`` for ``clmoe.config.Config``); None for other packages."""
    parts = name.split(".")
    if parts[0] != "clmoe":
        return None
    known = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
    return next((module for module in known if module in FILES), ".".join(parts[1:2]))


ARROWS = {
    module: {found for _, name, _ in imports(path.read_text()) if (found := target(name)) is not None}
    for module, path in FILES.items()
}
"""Every file, and the files of clmoe that it imports anywhere in it."""

ROOM_ARROWS = {
    (room_of(module), room_of(other))
    for module, others in ARROWS.items()
    for other in others
    if room_of(module) != room_of(other)
}


def test_every_file_is_in_a_known_room() -> None:
    assert {room_of(module) for module in FILES} == LEVELS.keys()


@pytest.mark.parametrize("module", FILES)
def test_imports_go_downwards(module: str) -> None:
    own = room_of(module)
    wrong = {
        other for other in ARROWS[module] if room_of(other) != own and LEVELS.get(room_of(other), 0) <= LEVELS[own]
    }
    assert not wrong, f"clmoe.{module} imports upwards or sideways: {wrong}"


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter({module: others - {module} for module, others in ARROWS.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' <- '.join(error.args[1])}")


def test_only_what_is_optional_or_slow_is_imported_late() -> None:
    late = [
        (module, name.split(".")[0], line)
        for module, path in FILES.items()
        for line, name, inside in imports(path.read_text())
        if inside
    ]
    others = [(module, name) for module, name, _ in late if module != "cli"]
    assert {module: {name for m, name in others if m == module} for module, _ in others} == LATE
    assert len(set(late)) <= 20
    assert [module for module, path in FILES.items() if "TYPE_CHECKING" in path.read_text()] == []
    by_name = {module for module, path in FILES.items() if "import_module" in path.read_text()}
    assert by_name == {"doctor", "methods"}, "the one tries packages, the other finds the files of its own folder"


def test_only_bases_and_convert_know_the_names_of_a_base() -> None:
    others = {module: path for module, path in FILES.items() if room_of(module) not in ("bases", "convert")}
    assert {
        module: found for module, path in others.items() if (found := re.findall(BASE_ONLY, path.read_text()))
    } == {}


def words(source: str) -> Iterator[str]:
    """The identifiers and strings of a file, without its docstrings."""
    tree = ast.parse(source)
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) not in statements:
            yield from (str(value) for name, value in ast.iter_fields(node) if name in ("id", "attr", "name", "arg"))
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_training_and_evaluation_name_no_method() -> None:
    """No method is named but ``clmoe`` (the package), ``zero_shot`` (the matrix's first row) and ``same`` (a word)."""
    names = "|".join(methods().keys() - {"clmoe", "zero_shot", "same"})
    pattern = re.compile(rf"(?<![a-z0-9])({names})(?![a-z0-9])", re.IGNORECASE)
    for module, path in FILES.items():
        if room_of(module) in ("train", "evaluate", "sequence"):
            assert not (found := [word for word in words(path.read_text()) if pattern.search(word)]), (module, found)
            of_methods = {other for other in ARROWS[module] if room_of(other) == "methods"}
            assert of_methods <= {"methods", "methods.base"}, module


def test_a_method_fits_on_a_page_or_two() -> None:
    texts = [path.read_text() for module, path in FILES.items() if room_of(module) == "methods"]
    lengths = [text.count("\n") for text in texts if "\nMETHODS = {" in text]
    assert len(lengths) > 15 and max(lengths) <= 150


def test_the_page_lists_the_arrows_of_the_code() -> None:
    """The last column of design.md's table lists all arrows but those to ``errors``, which are stated once, above."""
    rows = re.findall(
        r"^\| `([a-z_]+)(?:/|\.py)` \|.*\| ([a-z_, ]*) \|$", (DOCS / "design.md").read_text(), re.MULTILINE
    )
    assert [room for room, _ in rows] == list(LEVELS)
    said = {(room, other) for room, others in rows for other in others.split(", ") if other}
    assert said | {(room, "errors") for room in LEVELS if room not in ("doctor", "errors")} == ROOM_ARROWS


def test_the_picture_draws_the_arrows_of_the_code() -> None:
    """The picture draws all arrows except those that a longer path implies, each from a higher to a lower box."""
    picture = ET.parse(DOCS / "images" / "house.svg")
    drawn = {
        (path.get("data-from"), path.get("data-to")) for path in picture.iter(f"{SVG}path") if path.get("data-from")
    }
    assert drawn == {(a, b) for a, b in ROOM_ARROWS if not any((a, c) in ROOM_ARROWS and b in below(c) for c in LEVELS)}
    boxes = {box.get("data-room"): float(box.get("y", 0)) for box in picture.iter(f"{SVG}rect") if box.get("data-room")}
    assert boxes.keys() == LEVELS.keys()
    assert all(boxes[upper] < boxes[lower] for upper, lower in drawn)


def below(room: str) -> set[str]:
    """All rooms that a room reaches through at least one arrow."""
    direct = {lower for upper, lower in ROOM_ARROWS if upper == room}
    return direct.union(*map(below, direct))


def test_the_picture_pairs_methods_and_locators_as_the_configurations_do() -> None:
    picture = ET.parse(DOCS / "images" / "house.svg")
    marks = [mark for mark in picture.iter(f"{SVG}circle") if mark.get("data-method")]
    keepers = {name for name, kind in methods().items() if kind.keeps_parts}
    assert {(mark.get("data-method"), mark.get("data-locator")) for mark in marks} == {
        (method, locator) for method in keepers for locator in usable_locators(method)
    }
    defaults = {(name, load_config(name, {}, []).locator.name) for name in keepers}
    assert {(m.get("data-method"), m.get("data-locator")) for m in marks if m.get("class") == "default"} == defaults
    listed = [text.text or "" for text in picture.iter(f"{SVG}text") if text.get("class") == "mono same"]
    assert set(" ".join(listed).split()) == methods().keys() - keepers
