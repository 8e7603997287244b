"""Training and question files in LLaVA's layout, and the records of several tasks as one sequence.

Ids become strings, white space around questions and training answers and the mark ``<image>`` go (the prompt puts the
image first), and image paths are normalised. Every error names the file, the row (counted from 0) and the field.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import sys
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, count
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar

from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock
from pyarrow import ArrowException

from clmoe.errors import ClmoeError
from clmoe.utils.files import file_sha256, flush, json_sha256
from clmoe.utils.tensors import writing

IMAGE_MARK = "<image>"
GOLD_FIELDS = ("answer", "answers", "answer_bbox", "captions")
"""A question must have at least one of these: what a scorer compares a prediction with."""

LARGE_FILE = 16 * 2**20
"""Training files of at least this many bytes are not held in memory."""

Failed = Callable[[ClmoeError], None]
R = TypeVar("R")

_TEXT = Value("string")
_COLUMNS = Features({"id": _TEXT, "image": _TEXT, "turns": [{"question": _TEXT, "answer": _TEXT}]})
_CACHE_FORMAT = 2
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


# ---- JSON


def read_json_strictly(path: Path) -> Any:
    """Parse strict JSON: UTF-8 without a byte-order mark, no NaN and no Infinity. Raises ClmoeError with the place."""
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise ClmoeError(f"{path}: cannot be read ({error.strerror or error}); expected a JSON file") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ClmoeError(f"{path}: line {line}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        hint = " (one object per line? expected one list)" if error.msg == "Extra data" else ""
        where = f"line {error.lineno}, column {error.colno}"
        raise ClmoeError(f"{path}: {where}: broken JSON: {error.msg}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise ClmoeError(f"{path}: cannot be parsed as JSON: {error}") from error


def json_rows(path: Path) -> list[Any]:
    """The elements of a JSON list. Raises ClmoeError as ``read_json_strictly``, and for no list or an empty one."""
    data = read_json_strictly(path)
    if not isinstance(data, list):
        raise ClmoeError(f"{path}: expected a JSON list of records at the top level, found {shown(data)}")
    if not data:
        raise ClmoeError(f"{path}: the list of records is empty; expected at least one")
    return data


def count_records(path: Path) -> int:
    """Number of objects in a training or question file; their fields are not checked. Raises as ``json_rows``."""
    return len([_Row(path, index, data) for index, data in enumerate(json_rows(path))])


def shown(value: Any) -> str:
    """The JSON type and the value, short enough for one line."""
    if value is None:
        return "nothing (null, or the field is missing)"
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    text = repr(value)
    return f"{kinds.get(type(value), 'a number')} {text if len(text) <= 60 else text[:57] + '...'}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write a number or null")


# ---- Records


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


def load_train(path: Path, image_root: Path) -> Sequence[TrainRecord]:
    """Read and check a file of ``{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value": ...}, ...]}``.

    The images must exist; they are not decoded. Published LLaVA files repeat ids: later rows of an id get ``#2``,
    ``#3``, ... Records of a file of LARGE_FILE bytes or more stay on disk. Raises ClmoeError at the first bad row.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size >= LARGE_FILE:
        return _stored_train(path, image_root)
    return list(iterate_train(path, image_root))


def iterate_train(path: Path, image_root: Path, failed: Failed | None = None) -> Iterator[TrainRecord]:
    """The records of ``load_train``, one at a time. With ``failed``, bad rows are reported to it and skipped."""
    known: set[str] = set()
    seen: set[str] = set()

    def record(row: _Row) -> TrainRecord:
        name = unique = row.identifier("id")
        image = row.image(image_root, known)
        turns, repeats = _turns(row, image), count(2)
        while unique in seen:
            unique = f"{name}#{next(repeats)}"
        seen.add(unique)
        return TrainRecord(unique, image, turns)

    return _each_row(path, record, failed)


def load_questions(
    path: Path, image_root: Path, failed: Failed | None = None, *, answered: bool = True, images: bool = True
) -> list[Question]:
    """Read and check a file of ``{"question_id", "image"?, "text", "answer", ...}``; other keys end up in ``extra``.

    Expected answers stay as they are; a list in ``answer`` (several accepted ones) is moved to ``extra["answers"]``.
    ``answered``: every row must have one of GOLD_FIELDS. ``images``: the images must exist. Raises ClmoeError at the
    first bad row, as one with a repeated id; with ``failed``, bad rows are reported to it and skipped.
    """
    known: set[str] | None = set() if images else None
    first_row: dict[str, int] = {}

    def question(row: _Row) -> Question:
        question_id = row.identifier("question_id")
        if question_id in first_row:
            row.fail("question_id", f"already used by row {first_row[question_id]}; ids must be unique")
        first_row[question_id] = row.index
        image = row.image(image_root, known)
        text = _question_text(row, "text", row.text("text", row.data.get("text")), image)
        return Question(question_id, image, text, *_gold(row, answered))

    return list(_each_row(path, question, failed))


def _each_row(path: Path, make: Callable[[_Row], R], failed: Failed | None) -> Iterator[R]:
    for index, data in enumerate(json_rows(path)):
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
            self.fail(field, f"expected a string or an integer, found {shown(value)}")
        return str(value)

    def text(self, field: str, value: Any) -> str:
        """A non-empty string that can be written as UTF-8."""
        if not isinstance(value, str) or not value.strip():
            self.fail(field, f"expected some text, found {shown(value)}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            self.fail(field, f"half of a surrogate pair at character {error.start}; write the whole character")
        return value

    def image(self, root: Path, known: set[str] | None) -> str | None:
        """The normalised image path. The file must exist; ``known`` ones are not looked up again, with None none is."""
        if self.data.get("image") is None:
            return None
        raw = self.text("image", self.data["image"])
        image = posixpath.normpath(raw.replace("\\", "/"))
        if wrong := misplaced(image):
            self.fail("image", f"{raw!r} {wrong} the image root {root}")
        if known is not None and image not in known:
            if not (Path(root) / image).is_file():
                self.fail("image", f"no file {Path(root) / image}; add the image or correct the path")
            known.add(image)
        return image


def misplaced(image: str) -> str | None:
    """Why an image path, with either kind of slash, does not stay below its image root; None if it does."""
    path = posixpath.normpath(image.replace("\\", "/"))
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return "is absolute; write it relative to"
    return "leaves" if path == ".." or path.startswith("../") else None


def _turns(row: _Row, image: str | None) -> tuple[Turn, ...]:
    turns = row.data.get("conversations")
    if not isinstance(turns, list) or not turns:
        row.fail("conversations", f"expected a list human, gpt, human, gpt, ..., found {shown(turns)}")
    texts = []
    for number, turn in enumerate(turns):
        field, speaker = f"conversations[{number}]", ("human", "gpt")[number % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker:
            row.fail(f"{field}.from", f"expected {speaker!r} (human and gpt alternate), found {shown(turn)}")
        field += ".value"
        text = row.text(field, turn.get("value"))
        if number and IMAGE_MARK in text:
            row.fail(field, f"{IMAGE_MARK} may occur in the first human turn only")
        if not number and image is not None and IMAGE_MARK not in text:
            row.fail(field, f"'image' is set, but {IMAGE_MARK} is missing; write it before the question")
        texts.append(text.strip() if number % 2 else _question_text(row, field, text, image))
    if len(texts) % 2:
        row.fail("conversations", "the last question has no answer; add a gpt turn or remove the question")
    return tuple(Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True))


def _question_text(row: _Row, field: str, value: str, image: str | None) -> str:
    """The text without its image mark; one mark is allowed, and only if the row has an image."""
    marks = value.count(IMAGE_MARK)
    if marks > 1:
        row.fail(field, f"expected one {IMAGE_MARK}, found {marks}; one image per record is supported")
    if marks and image is None:
        row.fail(field, f"{IMAGE_MARK} is used, but the row has no field 'image'; add it or remove the mark")
    text = value.replace(IMAGE_MARK, "").strip()
    if not text:
        row.fail(field, f"expected a question besides {IMAGE_MARK}, found none")
    return text


def _gold(row: _Row, answered: bool) -> tuple[str, dict[str, Any]]:
    """The expected answer ("" if another field or file holds it) and the row's other fields."""
    extra = {key: value for key, value in row.data.items() if key not in ("question_id", "image", "text", "answer")}
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


# ---- Records that are made on access


class LookedUpRecords(Sequence[TrainRecord]):
    """Subclasses give the length and make the record at a valid position."""

    @abstractmethod
    def record(self, position: int) -> TrainRecord: ...

    def __getitem__(self, index: Any) -> Any:
        positions = range(len(self))[index]
        return self.record(positions) if isinstance(positions, int) else [self.record(p) for p in positions]


class StoredRecords(LookedUpRecords):
    """An Arrow file's, memory-mapped. Raises ValueError, OSError or ArrowException for a damaged one."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as stream:
            stream.seek(-len(_STREAM_END), os.SEEK_END)
            if stream.read() != _STREAM_END:
                raise ValueError("truncated")
        self._rows = Dataset.from_file(str(file))

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, position: int) -> TrainRecord:
        return _record(self._rows[position])

    def __iter__(self) -> Iterator[TrainRecord]:
        return map(_record, self._rows)


def _record(row: dict[str, Any]) -> TrainRecord:
    return TrainRecord(row["id"], row["image"], tuple(Turn(**turn) for turn in row["turns"]))


def _stored_train(path: Path, image_root: Path) -> StoredRecords:
    """The records of a training file, which the first process that asks for them checks and stores.

    The file's name in ``$CLMOE_CACHE`` (default ``~/.cache/clmoe``) is a hash of content and image root, so a changed
    file is checked again. An image that has gone is an error when it is read.
    """
    key = json_sha256([_CACHE_FORMAT, file_sha256(path), str(Path(image_root).absolute())])[:32]
    file = Path(os.environ.get("CLMOE_CACHE") or "~/.cache/clmoe").expanduser() / "records" / f"{key}.arrow"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if file.is_file():
            try:
                return StoredRecords(file)
            except (ArrowException, OSError, ValueError) as error:
                print(f"{file}: damaged ({error}); making it again from {path}", file=sys.stderr)
        partial = file.with_suffix(".partial")
        with writing(file), ArrowWriter(features=_COLUMNS, path=str(partial)) as writer:
            for record in iterate_train(path, image_root):
                writer.write(asdict(record))
            writer.finalize()
            flush(partial)
            partial.replace(file)
        return StoredRecords(file)


@dataclass(frozen=True)
class Part:
    """One task's records in a union, where they occur ``passes`` times.

    ``name`` is the prefix of their ids, none if empty; ``folder`` holds the images, relative to the union's root.
    """

    name: str
    folder: str
    records: Sequence[TrainRecord]
    passes: int = 1

    @classmethod
    def of(cls, name: str, records: Sequence[TrainRecord], image_root: Path, root: Path, passes: int = 1) -> Part:
        """The part of a union whose images are relative to ``root``."""
        return cls(name, os.path.relpath(image_root, root), records, passes)


class UnionRecords(LookedUpRecords):
    """The parts one after another."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._starts = [0, *accumulate(len(part.records) * part.passes for part in self.parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def record(self, position: int) -> TrainRecord:
        number = bisect_right(self._starts, position) - 1
        part = self.parts[number]
        record = part.records[(position - self._starts[number]) % len(part.records)]
        image = None if record.image is None else str(PurePosixPath(part.folder) / record.image)
        return replace(record, id=f"{part.name}/{record.id}" if part.name else record.id, image=image)
