"""Training and question files: their schema, and errors that name file, row and field.

Both are JSON lists in the layout of LLaVA and of the benchmarks built on it:

* training: ``{"id", "image"?, "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt",
  "value": ...}, ...]}``
* questions: ``{"question_id", "image"?, "text", "answer", ...}``; every further key is kept in
  ``Question.extra``.

What reading changes, and nothing else: ids become strings; white space around questions and training answers
is removed (the prompt puts exactly one space before an answer); the ``<image>`` mark is taken out of the
text, because the prompt always puts the image first; image paths are normalised (``./a/../b.jpg`` becomes
``b.jpg``). The expected answers of question files are kept as they are. Rows are counted from 0. This module
must stay free of torch: fast verbs import it.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from clmoe.errors import ClmoeError

IMAGE_MARK = "<image>"
GOLD_FIELDS = ("answer", "answers", "answer_bbox", "captions")
"""Fields of which a question must have at least one: what a scorer compares a prediction with."""

_QUESTION_FIELDS = frozenset({"question_id", "image", "text", "answer"})
_SPEAKERS = ("human", "gpt")
_STRING_OR_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|-?\bInfinity\b|\bNaN\b')


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer; the question is without the ``<image>`` mark."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class TrainRecord:
    """One training conversation. ``image`` is relative to the image root, ``None`` for text only."""

    id: str
    image: str | None
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """One test question. ``answer`` is empty only if ``extra`` holds another field of GOLD_FIELDS."""

    question_id: str
    image: str | None
    text: str
    answer: str
    extra: dict[str, Any]


def load_train(path: Path, image_root: Path) -> list[TrainRecord]:
    """Read and validate a training file, its images included (they must exist; they are not decoded).

    Published LLaVA files repeat ids (several conversations about one image), so a repeated id is not an error
    here: its later rows get ``#2``, ``#3``, ... in file order, and ids are unique in the result.

    Raises ClmoeError at the first bad row.
    """
    images = _Images(image_root)
    seen: set[str] = set()
    records = []
    for row in _rows(path):
        name, count = row.identifier("id"), 2
        unique = name
        while unique in seen:
            unique, count = f"{name}#{count}", count + 1
        seen.add(unique)
        image = images.checked(row)
        records.append(TrainRecord(unique, image, _turns(row, image)))
    return records


def below(records: Iterable[TrainRecord], task: str, image_root: Path, root: Path) -> list[TrainRecord]:
    """The records of a task with images relative to ``root`` and ids that name the task, to stand beside others'."""
    prefix = os.path.relpath(image_root, root)
    return [
        replace(
            record,
            id=f"{task}/{record.id}",
            image=None if record.image is None else str(Path(prefix) / record.image),
        )
        for record in records
    ]


def load_questions(path: Path, image_root: Path) -> list[Question]:
    """Read and validate a question file, its images included (they must exist; they are not decoded).

    A list of strings in ``answer`` (several accepted answers) is moved to ``extra["answers"]``.

    Raises ClmoeError at the first bad row; a repeated question id is one.
    """
    images = _Images(image_root)
    first_row: dict[str, int] = {}
    questions = []
    for row in _rows(path):
        question_id = row.identifier("question_id")
        if question_id in first_row:
            row.fail("question_id", f"already used by row {first_row[question_id]}; ids must be unique")
        first_row[question_id] = row.index
        image = images.checked(row)
        text = _question_text(row, "text", row.text("text", row.data.get("text")), image)
        answer, extra = _gold(row)
        questions.append(Question(question_id, image, text, answer, extra))
    return questions


class _Row:
    """One JSON object of a file, with the errors that name it."""

    def __init__(self, path: Path, index: int, data: Any) -> None:
        self.path, self.index = path, index
        self.data: dict[str, Any] = data if isinstance(data, dict) else {}
        if not isinstance(data, dict):
            self.fail("", f"expected an object {{...}}, found {_shown(data)}")

    def fail(self, field: str, problem: str) -> NoReturn:
        name = next((self.data[key] for key in ("id", "question_id") if key in self.data), None)
        where = f"row {self.index} (from 0)" + (f", id {name!r}" if name is not None else "")
        raise ClmoeError(f"{self.path}: {where}" + (f", field '{field}': " if field else ": ") + problem)

    def identifier(self, field: str) -> str:
        value = self.data.get(field)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            self.fail(field, f"expected a string or an integer, found {self._found(field)}")
        return str(value)

    def text(self, field: str, value: Any) -> str:
        """A non-empty string that can be written as UTF-8."""
        if not isinstance(value, str):
            found = self._found(field) if "[" not in field else _shown(value)
            self.fail(field, f"expected a string, found {found}")
        if not value.strip():
            self.fail(field, "expected some text, found an empty string")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            self.fail(field, f"half of a surrogate pair at character {error.start}; write the whole character")
        return value

    def _found(self, field: str) -> str:
        return _shown(self.data[field]) if field in self.data else "nothing: the field is missing"


