"""Rows of JSON files: strict parsing, and faults that name file, row (counted from 0) and field.

Faults are collected so that all are reported at once, and grouped so that 200 equal ones take one line.
"""

import json
import posixpath
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from clmoe.errors import ClmoeError

END = "</s>"
LONGEST = 80
LONGEST_ID = 500
SHOWN = 50  # lines of a report at most

_IMAGE_KEY = re.compile(
    r"\s*(image|img|picture|photo|pic)s?([_-]?(path|file|name|file_?name|url)s?)?\s*", re.IGNORECASE
)
_IMAGE_FILE = re.compile(r"[^\n]+\.(jpe?g|png|gif|bmp|webp|tiff?)", re.IGNORECASE)


# ---- JSON


class _Repeating(dict[str, Any]):
    """An object with a key that occurs twice."""

    key: str


def read_json_strictly(path: Path, *, rows: bool = False) -> Any:
    """Parse strict JSON: UTF-8 without a byte-order mark, no NaN, no Infinity, no key twice in an object.

    With ``rows``, an object with a repeated key is left to the reader of its row. Raises ClmoeError that says where.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ClmoeError(f"{path}: cannot be read ({error.strerror or error}); expected a JSON file") from error
    try:
        return parse_json(data, rows=rows)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ClmoeError(f"{path}: line {line}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        lines = " (one object per line? expected one list; name the file .jsonl)"
        hint = lines if error.msg == "Extra data" else ""
        where = f"line {error.lineno}, column {error.colno}"
        raise ClmoeError(f"{path}: {where}: broken JSON: {error.msg}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise ClmoeError(f"{path}: cannot be parsed as JSON: {error}") from error


def parse_json(data: bytes, *, rows: bool = False) -> Any:
    """Strict JSON as ``read_json_strictly`` describes it. Raises ValueError; the callers know where."""

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        repeating, keys = _Repeating(found), [key for key, _ in pairs]
        repeating.key = next(key for key in keys if keys.count(key) > 1)
        if not rows:
            raise ValueError(f"key {short(repeating.key)!r} occurs twice in an object; remove one")
        return repeating

    text = data.decode("utf-8")
    value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=made)
    if not rows and "\\ud" in text.lower():  # perhaps half a surrogate pair, which no file of answers can hold
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def json_rows(path: Path) -> list[Any]:
    """The elements of a JSON list. Raises ClmoeError as ``read_json_strictly``, and if it is no list or empty."""
    data = read_json_strictly(path, rows=True)
    if not isinstance(data, list):
        raise ClmoeError(f"{path}: expected a JSON list of records at the top level, found {shown(data)}")
    if not data:
        raise ClmoeError(f"{path}: the list of records is empty; expected at least one")
    return data


def shown(value: Any) -> str:
    """The JSON type and the value, short enough for one line."""
    if value is None:
        return "nothing (null, or the field is missing)"
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    text = repr(value)
    return f"{kinds.get(type(value), 'a number')} {text if len(text) <= 60 else text[:57] + '...'}"


def _repeated(value: Any) -> str | None:
    """A key that occurs twice in the value or in something in it."""
    if isinstance(value, _Repeating):
        return value.key
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((key for item in inner if (key := _repeated(item)) is not None), None)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write a number or null")


# ---- Faults


class RowError(ClmoeError):
    """A row that cannot be used. ``problem`` is the same for all rows with this fault, ``found`` is this row's own."""

    def __init__(self, path: str, row: int, name: str | None, field: str, problem: str, found: str = "") -> None:
        super().__init__(path, row, name, field, problem, found)
        self.path, self.row, self.name, self.field, self.problem, self.found = path, row, name, field, problem, found

    def __str__(self) -> str:
        where = f"row {self.row} (from 0)" + (f", id {self.name}" if self.name else "")
        return f"{self.path}: {where}" + (f", field '{self.field}'" if self.field else "") + f": {self.what}"

    @property
    def what(self) -> str:
        return self.problem + (f", found {self.found}" if self.found else "")


@dataclass
class Seen:
    """What reading a file found besides its records: row numbers, from 0, and how many rows hold which unread key.

    ``cut``: rows whose answers go beyond the maximum length.
    """

    rows: int = 0
    without_image: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)
    bad: list[ClmoeError] = field(default_factory=list)

    def notes(self, *, images: bool = True) -> list[str]:
        """What is worth knowing but not a fault, a line each; with ``images``, also the rows that have none."""
        unread = (f"{n} of {self.rows} rows hold the key {short(key)!r}" for key, n in sorted(self.unread.items()))
        lines = [f"{line}, which is not read" for line in unread]
        odd = {
            "have no image": self.without_image if images else [],
            "lose answer tokens at the maximum length": self.cut,
        }
        return lines + [
            f"{len(rows)} of {self.rows} rows {what} ({ranges(rows)})" for what, rows in odd.items() if rows
        ]


def short(value: object) -> str:
    """A value as text that fits on a line."""
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 20]}... ({len(text)} characters)"


