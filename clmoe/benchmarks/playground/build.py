"""Writes a playground benchmark to disk, in the files a real benchmark has: JSON lists and PNG images.

    <root>/playground-coin/<task>/train.json, test.json, images/{train,test}/00000.png
    <root>/playground-cl4vqa/<task>/train.json, test.json and one images/ for all tasks
    <root>/<either>/warmup/train.json, images/       the neutral mixture, for methods that warm up their experts

`benchmark.json`, written last, holds the hash of everything that decides the files. A folder without it, or
with another hash, is built anew; the finished folder appears by one rename.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from clmoe.benchmarks.playground import lexicon, mixture, sampling, scenes, tasks
from clmoe.benchmarks.playground.sampling import draw_distinct
from clmoe.benchmarks.playground.scenes import SIDE, Scene, render
from clmoe.benchmarks.playground.tasks import QA, TaskSpec, choose_scene
from clmoe.errors import ClmoeError
from clmoe.utils.names import unknown

MARKER = "benchmark.json"
WARMUP = "warmup"
WARMUP_TURNS = 4


@dataclass(frozen=True)
class BenchmarkSpec:
    """A benchmark's tasks in order and its sizes. `shared_images`: one pool of images for all tasks."""

    tasks: tuple[TaskSpec, ...]
    shared_images: bool
    train_rows: int = 2_000
    test_rows: int = 300
    seed: int = 0


SPECS = {
    "playground-coin": BenchmarkSpec(tasks.COIN_TASKS, shared_images=False),
    "playground-cl4vqa": BenchmarkSpec(tasks.CL4VQA_TASKS, shared_images=True),
}


def prepare(benchmark_name: str, target: Path) -> Path:
    """Make sure that a playground benchmark lies complete in the folder `target`; returns it.

    Nothing is done if it is there already. Seconds otherwise; a folder that an older version of the generator wrote is
    replaced.

    Raises:
        ClmoeError: the benchmark is not one of the playground's, or the folder holds something else.
    """
    if benchmark_name not in SPECS:
        raise ClmoeError(unknown("playground benchmark", benchmark_name, list(SPECS)))
    spec = SPECS[benchmark_name]
    if is_complete(target, spec):
        return target
    if target.exists() and not (target / MARKER).is_file():
        raise ClmoeError(f"{target} exists and was not written by the playground: choose another data folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{benchmark_name}.", dir=target.parent))
    try:
        write(work, benchmark_name, spec)
        work.chmod(0o755)
        _put_in_place(work, target, spec)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def is_complete(target: Path, spec: BenchmarkSpec) -> bool:
    """Whether the folder was written to the end by this very version of the generator."""
    try:
        return json.loads((target / MARKER).read_text())["config_hash"] == config_hash(spec)
    except (OSError, ValueError, KeyError):
        return False


def config_hash(spec: BenchmarkSpec) -> str:
    """Hash of the sizes, the seed and the modules that draw scenes and ask questions."""
    digest = hashlib.sha256(repr((spec.train_rows, spec.test_rows, spec.seed, spec.shared_images)).encode())
    for module in (lexicon, mixture, scenes, sampling, tasks):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:16]


def _put_in_place(work: Path, target: Path, spec: BenchmarkSpec) -> None:
    """Rename the finished folder; if another process was faster, keep its folder."""
    if target.exists() and not is_complete(target, spec):
        shutil.rmtree(target)
    try:
        work.rename(target)
    except OSError:
        if not is_complete(target, spec):
            raise


