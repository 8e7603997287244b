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

import posixpath
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, overload

from clmoe.data.json_rows import json_rows, shown
from clmoe.errors import ClmoeError

IMAGE_MARK = "<image>"
GOLD_FIELDS = ("answer", "answers", "answer_bbox", "captions")
"""Fields of which a question must have at least one: what a scorer compares a prediction with."""

LARGE_FILE = 16 * 2**20
"""Training files of this many bytes are not held in memory as records."""

Failed = Callable[[ClmoeError], None]
R = TypeVar("R")

_QUESTION_FIELDS = frozenset({"question_id", "image", "text", "answer"})
_SPEAKERS = ("human", "gpt")


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


class LookedUpRecords(Sequence[TrainRecord]):
    """Records that are made when they are asked for; subclasses say how many there are and make one."""

    @abstractmethod
    def record(self, position: int) -> TrainRecord:
        """The record at ``position``, from 0 to below the length."""

    @overload
    def __getitem__(self, index: int) -> TrainRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[TrainRecord]: ...
    def __getitem__(self, index: int | slice) -> TrainRecord | list[TrainRecord]:
        if isinstance(index, slice):
            return [self.record(i) for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.record(position)


@dataclass(frozen=True, slots=True)
class Question:
    """One test question. ``answer`` is empty only if ``extra`` holds another field of GOLD_FIELDS."""

    question_id: str
    image: str | None
    text: str
    answer: str
    extra: dict[str, Any]


def load_train(path: Path, image_root: Path) -> Sequence[TrainRecord]:
    """Read and validate a training file, its images included (they must exist; they are not decoded).

    Published LLaVA files repeat ids (several conversations about one image), so a repeated id is not an error
    here: its later rows get ``#2``, ``#3``, ... in file order, and ids are unique in the result.

    The records of a file of LARGE_FILE bytes or more are not objects in memory: they are written to a cache on disk
    once, and read from there on access (see ``clmoe.data.stored``).

    Raises ClmoeError at the first bad row.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size >= LARGE_FILE:
        from clmoe.data.stored import stored_train

        return stored_train(path, image_root)
    return list(iterate_train(path, image_root))


def iterate_train(path: Path, image_root: Path, failed: Failed | None = None) -> Iterator[TrainRecord]:
    """The records of ``load_train``, one at a time. With ``failed``, bad rows are told to it and left out."""
    images = _Images(image_root)
    seen: set[str] = set()

    def record(row: _Row) -> TrainRecord:
        name, count = row.identifier("id"), 2
        image = images.checked(row)
        turns = _turns(row, image)
        unique = name
        while unique in seen:
            unique, count = f"{name}#{count}", count + 1
        seen.add(unique)
        return TrainRecord(unique, image, turns)

    return _each_row(path, record, failed)


def load_questions(path: Path, image_root: Path, *, answered: bool = True, images: bool = True) -> list[Question]:
    """Read and validate a question file, its images included (they must exist; they are not decoded).

    A list of strings in ``answer`` (several accepted answers) is moved to ``extra["answers"]``.

    Args:
        answered: every row must hold one of GOLD_FIELDS; False where the expected answers lie in another file.
        images: False where only the rows matter: images need not exist.

    Raises ClmoeError at the first bad row; a repeated question id is one.
    """
    return list(iterate_questions(path, image_root, answered=answered, images=images))


def iterate_questions(
    path: Path, image_root: Path, failed: Failed | None = None, *, answered: bool = True, images: bool = True
) -> Iterator[Question]:
    """The questions of ``load_questions``, one at a time. With ``failed``, bad rows are told to it and left out."""
    checked_images = _Images(image_root, images)
    first_row: dict[str, int] = {}

    def question(row: _Row) -> Question:
        question_id = row.identifier("question_id")
        if question_id in first_row:
            row.fail("question_id", f"already used by row {first_row[question_id]}; ids must be unique")
        first_row[question_id] = row.index
        image = checked_images.checked(row)
        text = _question_text(row, "text", row.text("text", row.data.get("text")), image)
        answer, extra = _gold(row, answered)
        return Question(question_id, image, text, answer, extra)

    return _each_row(path, question, failed)


def _each_row(path: Path, make: Callable[[_Row], R], failed: Failed | None) -> Iterator[R]:
    for index, data in enumerate(json_rows(Path(path))):
        try:
            yield make(_Row(path, index, data))
        except ClmoeError as error:
            if failed is None:
                raise
            failed(error)


class _Row:
    """One JSON object of a file, with the errors that name it."""

    def __init__(self, path: Path, index: int, data: Any) -> None:
        self.path, self.index = path, index
        self.data: dict[str, Any] = data if isinstance(data, dict) else {}
        if not isinstance(data, dict):
            self.fail("", f"expected an object {{...}}, found {shown(data)}")

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
            found = self._found(field) if "[" not in field else shown(value)
            self.fail(field, f"expected a string, found {found}")
        if not value.strip():
            self.fail(field, "expected some text, found an empty string")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            self.fail(field, f"half of a surrogate pair at character {error.start}; write the whole character")
        return value

    def _found(self, field: str) -> str:
        return shown(self.data[field]) if field in self.data else "nothing: the field is missing"


def misplaced(image: str) -> str | None:
    """How an image path, with either kind of slash, does not stay below its image root; None where it does."""
    path = posixpath.normpath(image.replace("\\", "/"))
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return "is absolute; write it relative to"
    return "leaves" if path == ".." or path.startswith("../") else None


class _Images:
    """Checks that image paths stay under one root and, with ``look``, exist; each distinct path is looked up once."""

    def __init__(self, root: Path, look: bool = True) -> None:
        self.root, self.look = Path(root), look
        self._known: set[str] = set()

    def checked(self, row: _Row) -> str | None:
        """The row's normalised image path, or None if the row has no image."""
        value = row.data.get("image")
        if value is None:
            return None
        raw = row.text("image", value)
        image = posixpath.normpath(raw.replace("\\", "/"))
        wrong = misplaced(image)
        if wrong:
            row.fail("image", f"{raw!r} {wrong} the image root {self.root}")
        if self.look and image not in self._known:
            if not self.root.is_dir():
                row.fail("image", f"the image root {self.root} is not a folder; unpack the images there")
            if not (self.root / image).is_file():
                row.fail("image", f"no file {self.root / image}; add the image or correct the path")
            self._known.add(image)
        return image


def _turns(row: _Row, image: str | None) -> tuple[Turn, ...]:
    turns = row.data.get("conversations")
    if not isinstance(turns, list) or not turns:
        row.fail("conversations", f"expected a list human, gpt, human, gpt, ..., found {shown(turns)}")
    values = []
    for number, turn in enumerate(turns):
        field = f"conversations[{number}]"
        if not isinstance(turn, dict):
            row.fail(field, f"expected an object with 'from' and 'value', found {shown(turn)}")
        speaker = _SPEAKERS[number % 2]
        if turn.get("from") != speaker:
            row.fail(
                f"{field}.from",
                f"expected {speaker!r} (human and gpt alternate), found {shown(turn.get('from'))}",
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


def _gold(row: _Row, answered: bool) -> tuple[str, dict[str, Any]]:
    """The expected answer as a string ('' if it lies elsewhere) and the row's further fields."""
    extra = {key: value for key, value in row.data.items() if key not in _QUESTION_FIELDS}
    answer = row.data.get("answer", "")
    if isinstance(answer, list):
        if not answer or "answers" in extra:
            row.fail("answer", "expected a string, or a list of accepted answers and no second list 'answers'")
        extra["answers"] = [row.text(f"answer[{n}]", value) for n, value in enumerate(answer)]
        return "", extra
    if answer == "" and (not answered or any(extra.get(field) for field in GOLD_FIELDS)):
        return "", extra
    if "answer" not in row.data:
        row.fail("answer", f"the question has no expected answer: give one of {', '.join(GOLD_FIELDS)}")
    return row.text("answer", answer), extra
