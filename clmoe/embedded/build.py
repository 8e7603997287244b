"""Draw an embedded benchmark to disk, in the files that a real benchmark has: JSON lists and PNG images.

    <root>/playground-coin/<task>/train.json, test.json, images/{train,test}/00000.png          (playground-long, too)
    <root>/playground-cl4vqa/<task>/train.json, test.json and one images/ for all tasks
    <root>/<any>/warmup/train.json, images/       the neutral mixture, for methods that warm up their experts
    <root>/playground-coin/general/<set>/test.json, images/         sets of general ability, drawn when asked for

The marker `benchmark.json` is written last, and the finished folder appears by one rename. A folder whose marker has
another version or size is drawn again.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from filelock import FileLock

from clmoe.data.records import Turn
from clmoe.embedded.scenes import SIDE, Scene, draw_distinct, render
from clmoe.embedded.tasks import (
    CL4VQA_TASKS,
    COIN_TASKS,
    GENERAL_SETS,
    LONG_TASKS,
    POOL_SAMPLERS,
    TaskSpec,
    sample_scene,
    sample_turns,
)
from clmoe.errors import ClmoeError
from clmoe.utils.names import unknown

VERSION = 1
"""Of everything that decides the files; raise it with any change to scenes, tasks or mixture that shows in them."""

MARKER = "benchmark.json"
WARMUP, GENERAL = "warmup", "general"
WARMUP_TURNS = 4

TASKS: dict[str, tuple[TaskSpec, ...]] = {
    "playground-coin": COIN_TASKS,
    "playground-cl4vqa": CL4VQA_TASKS,
    "playground-long": LONG_TASKS,
}
ROWS = {"train": 2_000, "test": 300}
"""Rows of each task's files."""


def prepare(benchmark_name: str, target: Path) -> Path:
    """Make sure that the folder `target` holds the whole benchmark of this version, and return it.

    Raises ClmoeError for an unknown name, or for somebody else's folder.
    """
    if benchmark_name not in TASKS:
        raise ClmoeError(unknown("embedded benchmark", benchmark_name, TASKS))
    return _prepare(target, benchmark_name, lambda folder: _write(folder, benchmark_name))


def prepare_general(root: Path) -> Path:
    """Make sure that the sets of general ability are in a folder below a benchmark's root; raises like ``prepare``."""

    def write(folder: Path) -> None:
        for general in GENERAL_SETS:
            _write_task(folder, GENERAL, general, {"test": ROWS["test"]}, {})

    return _prepare(root / GENERAL, GENERAL, write)


def _prepare(target: Path, name: str, write: Callable[[Path], None]) -> Path:
    """The finished folder of this name and version, which ``write`` fills if it is not there."""
    marker = _json({"name": name, "version": VERSION, "rows": ROWS})
    if _is_complete(target, marker):
        return target
    if target.exists() and not (target / MARKER).is_file():
        raise ClmoeError(f"{target} exists, but `clmoe data prepare` did not write it: choose another data folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):  # one of several processes draws, the others wait
        if _is_complete(target, marker):
            return target
        work = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=target.parent))
        try:
            write(work)
            (work / MARKER).write_text(marker)
            work.chmod(0o755)
            if target.exists():  # of another version or size
                shutil.rmtree(target)
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def draw_tasks(folder: Path, names: Sequence[str], rows: dict[str, int]) -> None:
    """Write the files of a few tasks of ``playground-coin``, with fewer rows: what a quick check needs."""
    for task in COIN_TASKS:
        if task.name in names:
            _write_task(folder, "playground-coin", task, rows, {})


def _is_complete(target: Path, marker: str) -> bool:
    """Whether the folder was written to the end, by this version of the generator and in these sizes."""
    return (target / MARKER).is_file() and (target / MARKER).read_text() == marker


