"""CoIN's grounding task, built from the annotations of RefCOCO, RefCOCO+ and RefCOCOg.

Order, files and scorers of CoIN's eight tasks are in ``configs/benchmarks/coin.yaml``.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clmoe.benchmarks.base import Benchmark, training_record
from clmoe.benchmarks.gold import entries, listed
from clmoe.data.records import read_json_strictly
from clmoe.errors import ClmoeError
from clmoe.utils.files import write_json

_QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: {}."


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
    """Write training and test file of task ``Grounding`` where neither exists.

    Each sentence of split ``train`` in a ``RefCOCO/<name>/refs.json`` becomes a record, each of ``test``, ``testA`` and
    ``testB`` a question. A box that has no area after rounding would be a malformed answer: such training records are
    left out and counted. Returns what was done, one line each.

    Raises ClmoeError: broken annotations, or a box of the test split has no area after rounding.
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
            raise ClmoeError(
                f"{annotations}: sentence {row['question_id']} about {row['image']}: box {row['answer_bbox']} has no "
                "area after rounding, so no answer would be right; remove its reference"
            )
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
