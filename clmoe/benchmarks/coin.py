"""CoIN: the gold files of its tasks, and the grounding task built from RefCOCO's annotations.

Order, files and rules of the eight tasks are in ``configs/benchmarks/coin.yaml``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmoe.benchmarks.entries import answered_one_by_one, entries, entry, listed
from clmoe.data.json_rows import read_json_strictly
from clmoe.data.records import Failed, Question
from clmoe.errors import ClmoeError
from clmoe.utils.files import write_json

if TYPE_CHECKING:
    from clmoe.benchmarks.base import Benchmark

ANNOTATIONS = "RefCOCO"
"""Folder of RefCOCO's files below the benchmark's root."""

_REGION = "Please provide the bounding box coordinate of the region this sentence describes: {}."
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def scienceqa_answers(
    files: Sequence[Path], questions: Sequence[Question], failed: Failed | None = None
) -> list[Question]:
    """ScienceQA: the right choice's letter from ``problems.json``, and its choices.

    Raises:
        ClmoeError: a question is not in ``problems.json``, its answer is no choice, or a question of the test split in
            ``pid_splits.json`` is not in the test file: published scores count the whole split.
    """
    problems_file, splits_file = files
    problems = entries(problems_file)
    _check_split(splits_file, questions, failed)

    def answered(question: Question) -> Question:
        problem = entry(problems_file, problems, question.question_id)
        choices = listed(problems_file, "choices", problem, question.question_id)
        number = problem.get("answer")
        if not isinstance(number, int) or not 0 <= number < len(choices):
            raise ClmoeError(f"{problems_file}: id {question.question_id!r}: answer {number!r} is none of its choices")
        return replace(question, answer=_LETTERS[number], extra={**question.extra, "choices": choices})

    return answered_one_by_one(questions, answered, failed)


def _check_split(file: Path, questions: Sequence[Question], failed: Failed | None) -> None:
    asked = {question.question_id for question in questions}
    split = [str(name) for name in listed(file, "test", entries(file))]
    lacking = [name for name in split if name not in asked]
    if not lacking:
        return
    error = ClmoeError(
        f"{file}: {len(lacking)} of the {len(split)} questions of split 'test' are not in the test file, "
        f"e.g. {lacking[0]!r}; scores count the whole split, so take the complete test file"
    )
    if failed is None:
        raise error
    failed(error)


def textvqa_answers(
    files: Sequence[Path], questions: Sequence[Question], failed: Failed | None = None
) -> list[Question]:
    """TextVQA: the ten annotators' answers."""
    (file,) = files
    rows = {str(row.get("question_id")): row for row in listed(file, "data", entries(file)) if isinstance(row, dict)}

    def answered(question: Question) -> Question:
        row = entry(file, rows, question.question_id)
        answers = listed(file, "answers", row, question.question_id)
        return replace(question, extra={**question.extra, "answers": answers})

    return answered_one_by_one(questions, answered, failed)


def gqa_answers(files: Sequence[Path], questions: Sequence[Question], failed: Failed | None = None) -> list[Question]:
    """GQA: the answer of each question.

    Raises:
        ClmoeError: a question has no entry, or is none of the balanced ones, which alone the published score counts.
    """
    (file,) = files
    rows = entries(file)

    def answered(question: Question) -> Question:
        row = entry(file, rows, question.question_id)
        if row.get("isBalanced") is not True:
            raise ClmoeError(
                f"{file}: id {question.question_id!r}: isBalanced is {row.get('isBalanced')!r}; GQA's score is of the "
                "balanced questions, so take those only into the test file"
            )
        answer = row.get("answer")
        if not isinstance(answer, str) or not answer:
            raise ClmoeError(f"{file}: id {question.question_id!r}: no 'answer'")
        return replace(question, answer=answer)

    return answered_one_by_one(questions, answered, failed)


def padded_box(box: Sequence[float], width: int, height: int) -> str:
    """COCO's ``[x, y, w, h]`` in pixels as ``[x1, y1, x2, y2]`` in fractions of the square-padded image, two decimals.

    The square's side is the longer side of the image, which lies in its middle.
    """
    x, y, w, h = box
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    corners = (x + left, y + top, x + w + left, y + h + top)
    return f"[{', '.join(f'{min(max(value / side, 0), 1):.2f}' for value in corners)}]"


def prepare_grounding(benchmark: Benchmark) -> list[str]:
    """Build the grounding task from the annotations of RefCOCO, RefCOCO+ and RefCOCOg, where neither file is there.

    Reads ``RefCOCO/<name>/refs.json`` and ``instances.json`` for each folder there is (docs/benchmarks.md says how to
    get them), and writes the training and the test file of task ``Grounding``: one record for each sentence of split
    ``train``, and one question for each of ``test``, ``testA`` and ``testB``. Training records whose box has no area
    after rounding are left out and counted: as an answer, such a box is malformed.

    Returns what was done, one line each.

    Raises:
        ClmoeError: broken annotations, or a box without area after rounding in the test split.
    """
    task = benchmark.task("Grounding")
    if task.train.is_file() and task.test.is_file():
        return [f"Grounding: there already ({task.train})"]
    half = task.half_there()
    if half is not None:
        return [f"Grounding: not built, {half[0]} is there without {half[1].name}: delete it, or bring both"]
    folders = sorted(path.parent for path in (benchmark.root / ANNOTATIONS).glob("*/refs.json"))
    if not folders:
        folder = benchmark.root / ANNOTATIONS
        return [f"Grounding: not built, no {folder}/*/refs.json, from {benchmark.source(folder)}"]
    train: list[dict[str, Any]] = []
    test: list[dict[str, Any]] = []
    for folder in folders:
        _add_references(folder, train, test)
    for row in test:
        if not _has_area(row["answer_bbox"]):
            raise ClmoeError(
                f"{benchmark.root / ANNOTATIONS}: sentence {row['question_id']} about {row['image']}: box "
                f"{row['answer_bbox']} has no area after rounding, so no answer would be right; take its reference out"
            )
    kept = [record for record in train if _has_area(record["conversations"][1]["value"])]
    write_json(task.train, kept)
    write_json(task.test, test)
    line = f"Grounding: {len(kept)} training records, {len(test)} questions from {len(folders)} annotation folder(s)"
    left_out = len(train) - len(kept)
    return [line + (f"; {left_out} record(s) left out, as their boxes have no area" if left_out else "")]


def _add_references(folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> None:
    file = folder / "instances.json"
    instances = entries(file)
    images = {row["id"]: row for row in listed(file, "images", instances)}
    boxes = {row["id"]: row["bbox"] for row in listed(file, "annotations", instances)}
    for number, reference in enumerate(read_json_strictly(folder / "refs.json")):
        try:
            image = images[reference["image_id"]]
            box = padded_box(boxes[reference["ann_id"]], image["width"], image["height"])
            name = f"COCO2014/train2014/{image['file_name']}"
            for sentence in reference["sentences"]:
                key = f"{folder.name}-{sentence['sent_id']}"
                text = _REGION.format(sentence["sent"].strip().rstrip("."))
                if reference["split"] == "train":
                    turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": box}]
                    train.append({"id": key, "image": name, "conversations": turns})
                elif reference["split"] in ("test", "testA", "testB"):
                    size = [image["width"], image["height"]]
                    test.append({"question_id": key, "image": name, "text": text, "answer_bbox": box, "size": size})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ClmoeError(f"{folder / 'refs.json'}: row {number} (from 0): broken reference ({error!r})") from error


def _has_area(box: str) -> bool:
    x1, y1, x2, y2 = json.loads(box)
    return bool(x1 < x2 and y1 < y2)