def write(folder: Path, name: str, spec: BenchmarkSpec) -> None:
    """All files of a benchmark, the marker last."""
    pools = {split: _scene_pool(spec, split, folder) for split in ("train", "test")} if spec.shared_images else {}
    rows: dict[str, dict[str, int]] = {}
    for task in spec.tasks:
        (folder / task.name).mkdir()
        rows[task.name] = {}
        for split in ("train", "test"):
            rng = Random(f"{spec.seed}/{name}/{task.name}/{split}")
            count = spec.train_rows if split == "train" else spec.test_rows
            pairs = (
                _from_pool(task, pools[split], rng, count) if pools else _own_scenes(task, split, rng, count, folder)
            )
            make = _train_row if split == "train" else _test_row
            records = [
                make(f"{task.name}-{i}", image, turns[: task.max_turns]) for i, (image, turns) in enumerate(pairs)
            ]
            (folder / task.name / f"{split}.json").write_text(json.dumps(records, indent=1) + "\n")
            rows[task.name][split] = len(records)
    rows[WARMUP] = {"train": _write_warmup(folder / WARMUP, spec)}
    marker = {"name": name, "config_hash": config_hash(spec), "seed": spec.seed, "rows": rows}
    (folder / MARKER).write_text(json.dumps(marker, indent=1) + "\n")


def _write_warmup(folder: Path, spec: BenchmarkSpec) -> int:
    """The mixture that the base was pre-trained on: its scenes are in no task's training or test set."""
    rng = Random(f"{spec.seed}/{WARMUP}")
    records = []
    for i in range(spec.train_rows):
        scene = mixture.sample_scene(rng)
        turns = [QA(question, answer) for question, answer in mixture.sample_turns(scene, rng, WARMUP_TURNS)]
        image = _save(scene, folder / "images", f"{i:05d}.png")
        records.append(_train_row(f"{WARMUP}-{i}", image, turns))
    (folder / "train.json").write_text(json.dumps(records, indent=1) + "\n")
    return len(records)


def _own_scenes(task: TaskSpec, split: str, rng: Random, count: int, folder: Path) -> Iterable[tuple[str, list[QA]]]:
    """(image path, turns) of a task that has its own images."""
    images = folder / task.name / "images"
    share = [count // len(task.samplers) + (i < count % len(task.samplers)) for i in range(len(task.samplers))]
    found = [
        scene
        for sampler, part in zip(task.samplers, share, strict=True)
        for scene in draw_distinct(sampler, split, rng, part, task.backgrounds)
    ]
    rng.shuffle(found)
    for i, plain in enumerate(found):
        scene = choose_scene(task, plain, rng)
        yield _save(scene, images, f"{split}/{i:05d}.png"), task.ask(scene, rng)


def _scene_pool(spec: BenchmarkSpec, split: str, folder: Path) -> list[tuple[str, Scene]]:
    """The images all tasks share: enough scenes that tasks asking about single things find their rows."""
    rng = Random(f"{spec.seed}/pool/{split}")
    count = spec.train_rows if split == "train" else spec.test_rows
    pool = [scene for sampler in tasks.POOL_SAMPLERS for scene in draw_distinct(sampler, split, rng, count)]
    rng.shuffle(pool)
    return [(_save(scene, folder / "images", f"{split}/{i:05d}.png"), scene) for i, scene in enumerate(pool)]


def _from_pool(task: TaskSpec, pool: list[tuple[str, Scene]], rng: Random, count: int) -> list[tuple[str, list[QA]]]:
    """(image path, turns) over the pool's images that the task can ask about."""
    asked = [(image, task.ask(scene, rng)) for image, scene in rng.sample(pool, len(pool))]
    return [(image, turns) for image, turns in asked if turns][:count]


def _save(scene: Scene, images: Path, name: str) -> str:
    path = images / name
    path.parent.mkdir(parents=True, exist_ok=True)
    render(scene).save(path, compress_level=1)
    return name


def _train_row(name: str, image: str, turns: list[QA]) -> dict[str, Any]:
    conversation = []
    for i, turn in enumerate(turns):
        question = turn.question if i else f"<image>\n{turn.question}"
        conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": turn.answer}]
    return {"id": name, "image": image, "conversations": conversation}


def _test_row(name: str, image: str, turns: list[QA]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "question_id": name,
        "image": image,
        "text": turns[0].question,
        "answer": turns[0].answer,
    }
    if turns[0].box:
        row |= {"answer_bbox": turns[0].answer, "size": [SIDE, SIDE]}
    return row
