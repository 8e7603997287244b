"""Training and question files in LLaVA's layout, and the records of several tasks as one sequence.

Ids become strings, white space around questions and training answers and the mark ``<image>`` are removed (the prompt
puts the image first), and image paths are normalised. Every error names the file, the row (from 0) and the field.
"""

from __future__ import annotations

import json
import os
import re
import sys
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, count
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, TypeVar

from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock
from pyarrow import ArrowException

from clmoe.data.rows import Row, RowError, Seen, all_of, json_rows, shown
from clmoe.errors import ClmoeError
from clmoe.utils.files import file_sha256, flush, json_sha256, read_json, write_json
from clmoe.utils.tensors import writing

IMAGE_MARK = "<image>"
GOLD_FIELDS = ("answer", "answers", "answer_bbox", "captions")
"""A question must have at least one of these, with which a scorer compares a prediction."""

LARGE_FILE = 16 * 2**20
"""Training files of at least this many bytes are not held in memory."""

LONGEST_QUESTION = 16_384
"""Character limit of a test question, which is never truncated: four for each of the 4,096 tokens of LLaVA-1.5."""

LARGEST_FRACTION = 2.0
"""A box may reach a little beyond the edge of its image, whose sides are 1; larger numbers are pixels or percent."""

OnBad = Literal["error", "mask", "skip"]
Failed = Callable[[ClmoeError], None]
Rows = Iterable[Row | RowError]
"""Rows of another format, see ``data.formats``: in LLaVA's layout, or what is wrong with one that cannot be used."""
R = TypeVar("R")

_TRAIN_KEYS = {"id", "image", "conversations"}
_TEST_KEYS = {"question_id", "image", "text", "size", *GOLD_FIELDS}

_TEXT = Value("string")
_COLUMNS = Features({"id": _TEXT, "image": _TEXT, "turns": [{"question": _TEXT, "answer": _TEXT}]})
_CACHE_FORMAT = 3


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

    @property
    def masked(self) -> bool:
        """Whether it only keeps a bad row's place: none of its tokens counts in the loss."""
        return self.turns == MASKED


MASKED = (Turn("", ""),)


class Fits(Protocol):
    """What a tokenizer and a maximum length leave of a record; ``key`` names both."""

    @property
    def key(self) -> str: ...
    @property
    def max_length(self) -> int: ...
    def __call__(self, record: TrainRecord, image_root: Path) -> tuple[int, int]:
        """Answer tokens within the length, and beyond it. Raises ClmoeError if the tokenizer fits no record."""
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """One test question. ``answer`` is empty only if ``extra`` holds another field of GOLD_FIELDS."""

    question_id: str
    image: str | None
    text: str
    answer: str
    extra: dict[str, Any]


def load_train(
    path: Path, image_root: Path, on_bad: OnBad = "error", fits: Fits | None = None, seen: Seen | None = None
) -> Sequence[TrainRecord]:
    """Read and check a file of ``{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value": ...}, ...]}``.

    The images must exist; they are not decoded. Published LLaVA files repeat ids: later rows with an id get ``#2``,
    ``#3``, ... Records of a file of LARGE_FILE bytes or more stay on disk. Bad rows raise one ClmoeError that lists all
    of them, or are left out (``skip``), or become records without an answer token (``mask``). ``seen`` is filled.
    """
    path, seen = Path(path), Seen() if seen is None else seen
    large = path.is_file() and path.stat().st_size >= LARGE_FILE
    read = _stored_train if large else _read_train
    records = read(path, image_root, on_bad, fits, seen)
    if len(seen.bad) == seen.rows:
        raise all_of([ClmoeError(f"{path}: none of the {seen.rows} rows can be used"), *seen.bad])
    return records


def _read_train(path: Path, image_root: Path, *reading: Any) -> list[TrainRecord]:
    return list(_reading(path, image_root, *reading))


def _reading(path: Path, root: Path, on_bad: OnBad, fits: Fits | None, seen: Seen) -> Iterator[TrainRecord]:
    failed = None if on_bad == "error" else seen.bad.append
    return iterate_train(path, root, failed, fits=fits, seen=seen, mask=on_bad == "mask")


