"""Putting a benchmark's data in place (``clmoe data prepare``).

The field `prepare` names the builder; a task that has one of its files is left alone.
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from clmoe.benchmarks.base import Benchmark, load_benchmark, training_record
from clmoe.benchmarks.gold import entries, listed
from clmoe.data.rows import json_rows, read_json_strictly
from clmoe.embedded import build
from clmoe.errors import ClmoeError
from clmoe.utils.files import write_json

_QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: {}."
_SUFFIX = "\nAnswer the question using a single word or phrase."
_PARTS = ("train2014", "val2014")


# ---- CoIN's grounding task, from the annotations of RefCOCO, RefCOCO+ and RefCOCOg ----


def padded_box(box: Sequence[float], width: int, height: int) -> str:
    """COCO's ``[x, y, w, h]`` in pixels as ``[x1, y1, x2, y2]`` in fractions of the square around the image."""
    x, y, w, h = box
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    corners = (x + left, y + top, x + w + left, y + h + top)
    return f"[{', '.join(f'{min(max(value / side, 0), 1):.2f}' for value in corners)}]"


def prepare_grounding(benchmark: Benchmark) -> list[str]:
    """Write training and test file of task ``Grounding`` where neither exists.

    Each sentence of split ``train`` in a ``RefCOCO/<name>/refs.json`` becomes a record, each of ``test``, ``testA`` and
    ``testB`` a question. Training records whose box has no area after rounding are left out and counted. Returns what
    was done, one line each. Raises ClmoeError: broken annotations, or such a box in the test split.
    """
    task, annotations = benchmark.task("Grounding"), benchmark.root / "RefCOCO"
    if task.train.is_file() and task.test.is_file():
        return [f"Grounding: there already ({task.train})"]
    if task.half_there:
        return [task.half_there]
    folders = sorted(path.parent for path in annotations.glob("*/refs.json"))
    if not folders:
        return [f"Grounding: not built, no {annotations}/*/refs.json, from {benchmark.source(annotations)}"]
    rows = [row for folder in folders for row in _references(folder)]
    test = [row for split, row in rows if split in ("test", "testA", "testB")]
    for row in test:
        if not _has_area(row["answer_bbox"]):
            where = f"{annotations}: sentence {row['question_id']} about {row['image']}: box {row['answer_bbox']}"
            raise ClmoeError(f"{where} has no area after rounding, so no answer would be right; remove its reference")
    train = [training_record(row, row["answer_bbox"]) for split, row in rows if split == "train"]
    kept = [record for record in train if _has_area(record["conversations"][1]["value"])]
    write_json(task.train, kept)
    write_json(task.test, test)
    line = f"Grounding: {len(kept)} training records, {len(test)} questions from {len(folders)} annotation folder(s)"
    left_out = len(train) - len(kept)
    return [line + (f"; {left_out} record(s) left out, as their boxes have no area" if left_out else "")]


def _references(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Split and test row of every sentence."""
    file, references = folder / "instances.json", folder / "refs.json"
    instances = entries(file)
    images = {row["id"]: row for row in listed(file, "images", instances)}
    boxes = {row["id"]: row["bbox"] for row in listed(file, "annotations", instances)}
    for number, reference in enumerate(read_json_strictly(references)):
        try:
            image = images[reference["image_id"]]
            size = (image["width"], image["height"])
            common = {
                "image": f"COCO2014/train2014/{image['file_name']}",
                "answer_bbox": padded_box(boxes[reference["ann_id"]], *size),
                "size": list(size),
            }
            for sentence in reference["sentences"]:
                text = _QUESTION.format(sentence["sent"].strip().rstrip("."))
                name = f"{folder.name}-{sentence['sent_id']}"
                yield reference["split"], {"question_id": name, "text": text, **common}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ClmoeError(f"{references}: row {number} (from 0): broken reference ({error!r})") from error


def _has_area(box: str) -> bool:
    x1, y1, x2, y2 = json.loads(box)
    return bool(x1 < x2 and y1 < y2)


# ---- CL4VQA, from VQA v2 and VQACL's division of its questions ----


def prepare_cl4vqa(benchmark: Benchmark) -> list[str]:
    """Write training and test file of every task of which neither exists.

    Of ``VQACL/karpathy_{train,test}_q_<task>.json`` only ``question_id`` is used. Training answers are the most common
    ones (``multiple_choice_answer``); test questions also hold the ten annotators' answers. Returns what was done, one
    line each. Raises ClmoeError: a question of VQACL's is not in VQA v2, or a file is broken.
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


# ---- all benchmarks ----


def _draw(benchmark: Benchmark) -> list[str]:
    build.prepare(benchmark.name, benchmark.root)
    return []


BUILDERS: dict[str, Callable[[Benchmark], list[str]]] = {
    "playground": _draw,
    "coin": prepare_grounding,
    "cl4vqa": prepare_cl4vqa,
}


def open_benchmark(name: str, data: Path | None = None, tasks: Collection[str] | None = None) -> Benchmark:
    """As ``load_benchmark``, but embedded data is drawn on first use; with ``tasks`` only their files are required."""
    benchmark = load_benchmark(name, data, check_files=False)
    if benchmark.built_on_first_use:
        _draw(benchmark)
    benchmark.require_files(tasks)
    return benchmark


def prepare_benchmark(benchmark: Benchmark) -> str:
    """What was built from the downloads that are there, a line each; ClmoeError adds the missing files."""
    lines = [] if benchmark.prepare is None else BUILDERS[benchmark.prepare](benchmark)
    missing = benchmark.missing_files()
    if missing:
        raise ClmoeError("\n".join([*lines, f"{len(missing)} file(s) are missing below {benchmark.root}:", *missing]))
    return "\n".join(lines)
