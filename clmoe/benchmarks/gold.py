"""Expected answers that are not in the questions' files, and how to read other people's JSON.

A reader takes gold files and questions. It returns a function that puts all that the scorer needs into ``answer`` or
``extra`` of one question, or raises ClmoeError naming file and id.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from clmoe.data.records import Failed, Question
from clmoe.data.rows import read_json_strictly, short, shown
from clmoe.errors import ClmoeError

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Answered = Callable[[Question], Question]


@dataclass(frozen=True)
class Gold:
    """A task's gold files, absolute, and the name of their reader."""

    reader: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Reader:
    """How gold files are read, what they are, and whether that needs every question of the test file (``whole``)."""

    read: Callable[[Sequence[Path], Sequence[Question], Failed], Answered]
    files: tuple[str, ...]
    whole: bool = False


def read_gold(gold: Gold, questions: Sequence[Question], failed: Failed | None) -> list[Question]:
    """The questions with their answers. Faults go to ``failed`` and their questions are left out; None raises."""

    def report(error: ClmoeError) -> None:
        if failed is None:
            raise error
        failed(error)

    answered, result = READERS[gold.reader].read(gold.files, questions, report), []
    for question in questions:
        try:
            result.append(answered(question))
        except ClmoeError as error:
            report(error)
    return result


def entries(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ClmoeError if it holds something else."""
    data = read_json_strictly(file)
    if not isinstance(data, dict):
        raise ClmoeError(f"{file}: expected a JSON object at the top level, found {shown(data)}")
    return data


def listed(file: Path, field: str, row: Mapping[str, Any] | None = None, name: str | None = None) -> list[Any]:
    """A non-empty list, in a row or else at the file's top level. Raises ClmoeError naming file, id and field."""
    value = (entries(file) if row is None else row).get(field)
    if not isinstance(value, list) or not value:
        where = f"{file}" + (f": id {name!r}" if name is not None else "")
        raise ClmoeError(f"{where}: field '{field}': expected a non-empty list, found {shown(value)}")
    return value


def _entry(file: Path, rows: Mapping[str, Any], name: str) -> dict[str, Any]:
    row = rows.get(name)
    if not isinstance(row, dict):
        raise ClmoeError(f"{file}: no entry for question_id {name!r}; use questions and gold file from one release")
    return row


def _scienceqa(files: Sequence[Path], questions: Sequence[Question], failed: Failed) -> Answered:
    """ScienceQA: the right choice's letter, and the choices. The test file must hold the whole test split."""
    problems_file, splits_file = files
    problems = entries(problems_file)
    split = [str(name) for name in listed(splits_file, "test")]
    asked = {question.question_id for question in questions}
    lacking = [name for name in split if name not in asked]
    if lacking:
        of = f"{len(lacking)} of the {len(split)} questions of split 'test' are not in the test file"
        fix = f"e.g. {lacking[0]!r}; scores count the whole split, so use the complete test file"
        failed(ClmoeError(f"{splits_file}: {of}, {fix}"))

    def answered(question: Question) -> Question:
        problem = _entry(problems_file, problems, question.question_id)
        choices = listed(problems_file, "choices", problem, question.question_id)
        number = problem.get("answer")
        if not isinstance(number, int) or not 0 <= number < len(choices):
            raise ClmoeError(
                f"{problems_file}: id {question.question_id!r}: answer {short(number)} is not one of its choices"
            )
        return replace(question, answer=_LETTERS[number], extra={**question.extra, "choices": choices})

    return answered


def _textvqa(files: Sequence[Path], questions: Sequence[Question], failed: Failed) -> Answered:
    """TextVQA: the ten annotators' answers."""
    (file,) = files
    rows = {str(row.get("question_id")): row for row in listed(file, "data") if isinstance(row, dict)}

    def answered(question: Question) -> Question:
        row = _entry(file, rows, question.question_id)
        answers = listed(file, "answers", row, question.question_id)
        return replace(question, extra={**question.extra, "answers": answers})

    return answered


def _gqa(files: Sequence[Path], questions: Sequence[Question], failed: Failed) -> Answered:
    """GQA: the answer of each question, which must be a balanced one, since the published score counts only those."""
    (file,) = files
    rows = entries(file)

    def answered(question: Question) -> Question:
        row = _entry(file, rows, question.question_id)
        answer, where = row.get("answer"), f"{file}: id {question.question_id!r}"
        if row.get("isBalanced") is not True:
            fix = "GQA's score counts balanced questions, so keep only those in the test file"
            raise ClmoeError(f"{where}: isBalanced is {short(repr(row.get('isBalanced')))}; {fix}")
        if not isinstance(answer, str) or not answer:
            raise ClmoeError(f"{where}: no 'answer'")
        return replace(question, answer=answer)

    return answered


def _coco_captions(files: Sequence[Path], questions: Sequence[Question], failed: Failed) -> Answered:
    """UCIT: the reference captions of each question's image, in ``extra["captions"]``.

    Image n belongs to the n-th question, from 1, unless the image ids are the question ids. A ``file_name`` must match.
    """
    (file,) = files
    data = entries(file)
    images = {str(image.get("id")): image for image in listed(file, "images", data)}
    if len(images) != len(questions):
        counts = f"{len(images)} images for {len(questions)} questions"
        raise ClmoeError(f"{file}: {counts}; use both files from the same release")
    captions: dict[str, list[str]] = {}
    for row in listed(file, "annotations", data):
        captions.setdefault(str(row.get("image_id")), []).append(str(row.get("caption", "")))
    by_id = images.keys() == {question.question_id for question in questions}
    numbers = {question.question_id: str(number) for number, question in enumerate(questions, 1)}

    def answered(question: Question) -> Question:
        name = question.question_id if by_id else numbers[question.question_id]
        texts = [text for text in captions.get(name, []) if text.strip()]
        if name not in images or not texts:
            raise ClmoeError(f"{file}: no captions of image {name!r} for question_id {question.question_id!r}")
        of_image = images[name].get("file_name")
        if of_image and PurePosixPath(str(of_image)).name != PurePosixPath(question.image or "").name:
            asked = f"question_id {question.question_id!r} is about {question.image!r}"
            raise ClmoeError(
                f"{file}: image {name!r} is {of_image!r}, but {asked}; use both files from the same release"
            )
        return replace(question, extra={**question.extra, "captions": texts})

    return answered


READERS = {
    "scienceqa": Reader(_scienceqa, ("problems.json", "pid_splits.json"), whole=True),
    "textvqa": Reader(_textvqa, ("TextVQA_0.5.1_val.json",)),
    "gqa": Reader(_gqa, ("testdev_balanced_questions.json",)),
    "coco_captions": Reader(_coco_captions, ("captions in COCO's format",), whole=True),
}
