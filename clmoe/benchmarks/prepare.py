"""Put a benchmark's data in place (``clmoe data prepare``).

The field `prepare` names the builder, which leaves a task alone if one of its files exists. Files in other formats (a
task's field `raw`) are made into training and test files, again whenever they change.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clmoe.benchmarks.base import Benchmark, Task, load_benchmark, training_record
from clmoe.benchmarks.gold import entries, listed
from clmoe.data.formats import Kind, Raw, raw_rows
from clmoe.data.images import ending
from clmoe.data.records import Rows, iterate_train, load_questions
from clmoe.data.rows import Row, RowError, Seen, all_of, json_rows, read_json_strictly
from clmoe.embedded import build
from clmoe.errors import ClmoeError
from clmoe.utils.files import file_sha256, read_json, write_json

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
    """Write the training and test files of task ``Grounding`` if neither exists.

    Each sentence of split ``train`` in a ``RefCOCO/<name>/refs.json`` becomes a record, each of ``test``, ``testA`` and
    ``testB`` a question. Training records whose box has no area after rounding are left out and counted. Returns what
    was done, one line each. Raises ClmoeError for broken annotations, or for such a box in the test split.
    """
    task, annotations = benchmark.task("Grounding"), benchmark.root / "RefCOCO"
    if task.train.is_file() and task.test.is_file():
        return [f"Grounding: already there ({task.train})"]
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
    return [line + (f"; {left_out} record(s) left out because their boxes have no area" if left_out else "")]


def _references(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The split and test row of every sentence."""
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
    """Write the training and test files of every task that has neither.

    Only ``question_id`` is used from ``VQACL/karpathy_{train,test}_q_<task>.json``. Training answers are the most
    common ones (``multiple_choice_answer``); test questions also hold the ten annotators' answers. Returns what was
    done, one line each. Raises ClmoeError if a question of VQACL is not in VQA v2, or a file is broken.
    """
    lines = [task.half_there for task in benchmark.tasks if task.half_there]
    tasks = [task for task in benchmark.tasks if not task.train.is_file() and not task.test.is_file()]
    if not tasks:
        return lines or ["all tasks: already there"]
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
        image = f"COCO2014/{part}/COCO_{part}_{{image_id:012d}}.jpg"
        raw = Raw((), _raw_files(folder, part), image=image, instruction=_SUFFIX)
        for row in raw_rows(raw, "test", _no_image):
            if isinstance(row, RowError):
                raise row
            rows[str(row.data["question_id"])] = row.data
    return rows


