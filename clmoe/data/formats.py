"""Make training and question files of other projects into rows in LLaVA's layout: one reader for each kind of file.

A row is one question and its answer, or a conversation with role and content (LLaMA-Factory, ms-swift, TRL) or from and
value. docs/add-your-data.md lists the known files and columns. Every error names the file, row and column.
"""

import csv
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Literal, NoReturn

import pyarrow.parquet
from datasets import Dataset, DatasetDict, load_from_disk
from pyarrow import ArrowException

from clmoe.data.rows import Row, RowError, parse_json, read_json_strictly, short, shown
from clmoe.errors import ClmoeError

COLUMNS = {
    "id": ("id", "question_id"),
    "image": ("image", "images"),
    "question": ("question", "messages", "conversations", "prompt", "text", "query"),
    "answer": ("answer", "completion", "multiple_choice_answer", "response"),
}
"""A row is read from the first of these that it has; ``question`` and ``answer`` may be lists of messages."""

TABLES = (".jsonl", ".csv", ".tsv", ".parquet")  # endings of files that are never in LLaVA's layout
MARK = "<image>"
SPEAKERS = {"user": "human", "human": "human", "assistant": "gpt", "gpt": "gpt"}
FOR_SCORERS = ("answers", "answer_bbox", "captions", "size", "category")
COCO_IMAGE = "{data_subtype}/COCO_{data_subtype}_{image_id:012d}.jpg"  # for VQA v2
AT_ONCE = 256  # rows of a Parquet file or Arrow table, with their images

Keep = Callable[[bytes], str]
"""Takes the bytes of an image and returns its path below the image root; raises ClmoeError if they are not one."""
Kind = Literal["train", "test"]


