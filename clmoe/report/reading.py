"""Reading JSON, CSV and line files of a run folder, with errors that name the file and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from clmoe.errors import ClmoeError
from clmoe.utils.files import read_csv

T = TypeVar("T", dict[str, Any], list[Any])


def read_json(path: Path, kind: type[T]) -> T:
    """The content of a JSON file that must hold one object (`dict`) or one list."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ClmoeError(f"{path} is missing; is {path.parent} the folder of a run?") from error
    except (OSError, ValueError) as error:
        raise ClmoeError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, kind):
        wanted = "object" if kind is dict else "list"
        raise ClmoeError(f"{path}: expected one JSON {wanted}, found {type(value).__name__}")
    return value


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, each with its number from 1."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClmoeError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    # Only "\n" ends a line: answers may hold other line breaks of Unicode, which splitlines would cut at.
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def check_field(where: Path | str, info: dict[str, Any], field: str, types: tuple[type, ...]) -> None:
    """Refuse a missing field or one of another type. bool is an int in Python, so it is checked apart."""
    if field not in info:
        raise ClmoeError(f"{where}: field {field!r} is missing")
    value = info[field]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
        raise ClmoeError(f"{where}: field {field!r} is {value!r}; expected {wanted}")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number; Python's reader also lets NaN and Infinity pass."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_rows(path: Path, header: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """The rows of a CSV file that must have exactly this header, each with "file, row N" for messages."""
    table = read_csv(path)
    if not table or table[0][1] != list(header):
        found = repr(",".join(table[0][1])) if table else "an empty file"
        raise ClmoeError(f"{path}, header: expected {','.join(header)!r}, found {found}")
    rows = []
    for line, cells in table[1:]:
        if len(cells) != len(header):
            raise ClmoeError(f"{path}, row {line}: {len(cells)} cells for the {len(header)} columns {','.join(header)}")
        rows.append((f"{path}, row {line}", dict(zip(header, cells, strict=True))))
    return rows


def share_number(where: str, row: dict[str, str], column: str) -> float:
    """The cell of `column` as a number from 0 to 1."""
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ClmoeError(f"{where}, column {column!r}: {row[column]!r} is not a number from 0 to 1")
    return value


def whole_number(where: str, row: dict[str, str], column: str) -> int:
    """The cell of `column` as an integer of at least 0."""
    text = row[column]
    if not (text.isascii() and text.isdigit()):
        raise ClmoeError(f"{where}, column {column!r}: {text!r} is not a whole number of at least 0")
    return int(text)