def _chosen(file: Path, known: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for index, row in enumerate(json_rows(file)):
        name = str(row.get("question_id")) if isinstance(row, dict) else ""
        if name not in known:
            raise ClmoeError(f"{file}: row {index} (from 0): question_id {name!r} is not in VQA v2's questions")
        rows.append(known[name])
    return rows


# ---- files in other formats ----

FORMAT = 1  # of what is made from them; a new number makes all of it again


def prepare_raw(task: Task) -> list[str]:
    """Make training, test and image files from a task's raw files, unless they are up to date.

    A set of general ability has only a test file. A file that was not made here is left alone. Returns a line for each
    file that was written, and notes on its rows. Raises ClmoeError that lists all bad rows; then no file was written.
    """
    if task.raw is None:
        return []
    lines, bad, made = list[str](), list[ClmoeError](), dict[Path, tuple[list[Any], dict[str, Any]]]()
    for kind, file in task.made:
        about = file.with_suffix(".raw.json")
        there = read_json(about) if about.is_file() else None
        if file.is_file() and (there is None or not all(path.exists() for path in task.raw.files(kind))):
            continue
        decides = _decides(task.raw, kind, there or {})
        if there is not None and file.is_file() and _compared(there) == _compared(decides):
            continue
        seen, rows = Seen(), list[Any]()
        read = _collecting(raw_rows(task.raw, kind, _writer(task.image_root)), rows)
        try:
            if kind == "train":
                list(iterate_train(file, task.image_root, bad.append, seen=seen, rows=read))
            else:
                answered = task.gold is None
                load_questions(file, task.image_root, bad.append, answered=answered, seen=seen, rows=read)
            if not rows:
                raise ClmoeError(f"{task.raw.files(kind)[0]}: has no rows; expected at least one")
        except ClmoeError as error:
            bad.append(error)
        made[file] = rows, decides
        lines += [f"{task.name}: {file}: {len(rows)} rows", *(f"{task.name}: {kind}: {note}" for note in seen.notes())]
    if bad:
        raise all_of(bad)
    for file, (rows, decides) in made.items():
        write_json(file, rows)
        write_json(file.with_suffix(".raw.json"), decides)
    return lines


def _collecting(rows: Rows, into: list[Any]) -> Rows:
    for row in rows:
        if isinstance(row, Row):
            into.append(row.data)
        yield row


def _decides(raw: Raw, kind: Kind, known: dict[str, Any]) -> dict[str, Any]:
    """Settings and the sha256 of each raw file, taken from ``known`` if its size and time are as before."""
    files = {}
    for path in raw.files(kind):
        for file in sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]:
            status, before = file.stat(), known.get("files", {}).get(str(file), {})
            stamp = [status.st_size, status.st_mtime_ns]
            sha256 = before["sha256"] if before.get("stamp") == stamp else file_sha256(file)
            files[str(file)] = {"stamp": stamp, "sha256": sha256}
    settings = {key: value for key, value in asdict(raw).items() if key not in ("train", "test")}
    return {"format": FORMAT, "settings": settings, "files": files}


def _compared(decides: dict[str, Any]) -> Any:
    """Without names and times, since data may move."""
    return decides["format"], decides["settings"], [file["sha256"] for file in decides["files"].values()]


def _writer(folder: Path) -> Callable[[bytes], str]:
    """Writes an image into the folder, once for each content; the name is made from the content."""

    def keep(data: bytes) -> str:
        name = f"{hashlib.sha256(data).hexdigest()[:32]}.{ending(data, decode=False)}"
        if not (folder / name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f".{name}.partial"
            partial.write_bytes(data)
            partial.replace(folder / name)
        return name

    return keep


def _no_image(data: bytes) -> str:
    raise ClmoeError("an image is in the row")


# ---- all benchmarks ----


def _draw(benchmark: Benchmark, tasks: Collection[str] | None = None) -> list[str]:
    build.prepare(benchmark.name, benchmark.root)
    if tasks is None or any(task.general for task in benchmark.sets(tasks)):
        build.prepare_general(benchmark.root)
    return []


BUILDERS: dict[str, Callable[[Benchmark], list[str]]] = {
    "playground": _draw,
    "coin": prepare_grounding,
    "cl4vqa": prepare_cl4vqa,
}


def open_benchmark(name: str, data: Path | None = None, tasks: Collection[str] | None = None) -> Benchmark:
    """Like ``load_benchmark``, but draws embedded data and prepares raw files where necessary.

    With ``tasks``, only their files are required.
    """
    benchmark = load_benchmark(name, data, check_files=False)
    if benchmark.built_on_first_use:
        _draw(benchmark, [] if tasks is None else tasks)
    benchmark.require_files(tasks)
    for task in benchmark.sets(tasks):
        for line in prepare_raw(task):
            print(line, file=sys.stderr)
    return benchmark


def prepare_benchmark(benchmark: Benchmark) -> str:
    """What was built from the downloads that exist, a line each; ClmoeError adds the missing files."""
    lines = [] if benchmark.prepare is None else BUILDERS[benchmark.prepare](benchmark)
    missing = benchmark.missing_files()
    lines += [] if missing else [line for task in benchmark.sets() for line in prepare_raw(task)]
    if missing:
        raise ClmoeError("\n".join([*lines, f"{len(missing)} file(s) are missing below {benchmark.root}:", *missing]))
    return "\n".join(lines)