@dataclass(frozen=True)
class Raw:
    """A task's files in other formats.

    Attributes:
        train, test: the files, whose rows follow one another.
        columns: our name for a column, see ``COLUMNS`` -> the files' name.
        image: how an image's path is made from a row's columns, as in ``{image_id}.png``; empty if a column holds it.
        instruction: text at the end of every question.
    """

    train: tuple[Path, ...]
    test: tuple[Path, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    image: str = ""
    instruction: str = ""

    def files(self, kind: Kind) -> tuple[Path, ...]:
        return self.train if kind == "train" else self.test


def raw_rows(raw: Raw, kind: Kind, keep: Keep) -> Iterator[Row | RowError]:
    """The rows in LLaVA's layout, in the order of the files, or what is wrong with one.

    A row without an id gets its number over all files. ``keep`` gets the images that are stored in rows. Raises
    ClmoeError for a file that cannot be read.
    """
    numbers = count()
    for path, index, data in _stored(raw.files(kind)):
        number = next(numbers)
        try:
            if isinstance(data, RowError):
                raise data
            yield _Source(Row(path, index, data), raw, keep).made(kind, number)
        except RowError as error:
            yield error


# ---- Files


Stored = Iterator[tuple[Path, int, Any]]


def _stored(files: Sequence[Path]) -> Stored:
    """File, row number from 0, and value of every row; a RowError for one that cannot be parsed."""
    whole = {path: read_json_strictly(path, rows=True) for path in files if path.suffix == ".json"}
    notes = {
        str(note["question_id"]): note
        for data in whole.values()
        for note in (data.get("annotations") or () if isinstance(data, dict) else ())
        if isinstance(note, dict) and "question_id" in note
    }
    for path in files:
        data = whole.get(path)
        if path not in whole:
            yield from ((path, index, row) for index, row in _lines_of(path))
        elif isinstance(data, list):
            yield from ((path, index, row) for index, row in enumerate(data))
        elif isinstance(data, dict) and isinstance(data.get("questions"), list):
            yield from (
                (path, index, _noted(path, index, row, data, notes)) for index, row in enumerate(data["questions"])
            )
        elif not isinstance(data, dict) or "annotations" not in data:
            expected = "a list of rows, or VQA v2's object with 'questions' or 'annotations'"
            raise ClmoeError(f"{path}: expected {expected} at the top level, found {shown(data)}")


def _noted(path: Path, index: int, row: Any, data: dict[str, Any], notes: dict[str, Any]) -> Any:
    """A question of VQA v2 with its annotation."""
    if not isinstance(row, dict):
        return row
    name = str(row.get("question_id"))
    if name not in notes:
        problem = "no annotation has this id; list the file with its annotations too"
        return RowError(str(path), index, name, "question_id", problem)
    return {key: data[key] for key in ("data_subtype",) if key in data} | row | notes[name]


def _lines_of(path: Path) -> Iterator[tuple[int, Any]]:
    kinds = dict(zip(TABLES, (_json_lines, _csv, _csv, _parquet), strict=True))
    read = _folder if path.is_dir() else kinds.get(path.suffix)
    if read is None:
        known = ", ".join((".json", *kinds))
        raise ClmoeError(f"{path}: expected a file {known}, or a folder of datasets' save_to_disk")
    try:
        yield from read(path)
    except UnicodeDecodeError as error:
        raise ClmoeError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except (OSError, csv.Error, ArrowException) as error:
        raise ClmoeError(f"{path}: cannot be read ({' '.join(str(error).split())}); replace the file") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for index, line in enumerate(file):
            if not line.strip():
                continue
            try:
                yield index, parse_json(line, rows=True)
            except (ValueError, RecursionError) as error:  # also for bytes that are not UTF-8
                yield index, RowError(str(path), index, None, "", f"broken JSON: {error}")


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    """Empty cells count as missing; the first line names the columns."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        names = next(table, [])
        if len({*names}) < len(names) or not all(names):
            raise ClmoeError(f"{path}: line 1: expected a different name for each column, found {short(names)}")
        for index, cells in enumerate(row for row in table if row):
            if len(cells) != len(names):
                problem = f"expected {len(names)} cells, as in the first line; put text with commas in quotes"
                yield index, RowError(str(path), index, None, "", problem, str(len(cells)))
            else:
                yield index, {name: cell for name, cell in zip(names, cells, strict=True) if cell}


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        yield from enumerate(row for batch in file.iter_batches(AT_ONCE) for row in batch.to_pylist())


def _folder(path: Path) -> Iterator[tuple[int, Any]]:
    """What datasets' ``save_to_disk`` wrote; images stay encoded."""
    try:
        data: Dataset | DatasetDict = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        fix = "name a folder that datasets' save_to_disk wrote, or the files in it, as in data/train-*.parquet"
        raise ClmoeError(f"{path}: not a data set ({' '.join(str(error).split())}); {fix}") from error
    if isinstance(data, DatasetDict):
        raise ClmoeError(
            f"{path}: holds the splits {', '.join(data)}; name the folder of one, as in {path}/{next(iter(data))}"
        )
    yield from enumerate(row for table in data.with_format("arrow").iter(AT_ONCE) for row in table.to_pylist())


# ---- Rows


class _Source:
    """A row in another format and what has been read from it."""

    def __init__(self, row: Row, raw: Raw, keep: Keep) -> None:
        self.row, self.raw, self.keep = row, raw, keep
        self.key = {name: self._key(name) for name in COLUMNS}
        self.used = {*self.key.values(), *placeholders(raw.image), *FOR_SCORERS}
        self.names: dict[str, str] = {}  # of the row that is made
        self.shown: list[tuple[str, Any]] = []  # images in messages, with their fields
        self.held = False

    def _key(self, name: str) -> str:
        known = (self.raw.columns[name],) if name in self.raw.columns else COLUMNS[name]
        return next((key for key in known if self.row.data.get(key) not in (None, "", [])), known[0])

    def value(self, name: str) -> Any:
        return self.row.data.get(self.key[name])

    def fail(self, field: str, problem: str, found: str = "") -> NoReturn:
        self.row.fail(field, problem, found)

    def made(self, kind: Kind, number: int) -> Row:
        """The row in LLaVA's layout."""
        name = self.value("id")
        turns = self.turns(kind)
        image = self.image()
        marked = image is None or any(MARK in turn["value"] for turn in turns if isinstance(turn["value"], str))
        fields = {"image": self.key["image"], "id": self.key["id"], "question_id": self.key["id"]}
        data: dict[str, Any] = {"image": image}
        if kind == "train":
            if not marked and turns:
                turns[0]["value"] = f"{MARK}\n{turns[0]['value']}"
            data |= {"id": number if name is None else name, "conversations": turns}
        else:
            data |= {"question_id": number if name is None else name} | self.asked(turns)
        made = Row(self.row.path, self.row.index, data, data.keys())
        made.names, made.held, made.numbered = self.names | fields, self.held, name is None
        made.unread = self.row.data.keys() - self.used
        return made

    def asked(self, turns: list[dict[str, Any]]) -> dict[str, Any]:
        """Question and expected answer of a test row."""
        if len(turns) != 2:
            self.fail(
                self.key["question"], "a test row has one question, followed by one answer", f"{len(turns)} turns"
            )
        self.names |= {"text": self.names["conversations[0].value"], "answer": self.names["conversations[1].value"]}
        question, answer = (turn["value"] for turn in turns)
        kept = {key: self.row.data[key] for key in FOR_SCORERS if self.row.data.get(key) is not None}
        if "answers" in kept:
            kept["answers"] = self.accepted(kept["answers"])
        return {"text": question, **({} if answer is None else {"answer": answer}), **kept}

    def turns(self, kind: Kind) -> list[dict[str, Any]]:
        """LLaVA's ``conversations``: made from messages, or from one question and its answer."""
        asked, said = self.value("question"), self.value("answer")
        key, answer_key = self.key["question"], self.key["answer"]
        self.names["conversations"] = answer_key
        if isinstance(asked, list):
            listed = [(f"{key}[{n}]", message) for n, message in enumerate(asked)]
            listed += [
                (f"{answer_key}[{n}]", message) for n, message in enumerate(said if isinstance(said, list) else ())
            ]
            self.names["conversations"] = key
            return [self.turn(number, *message) for number, message in enumerate(listed)]
        self.names |= {"conversations[0].value": key, "conversations[1].value": answer_key}
        if kind == "train" and (isinstance(said, list) or (said is None and self.row.data.get("answers"))):
            several = isinstance(said, list)
            field, values = (answer_key, said) if several else ("answers", self.row.data["answers"])
            self.names["conversations[1].value"] = field
            said = self.most_common(self.accepted(values, field), field)
        if isinstance(said, int) and not isinstance(said, bool):
            said = str(said)
        question = self.row.text(key, asked).strip() + self.raw.instruction
        return [{"from": "human", "value": question}, {"from": "gpt", "value": said}]

    def turn(self, number: int, field: str, message: Any) -> dict[str, Any]:
        """A message as LLaVA's turn."""
        if not isinstance(message, dict):
            self.fail(field, "expected a message: an object with role and content", shown(message))
        role, content = ("role", "content") if "role" in message else ("from", "value")
        speaker = message.get(role)
        if speaker == "system":
            fix = "remove the message, or write its text before the question"
            self.fail(f"{field}.{role}", f"the prompt has its own system sentence; {fix}")
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            self.fail(f"{field}.{role}", f"expected one of {', '.join(SPEAKERS)}", shown(speaker))
        value = message.get(content)
        if isinstance(value, list):
            value = "".join(self.part(f"{field}.{content}[{n}]", part) for n, part in enumerate(value))
        if SPEAKERS[speaker] == "human" and isinstance(value, str):
            value += self.raw.instruction
        place = f"conversations[{number}]"
        self.names |= {f"{place}.value": f"{field}.{content}", f"{place}.from": f"{field}.{role}"}
        return {"from": SPEAKERS[speaker], "value": value}

    def part(self, field: str, part: Any) -> str:
        """The text of a part of a message; for an image, the mark."""
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            return self.row.text(f"{field}.text", part.get("text"))
        if kind not in ("image", "image_url"):
            self.fail(field, "expected a part of type text or image", shown(part))
        url = part.get("image_url")
        value = part.get("image") or (url.get("url") if isinstance(url, dict) else url)
        self.shown += [] if value is None else [(f"{field}.{kind}", value)]
        return f"{MARK}\n"

    def image(self) -> str | None:
        """The image's path below the image root, None without one; ``keep`` takes one that is stored in the row."""
        self.key["image"], value = self.shown[0] if self.shown else (self.key["image"], self.value("image"))
        field, data = self.key["image"], self.row.data
        several = [item for item in value if item is not None] if isinstance(value, list) else self.shown
        if len(several) > 1:
            self.fail(field, "expected one image: only one per row is supported", str(len(several)))
        if isinstance(value, list):
            value = several[0] if several else None
        pattern = self.raw.image or ("" if value or not data.get("data_subtype") else COCO_IMAGE)
        if pattern:
            return self.filled(pattern)
        if isinstance(value, dict):
            encoded, value = value.get("bytes"), value.get("path")
            if encoded:
                return self.taken(field, encoded)
        if value is None:
            self.row.keys = self.used
            self.row.no_other_image()
            return None
        return self.row.text(field, value)

    def filled(self, pattern: str) -> str:
        self.used |= placeholders(pattern)
        self.key["image"] = ", ".join(sorted(placeholders(pattern)))
        try:
            return pattern.format_map(self.row.data)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            self.fail(
                self.key["image"],
                f"the image's path {pattern!r} cannot be made from it ({error}); correct the row or raw.image",
            )

    def taken(self, field: str, encoded: Any) -> str:
        try:
            self.held = True
            return self.keep(bytes(encoded))
        except (ClmoeError, TypeError, ValueError) as error:
            self.fail(field, f"cannot be decoded as an image ({error}); replace it or remove the row")

    def accepted(self, answers: Any, field: str = "answers") -> Any:
        """A list of answers as texts: VQA v2 has an object for each annotator."""
        if not isinstance(answers, list) or not answers:
            self.fail(field, "expected a list with the accepted answers", shown(answers))
        return [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]

    def most_common(self, answers: list[Any], field: str) -> str:
        """The first of the answers that most annotators gave."""
        texts = [self.row.text(f"{field}[{n}]", answer) for n, answer in enumerate(answers)]
        return Counter(texts).most_common(1)[0][0]


@cache
def placeholders(pattern: str) -> frozenset[str]:
    """The columns that a path is made from: ``{image_id:012d}.jpg`` -> ``image_id``."""
    return frozenset(name for _, name, _, _ in string.Formatter().parse(pattern) if name)