def _write(folder: Path, benchmark: str) -> None:
    """Write all files of a benchmark except the marker."""
    shared = TASKS[benchmark] is CL4VQA_TASKS  # one pool of images for all tasks
    pools = {split: _scene_pool(split, folder / "images") for split in ROWS} if shared else {}
    for task in TASKS[benchmark]:
        _write_task(folder, benchmark, task, ROWS, pools)
    # the mixture that the base was pre-trained on: its scenes are in no task's training or test set
    rng, records = Random(f"0/{WARMUP}"), []
    for i in range(ROWS["train"]):
        scene = sample_scene(rng)
        turns = sample_turns(scene, rng, WARMUP_TURNS)
        records.append(_record(f"{WARMUP}-{i}", _save(scene, folder / WARMUP / "images", f"{i:05d}.png"), turns))
    _write_json(folder / WARMUP / "train.json", records)


def _write_task(
    folder: Path, benchmark: str, task: TaskSpec, counts: dict[str, int], pools: dict[str, list[tuple[str, Scene]]]
) -> None:
    """Write a task's two files and, unless ``pools`` has the images of all tasks, its images."""
    for split, count in counts.items():
        rng = Random(f"0/{benchmark}/{task.name}/{split}")
        if pools:
            asked = [(image, task.turns(scene, rng)) for image, scene in rng.sample(pools[split], len(pools[split]))]
            pairs: Iterable[tuple[str, list[Turn]]] = [(image, turns) for image, turns in asked if turns][:count]
        else:
            pairs = _own_scenes(task, split, rng, count, folder / task.name / "images")
        named = [(f"{task.name}-{i}", *pair) for i, pair in enumerate(pairs)]
        if split == "train":
            rows = [_record(name, image, turns[: task.max_turns]) for name, image, turns in named]
        else:
            rows = [_test_row(task, *row) for row in named]
        _write_json(folder / task.name / f"{split}.json", rows)


def _own_scenes(task: TaskSpec, split: str, rng: Random, count: int, images: Path) -> Iterator[tuple[str, list[Turn]]]:
    """(image path, turns) of a task that has its own images; each kind of image has an equal share."""
    each, rest = divmod(count, len(task.samplers))
    found = [
        scene
        for number, sampler in enumerate(task.samplers)
        for scene in draw_distinct(sampler, split, rng, each + (number < rest), task.backgrounds)
    ]
    rng.shuffle(found)
    for i, sharp in enumerate(found):
        scene = sharp.blurred(rng) if rng.random() < task.blur else sharp
        yield _save(scene, images, f"{split}/{i:05d}.png"), task.turns(scene, rng)


def _scene_pool(split: str, images: Path) -> list[tuple[str, Scene]]:
    """The images that all tasks share: as many of each kind as a task has rows, enough for each to ask about."""
    rng = Random(f"0/pool/{split}")
    pool = [scene for sampler in POOL_SAMPLERS for scene in draw_distinct(sampler, split, rng, ROWS[split])]
    rng.shuffle(pool)
    return [(_save(scene, images, f"{split}/{i:05d}.png"), scene) for i, scene in enumerate(pool)]


def _save(scene: Scene, images: Path, name: str) -> str:
    path = images / name
    path.parent.mkdir(parents=True, exist_ok=True)
    render(scene).save(path, compress_level=1)
    return name


def _record(name: str, image: str, turns: list[Turn]) -> dict[str, Any]:
    conversation = []
    for i, turn in enumerate(turns):
        mark = "" if i else "<image>\n"
        conversation += [{"from": "human", "value": mark + turn.question}, {"from": "gpt", "value": turn.answer}]
    return {"id": name, "image": image, "conversations": conversation}


def _test_row(task: TaskSpec, name: str, image: str, turns: list[Turn]) -> dict[str, Any]:
    question, answer = turns[0].question, turns[0].answer
    row = {"question_id": name, "image": image, "text": question, "answer": answer}
    return row | {"answer_bbox": answer, "size": [SIDE, SIDE]} if task.boxes else row


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_json(value))
