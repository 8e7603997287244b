"""JSON files of users: strict reading, with errors that name file, line and column."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from clmoe.errors import ClmoeError

_STRING_OR_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|-?\bInfinity\b|\bNaN\b')
_SPACE = re.compile(r"[ \t\n\r]*")
_AT_ONCE = 2**20
"""Texts shorter than this many characters are parsed in one go."""


def json_rows(path: Path) -> Iterator[Any]:
    """The elements of a JSON list, one at a time: of a long file only its text is in memory.

    Raises ClmoeError, possibly after some elements: unreadable, no JSON, no list, or an empty one.
    """
    text = _text(path)
    if len(text) < _AT_ONCE:
        yield from _checked_list(path, _parsed(path, text))
        return
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    position = _after_space(text, 0)
    if text[position : position + 1] != "[" or text[_after_space(text, position + 1)] == "]":
        _checked_list(path, _parsed(path, text))
    while text[position] in "[,":
        try:
            element, position = decoder.raw_decode(text, _after_space(text, position + 1))
        except (ValueError, RecursionError):
            break
        yield element
        position = _after_space(text, position)
        if position == len(text):
            break
    if text[position:].strip() != "]":
        _parsed(path, text)  # says what is wrong and where
        raise ClmoeError(f"{path}: cannot be read as a JSON list of records")


def _after_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]


def _checked_list(path: Path, data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise ClmoeError(f"{path}: expected a JSON list of records at the top level, found {shown(data)}")
    if not data:
        raise ClmoeError(f"{path}: the list of records is empty; expected at least one")
    return data


def read_json_strictly(path: Path) -> Any:
    """Parse strict JSON in UTF-8 without a byte-order mark; NaN and Infinity are not JSON and are refused.

    Raises ClmoeError naming the file, line and column.
    """
    return _parsed(path, _text(path))


def _text(path: Path) -> str:
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ClmoeError(f"{path}: cannot be read ({error.strerror or error}); expected a JSON file") from error
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ClmoeError(f"{path}: begins with a byte-order mark; save it as UTF-8 without one")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ClmoeError(f"{path}: line {line}: byte {error.start} is not UTF-8; save the file as UTF-8") from error


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except _ConstantError as error:
        raise ClmoeError(f"{path}: {_constant_position(text)}: {error} is not JSON; write a number or null") from error
    except json.JSONDecodeError as error:
        hint = " (one object per line? expected one list)" if error.msg == "Extra data" else ""
        message = f"{path}: line {error.lineno}, column {error.colno}: broken JSON: {error.msg}{hint}"
        raise ClmoeError(message) from error
    except (ValueError, RecursionError) as error:
        raise ClmoeError(f"{path}: cannot be parsed as JSON: {error}") from error


class _ConstantError(ValueError):
    """NaN or Infinity was met; the json module does not say where."""


def _refuse_constant(name: str) -> NoReturn:
    raise _ConstantError(name)


def _constant_position(text: str) -> str:
    match = next(m for m in _STRING_OR_CONSTANT.finditer(text) if not m[0].startswith('"'))
    line_start = text.rfind("\n", 0, match.start()) + 1
    return f"line {text.count(chr(10), 0, match.start()) + 1}, column {match.start() - line_start + 1}"


def shown(value: Any) -> str:
    """The value and its JSON type, short enough for one line."""
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    if value is None:
        return "null"
    text = repr(value)
    return f"{kinds[type(value)]} {text if len(text) <= 60 else text[:57] + '...'}"
