"""CL4VQA: ten tasks built from VQA v2 and VQACL's division of its questions.

Order, files and scorers are in ``configs/benchmarks/cl4vqa.yaml``.
"""

from pathlib import Path
from typing import Any

from clmoe.benchmarks.base import Benchmark, training_record
from clmoe.benchmarks.gold import listed
from clmoe.data.records import json_rows
from clmoe.errors import ClmoeError
from clmoe.utils.files import write_json

_SUFFIX = "\nAnswer the question using a single word or phrase."
_PARTS = ("train2014", "val2014")


def prepare_cl4vqa(benchmark: Benchmark) -> list[str]:
    """Write training and test file of every task of which neither exists.

    Of ``VQACL/karpathy_{train,test}_q_<task>.json`` only ``question_id`` is used. Training answers are the most common
    ones (``multiple_choice_answer``); test questions also hold the ten annotators' answers. Returns what was done, one
    line each.

    Raises ClmoeError: a question of VQACL's is not in VQA v2, or a file is broken.
    """
    lines = [task.half_there for task in benchmark.tasks if task.half_there]
    tasks = [task for task in benchmark.tasks if not task.train.is_file() and not task.test.is_file()]
    if not tasks:
        return lines or ["all tasks: there already"]
    raw, division = benchmark.root / "VQA_v2", benchmark.root / "VQACL"
    chosen = {
        task.name: [division / f"karpathy_{part}_q_{task.name}.json" for part in ("train", "test")] for task in tasks
    }
    needed = [file for files in chosen.values() for file in files]
    needed += [file for part in _PARTS for file in _raw_files(raw, part)]
    lacking = [file for file in needed if not file.is_file()]
    if lacking:
        from_where = benchmark.source(lacking[0])
        return [*lines, f"not built, no {lacking[0]} ({len(lacking) - 1} more are missing), from {from_where}"]
    known = _vqa_rows(raw)
    for task in tasks:
        train, test = (_chosen(file, known) for file in chosen[task.name])
        write_json(task.train, [training_record(row, row["answer"]) for row in train])
        write_json(task.test, test)
        lines.append(f"{task.name}: {len(train)} training records, {len(test)} questions")
    return lines


def _raw_files(folder: Path, part: str) -> tuple[Path, Path]:
    return folder / f"v2_OpenEnded_mscoco_{part}_questions.json", folder / f"v2_mscoco_{part}_annotations.json"


def _vqa_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The test row of every question of VQA v2, by its id."""
    rows = {}
    for part in _PARTS:
        questions_file, annotations_file = _raw_files(folder, part)
        annotations = {row["question_id"]: row for row in listed(annotations_file, "annotations")}
        for question in listed(questions_file, "questions"):
            name = question["question_id"]
            if name not in annotations:
                raise ClmoeError(f"{annotations_file}: no annotation for question_id {name!r}")
            rows[str(name)] = {
                "question_id": name,
                "image": f"COCO2014/{part}/COCO_{part}_{question['image_id']:012d}.jpg",
                "text": question["question"].strip() + _SUFFIX,
                "answer": annotations[name]["multiple_choice_answer"],
                "answers": [answer["answer"] for answer in annotations[name]["answers"]],
            }
    return rows


def _chosen(file: Path, known: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for index, row in enumerate(json_rows(file)):
        name = str(row.get("question_id")) if isinstance(row, dict) else ""
        if name not in known:
            raise ClmoeError(f"{file}: row {index} (from 0): question_id {name!r} is not in VQA v2's questions")
        rows.append(known[name])
    return rows
