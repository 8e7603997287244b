"""CL4VQA: the ten tasks built from VQA v2 and VQACL's division of its questions.

Order, files and rules are in ``configs/benchmarks/cl4vqa.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmoe.benchmarks.entries import entries, listed
from clmoe.data.json_rows import json_rows
from clmoe.errors import ClmoeError
from clmoe.utils.files import write_json

if TYPE_CHECKING:
    from clmoe.benchmarks.base import Benchmark

RAW, DIVISION = "VQA_v2", "VQACL"
"""Folders of VQA v2's and of VQACL's files below the benchmark's root."""

_SUFFIX = "\nAnswer the question using a single word or phrase."
_PARTS = ("train2014", "val2014")


def prepare_cl4vqa(benchmark: Benchmark) -> list[str]:
    """Write the training and test files of every task of which neither is there.

    Reads ``VQA_v2/v2_OpenEnded_mscoco_{train,val}2014_questions.json``, ``v2_mscoco_{train,val}2014_annotations.json``
    and ``VQACL/karpathy_{train,test}_q_<task>.json``, of which only ``question_id`` is used. Training answers are the
    most common ones (``multiple_choice_answer``); test questions also hold the ten annotators' answers.

    Returns what was done, one line each.

    Raises:
        ClmoeError: a question of VQACL's is not in VQA v2, or a file is missing or broken.
    """
    halves = {task.name: half for task in benchmark.tasks if (half := task.half_there()) is not None}
    lines = [
        f"{name}: not built, {there} is there without {lacking.name}: delete it, or bring both"
        for name, (there, lacking) in halves.items()
    ]
    tasks = [task for task in benchmark.tasks if not task.train.is_file() and not task.test.is_file()]
    if not tasks:
        return lines or ["all tasks: there already"]
    division = benchmark.root / DIVISION
    wanted = {
        task.name: [division / f"karpathy_{part}_q_{task.name}.json" for part in ("train", "test")] for task in tasks
    }
    lacking = [file for files in wanted.values() for file in files if not file.is_file()]
    raw = [benchmark.root / RAW / name for part in _PARTS for name in _raw_names(part)]
    lacking += [file for file in raw if not file.is_file()]
    if lacking:
        from_where = benchmark.source(lacking[0])
        return [*lines, f"not built, no {lacking[0]} ({len(lacking) - 1} more are missing), from {from_where}"]
    known = dict(_vqa_rows(benchmark.root / RAW))
    for task in tasks:
        train_file, test_file = wanted[task.name]
        train, test = _chosen(train_file, known), _chosen(test_file, known)
        write_json(task.train, [_train_row(row) for row in train])
        write_json(task.test, test)
        lines.append(f"{task.name}: {len(train)} training records, {len(test)} questions")
    return lines


def _raw_names(part: str) -> tuple[str, str]:
    return f"v2_OpenEnded_mscoco_{part}_questions.json", f"v2_mscoco_{part}_annotations.json"


def _vqa_rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Id, image, text and answers of every question of VQA v2."""
    for part in _PARTS:
        questions_file, annotations_file = (folder / name for name in _raw_names(part))
        annotations = {
            row["question_id"]: row for row in listed(annotations_file, "annotations", entries(annotations_file))
        }
        for row in listed(questions_file, "questions", entries(questions_file)):
            name = row["question_id"]
            if name not in annotations:
                raise ClmoeError(f"{annotations_file}: no annotation for question_id {name!r}")
            yield (
                str(name),
                {
                    "question_id": name,
                    "image": f"COCO2014/{part}/COCO_{part}_{row['image_id']:012d}.jpg",
                    "text": row["question"].strip() + _SUFFIX,
                    "answer": annotations[name]["multiple_choice_answer"],
                    "answers": [answer["answer"] for answer in annotations[name]["answers"]],
                },
            )


def _chosen(file: Path, known: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for index, row in enumerate(json_rows(file)):
        name = str(row.get("question_id")) if isinstance(row, dict) else ""
        if name not in known:
            raise ClmoeError(f"{file}: row {index} (from 0): question_id {name!r} is not in VQA v2's questions")
        rows.append(known[name])
    return rows


def _train_row(row: dict[str, Any]) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{row['text']}"}, {"from": "gpt", "value": row["answer"]}]
    return {"id": str(row["question_id"]), "image": row["image"], "conversations": turns}