def iterate_train(
    path: Path,
    image_root: Path,
    failed: Failed | None = None,
    *,
    fits: Fits | None = None,
    seen: Seen | None = None,
    mask: bool = False,
    rows: Rows | None = None,
) -> Iterator[TrainRecord]:
    """The records of ``load_train``, one at a time. With ``failed``, bad rows are reported to it and left out.

    ``rows`` are read instead of the file's.
    """
    known: set[str] = set()
    used: set[str] = set()
    seen = Seen() if seen is None else seen

    def record(row: Row) -> TrainRecord:
        """The row's record, under an id of its own; raises if none of its answer tokens is within the limit."""
        name = unique = row.identifier("id")
        image = row.image(image_root, known)
        turns, repeats = _turns(row, image), count(2)
        while unique in used:
            unique = f"{name}#{next(repeats)}"
        used.add(unique)
        made = TrainRecord(unique, image, turns)
        kept, cut = (1, 0) if fits is None else fits(made, image_root)
        if fits is not None and not kept:
            problem = f"no answer token is among the first {fits.max_length}; raise training.max_length or shorten it"
            row.fail("conversations", problem)
        seen.cut += [row.index] if cut else []
        return made

    masked = (lambda index: TrainRecord(f"masked row {index}", None, MASKED)) if mask else None
    return _each_row(path, record, failed, _TRAIN_KEYS, seen, masked, rows)


def load_questions(
    path: Path,
    image_root: Path,
    failed: Failed | None = None,
    *,
    answered: bool = True,
    images: bool = True,
    seen: Seen | None = None,
    rows: Rows | None = None,
) -> list[Question]:
    """Read and check a file of ``{"question_id", "image"?, "text", "answer", ...}``; other keys end up in ``extra``.

    Expected answers stay as they are; a list in ``answer`` (several accepted ones) is moved to ``extra["answers"]``.
    ``answered``: every row must have one of GOLD_FIELDS. ``images``: the images must exist. Raises ClmoeError
    that lists all bad rows, also those with a repeated id; with ``failed``, they are reported to it and left out.
    ``rows`` are read instead of the file's.
    """
    known: set[str] | None = set() if images else None
    first_row: dict[str, int] = {}

    def question(row: Row) -> Question:
        question_id = row.identifier("question_id")
        if question_id in first_row:
            row.fail("question_id", f"already used by row {first_row[question_id]}; ids must be unique")
        first_row[question_id] = row.index
        image = row.image(image_root, known)
        text = _question_text(row, "text", row.spoken("text", row.data.get("text")), image)
        if len(text) > LONGEST_QUESTION:
            row.fail("text", f"more than {LONGEST_QUESTION} characters, beyond what the base can read", str(len(text)))
        return Question(question_id, image, text, *_gold(row, answered))

    return list(_each_row(path, question, failed, _TEST_KEYS, Seen() if seen is None else seen, rows=rows))


def _each_row(
    path: Path,
    make: Callable[[Row], R],
    failed: Failed | None,
    keys: set[str],
    seen: Seen,
    masked: Callable[[int], R] | None = None,
    rows: Rows | None = None,
) -> Iterator[R]:
    bad: list[ClmoeError] = []
    for index, data in enumerate(json_rows(path) if rows is None else rows):
        seen.rows += 1
        try:
            if isinstance(data, RowError):
                raise data
            row = data if isinstance(data, Row) else Row(path, index, data, keys)
            made = make(row)
        except ClmoeError as error:
            (failed or bad.append)(error)
            if masked is not None:
                yield masked(index)
            continue
        for key in row.unread or row.data.keys() - keys:
            seen.unread[key] = seen.unread.get(key, 0) + 1
        if row.data.get("image") is None:
            seen.without_image.append(index)
        yield made
    if bad:
        raise all_of(bad)


def count_records(path: Path) -> int:
    """Number of objects in a training or question file; their fields are not checked. Raises as ``json_rows`` does."""
    return len([Row(path, index, data) for index, data in enumerate(json_rows(path))])


def _turns(row: Row, image: str | None) -> tuple[Turn, ...]:
    turns = row.data.get("conversations")
    if not isinstance(turns, list) or not turns:
        row.unfit("conversations", turns, "a list human, gpt, human, gpt, ...")
    texts = []
    for number, turn in enumerate(turns):
        field, speaker = f"conversations[{number}]", ("human", "gpt")[number % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker:
            row.fail(f"{field}.from", f"expected {speaker!r} (human and gpt alternate)", shown(turn))
        field += ".value"
        text = row.spoken(field, turn.get("value"))
        if number and IMAGE_MARK in text:
            row.fail(field, f"{IMAGE_MARK} may occur in the first human turn only")
        if not number and image is not None and IMAGE_MARK not in text:
            row.fail(field, f"'image' is set, but {IMAGE_MARK} is missing; write it before the question")
        texts.append(text.strip() if number % 2 else _question_text(row, field, text, image))
    if len(texts) % 2:
        row.fail("conversations", "the last question has no answer; add a gpt turn or remove the question")
    return tuple(Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True))