def ranges(rows: Iterable[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0-2, 5``; at most ten of them."""
    parts = []
    for _, pairs in groupby(enumerate(sorted(rows)), lambda pair: pair[1] - pair[0]):
        run = [row for _, row in pairs]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(parts[:10]) + (", ..." if len(parts) > 10 else "")


def grouped(errors: Sequence[ClmoeError]) -> list[str]:
    """A line for each kind of fault, in order of first occurrence."""
    groups: dict[Any, list[ClmoeError]] = {}
    for error in errors:
        kind: Any = id(error)
        if isinstance(error, RowError):
            kind = (error.path, re.sub(r"\d+", "", error.field), error.problem)
        groups.setdefault(kind, []).append(error)
    return [str(group[0]) if len(group) == 1 else _of_group(group) for group in groups.values()]


def _of_group(errors: list[Any]) -> str:
    first, found = errors[0], {error.found for error in errors}
    fields = {error.field for error in errors}
    name = first.field if len(fields) == 1 else re.sub(r"\d+", "n", first.field)
    what = first.what if len(found) == 1 else f"{first.problem}, found for instance {first.found}"
    rows = f"{len(errors)} rows ({ranges(error.row for error in errors)})"
    return f"{first.path}: {rows}" + (f", field '{name}'" if name else "") + f": {what}"


def all_of(errors: Sequence[ClmoeError]) -> ClmoeError:
    """One error that reports all of them."""
    lines = grouped(errors)
    rest = [f"and {len(lines) - SHOWN} more kinds of fault"] if len(lines) > SHOWN else []
    return ClmoeError("\n".join([*lines[:SHOWN], *rest]))


# ---- One row


class Row:
    """One JSON object of a file, of which ``keys`` are read, with the errors that name it.

    A row that was made from another format has ``names`` (our field -> what the file calls it) and may have ``unread``
    keys of its own. If it is ``held``, the file itself stores its image; if it is ``numbered``, the file has no id.
    """

    def __init__(self, path: Path, index: int, data: Any, keys: Collection[str] = ()) -> None:
        self.path, self.index, self.keys = path, index, keys
        self.names: dict[str, str] = {}
        self.unread: Collection[str] = ()
        self.held = self.numbered = False
        self.data: dict[str, Any] = data if isinstance(data, dict) else {}
        if not isinstance(data, dict):
            self.fail("", "expected an object {...}", shown(data))
        if (key := _repeated(data)) is not None:
            self.fail(short(key), "the key occurs twice in an object; remove one")

    def fail(self, field: str, problem: str, found: str = "") -> NoReturn:
        keys = () if self.numbered else ("id", "question_id")
        name = next((short(repr(self.data[key])) for key in keys if key in self.data), None)
        raise RowError(str(self.path), self.index, name, self.names.get(field, field), problem, found)

    def unfit(self, field: str, value: Any, expected: str) -> NoReturn:
        """The field does not hold what is expected."""
        missing = value is None and field not in self.data and "[" not in field
        self.fail(field, f"{'missing; ' if missing else ''}expected {expected}", "" if missing else shown(value))

    def identifier(self, field: str) -> str:
        value = self.data.get(field)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            self.unfit(field, value, "a string or an integer")
        if isinstance(value, str) and len(value) > LONGEST_ID:
            self.unfit(field, value, f"at most {LONGEST_ID} characters")
        return self.encodable(field, str(value))

    def text(self, field: str, value: Any) -> str:
        """A non-empty string that can be written as UTF-8."""
        if not isinstance(value, str) or not value.strip():
            self.unfit(field, value, "some text")
        return self.encodable(field, value)

    def encodable(self, field: str, value: str) -> str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            self.fail(field, f"half of a surrogate pair at character {error.start}; write the whole character")
        return value

    def spoken(self, field: str, value: Any) -> str:
        """A text that goes into the conversation, where the end token ends an answer."""
        text = self.text(field, value)
        if END in text:
            self.fail(field, f"holds the end token {END}, which ends every answer by itself; remove it from the text")
        return text

    def image(self, root: Path, known: set[str] | None) -> str | None:
        """The normalised image path. The file must exist; ``known`` ones are not looked up, with None none is."""
        if self.data.get("image") is None:
            self.no_other_image()
            return None
        raw = self.text("image", self.data["image"])
        image = posixpath.normpath(raw.replace("\\", "/"))
        if wrong := misplaced(image):
            self.fail("image", f"the path {wrong} the image root {root}", shown(raw))
        if known is not None and image not in known and not self.held:
            problem = "no such file; add the image or correct the path"
            try:
                there = (Path(root) / image).is_file()
            except OSError as error:  # a name that is too long, a folder without permission
                there, problem = False, f"cannot be looked up ({error.strerror}); correct the path"
            if not there:
                self.fail("image", problem, f"{root}/{short(image)}")
            known.add(image)
        return image

    def no_other_image(self) -> None:
        """A row without an image must not name one under another key: it would be read as text only."""
        for key, value in self.data.items():
            if key in self.keys or not value:
                continue
            first = value[0] if isinstance(value, list) else value
            named = _IMAGE_KEY.fullmatch(key) and isinstance(value, str | list | dict)
            if named or (isinstance(first, str) and _IMAGE_FILE.fullmatch(first)):
                fix = "looks like an image; only the key 'image' names images, one per row; rename the key"
                self.fail(short(key), fix, shown(value))


def misplaced(image: str) -> str | None:
    """Why an image path, with either kind of slash, does not stay below its image root; None if it does."""
    path = posixpath.normpath(image.replace("\\", "/"))
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return "is absolute; write it relative to"
    return "leaves" if path == ".." or path.startswith("../") else None