class _Images:
    """Checks that image paths stay under one root and exist; each distinct path is looked up once."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._known: set[str] = set()

    def checked(self, row: _Row) -> str | None:
        """The row's normalised image path, or None if the row has no image."""
        value = row.data.get("image")
        if value is None:
            return None
        raw = row.text("image", value)
        image = posixpath.normpath(raw.replace("\\", "/"))
        if image.startswith("/") or re.match(r"[A-Za-z]:", image):
            row.fail("image", f"{raw!r} is absolute; write it relative to the image root {self.root}")
        if image == ".." or image.startswith("../"):
            row.fail("image", f"{raw!r} leaves the image root {self.root}")
        if image not in self._known:
            if not self.root.is_dir():
                row.fail("image", f"the image root {self.root} is not a folder; unpack the images there")
            if not (self.root / image).is_file():
                row.fail("image", f"no file {self.root / image}; add the image or correct the path")
            self._known.add(image)
        return image


def _turns(row: _Row, image: str | None) -> tuple[Turn, ...]:
    turns = row.data.get("conversations")
    if not isinstance(turns, list) or not turns:
        row.fail("conversations", f"expected a list human, gpt, human, gpt, ..., found {_shown(turns)}")
    values = []
    for number, turn in enumerate(turns):
        field = f"conversations[{number}]"
        if not isinstance(turn, dict):
            row.fail(field, f"expected an object with 'from' and 'value', found {_shown(turn)}")
        speaker = _SPEAKERS[number % 2]
        if turn.get("from") != speaker:
            row.fail(
                f"{field}.from",
                f"expected {speaker!r} (human and gpt alternate), found {_shown(turn.get('from'))}",
            )
        values.append(row.text(f"{field}.value", turn.get("value")))
    if len(values) % 2:
        row.fail("conversations", "the last question has no answer; add a gpt turn or remove the question")
    if image is not None and IMAGE_MARK not in values[0]:
        row.fail(
            "conversations[0].value",
            f"'image' is set, but {IMAGE_MARK} is missing; write it before the question",
        )
    result = []
    for number in range(0, len(values), 2):
        field = f"conversations[{number}].value"
        if number and IMAGE_MARK in values[number]:
            row.fail(field, f"{IMAGE_MARK} may stand in the first human turn only")
        if IMAGE_MARK in values[number + 1]:
            row.fail(f"conversations[{number + 1}].value", f"{IMAGE_MARK} may not stand in an answer")
        result.append(Turn(_question_text(row, field, values[number], image), values[number + 1].strip()))
    return tuple(result)


def _question_text(row: _Row, field: str, value: str, image: str | None) -> str:
    """The text without its image mark; there may be one mark, and only if the row has an image."""
    count = value.count(IMAGE_MARK)
    if count > 1:
        row.fail(field, f"expected one {IMAGE_MARK}, found {count}; one image per record is supported")
    if count and image is None:
        row.fail(field, f"{IMAGE_MARK} is used, but the row has no field 'image'; add it or remove the mark")
    text = value.replace(IMAGE_MARK, "").strip()
    if not text:
        row.fail(field, f"expected a question besides {IMAGE_MARK}, found none")
    return text


def _gold(row: _Row) -> tuple[str, dict[str, Any]]:
    """The expected answer as a string ('' if it lies elsewhere) and the row's further fields."""
    extra = {key: value for key, value in row.data.items() if key not in _QUESTION_FIELDS}
    answer = row.data.get("answer", "")
    if isinstance(answer, list):
        if not answer or "answers" in extra:
            row.fail("answer", "expected a string, or a list of accepted answers and no second list 'answers'")
        extra["answers"] = [row.text(f"answer[{n}]", value) for n, value in enumerate(answer)]
        return "", extra
    if answer == "" and any(extra.get(field) for field in GOLD_FIELDS):
        return "", extra
    if "answer" not in row.data:
        row.fail("answer", f"the question has no expected answer: give one of {', '.join(GOLD_FIELDS)}")
    return row.text("answer", answer), extra


def _rows(path: Path) -> Iterator[_Row]:
    data = _read_json(path)
    if not isinstance(data, list):
        raise ClmoeError(f"{path}: expected a JSON list of records at the top level, found {_shown(data)}")
    if not data:
        raise ClmoeError(f"{path}: the list of records is empty; expected at least one")
    return (_Row(path, index, item) for index, item in enumerate(data))


def _read_json(path: Path) -> Any:
    """Parse strict JSON in UTF-8 without a byte-order mark; NaN and Infinity are not JSON and are refused."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ClmoeError(f"{path}: cannot be read ({error.strerror or error}); expected a JSON file") from error
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ClmoeError(f"{path}: begins with a byte-order mark; save it as UTF-8 without one")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ClmoeError(f"{path}: line {line}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
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


def _shown(value: Any) -> str:
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