def _question_text(row: Row, field: str, value: str, image: str | None) -> str:
    """The text without its image mark; one mark is allowed, and only if the row has an image."""
    marks = value.count(IMAGE_MARK)
    if marks > 1:
        row.fail(field, f"expected one {IMAGE_MARK}: only one image per record is supported", str(marks))
    if marks and image is None:
        row.fail(field, f"{IMAGE_MARK} is used, but the row has no field 'image'; add it or remove the mark")
    text = value.replace(IMAGE_MARK, "").strip()
    if not text:
        row.fail(field, f"expected a question besides {IMAGE_MARK}, found none")
    return text


def _gold(row: Row, answered: bool) -> tuple[str, dict[str, Any]]:
    """The expected answer ("" if another field or file holds it) and the row's other fields."""
    extra = {key: value for key, value in row.data.items() if key not in ("question_id", "image", "text", "answer")}
    for key, value in extra.items():
        row.encodable(key, json.dumps(value, ensure_ascii=False))
    answer, box = row.data.get("answer", ""), row.data.get("answer_bbox")
    numbers = re.findall(r"\d+(?:\.\d*)?", str(box)) if isinstance(box, str | list) else []
    if any(float(number) > LARGEST_FRACTION for number in numbers):
        fix = "(x + left padding) / the longer side, and so on, as docs/benchmarks.md says"
        row.fail("answer_bbox", f"expected fractions of the image padded to a square, not pixels: {fix}", shown(box))
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
    """The records of an Arrow file, memory-mapped."""

    def __init__(self, file: Path) -> None:
        self._rows = Dataset.from_file(str(file))

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, position: int) -> TrainRecord:
        return _record(self._rows[position])

    def __iter__(self) -> Iterator[TrainRecord]:
        return map(_record, self._rows)


def _record(row: dict[str, Any]) -> TrainRecord:
    return TrainRecord(row["id"], row["image"], tuple(Turn(**turn) for turn in row["turns"]))


def _stored_train(path: Path, image_root: Path, on_bad: OnBad, fits: Fits | None, seen: Seen) -> StoredRecords:
    """The records of a training file. The first process that asks for them checks and stores them.

    The file's name in ``$CLMOE_CACHE`` (default ``~/.cache/clmoe``) is a hash of content, image root and what decides
    the records, so a changed file is checked again. A JSON file beside it holds its sha256 and what was seen. An image
    that has since disappeared is an error when it is read.
    """
    how = [on_bad, None if fits is None else fits.key]
    key = json_sha256([_CACHE_FORMAT, file_sha256(path), str(Path(image_root).absolute()), how])[:32]
    file = Path(os.environ.get("CLMOE_CACHE") or "~/.cache/clmoe").expanduser() / "records" / f"{key}.arrow"
    file.parent.mkdir(parents=True, exist_ok=True)
    about = file.with_suffix(".json")
    with FileLock(file.with_suffix(".lock")):
        if file.is_file():
            try:
                return _kept(file, read_json(about), seen)
            except (ArrowException, OSError, ValueError, KeyError, TypeError, ClmoeError) as error:
                print(f"{file}: damaged ({error}); making it again from {path}", file=sys.stderr)
        partial = file.with_suffix(".partial")
        with writing(file), ArrowWriter(features=_COLUMNS, path=str(partial)) as writer:
            for record in _reading(path, image_root, on_bad, fits, seen):
                writer.write(asdict(record))
            writer.finalize()
            flush(partial)
            write_json(
                about, {"sha256": file_sha256(partial), "seen": {**vars(seen), "bad": [e.args for e in seen.bad]}}
            )
            partial.replace(file)
        return StoredRecords(file)


def _kept(file: Path, about: Any, seen: Seen) -> StoredRecords:
    """A cached file's records, with ``seen`` filled. Raises ValueError and others for a damaged one."""
    if file_sha256(file) != about["sha256"]:
        raise ValueError("its sha256 differs")
    values = {**about["seen"], "bad": [RowError(*fields) for fields in about["seen"]["bad"]]}
    records = StoredRecords(file)
    vars(seen).update(vars(Seen(**values)))
    return records


@dataclass(frozen=True)
class Part:
    """One task's records in a union, where they occur ``passes`` times.

    ``name`` is the prefix of their ids (none if empty); ``folder`` holds the images, relative to the union's root.
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
