"""Start-up on a large benchmark: time and memory of `clmoe train` on the union of eight tasks with 569,000 records.

    python scripts/bench/startup.py [--rows 569000] [--folder /tmp/startup]

The benchmark is synthetic: CoIN's task names and sizes, questions of their usual length, a pool of 20,000 images. Each
command trains eight steps of batch 8 on the embedded model with two loading processes: once with an empty cache, where
every row is validated, and once more. Printed are the wall time of the whole command and the largest resident memory
of a process of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml
from PIL import Image

# thousands of training records of CoIN's tasks
SHARES = {"ScienceQA": 12, "TextVQA": 34, "ImageNet": 129, "GQA": 72, "VizWiz": 20, "Grounding": 55, "VQAv2": 82}
SHARES["OCR-VQA"] = 165
IMAGES = 20_000
REPOSITORY = Path(__file__).resolve().parents[2]


def build(folder: Path, rows: int) -> Path:
    """Write the benchmark, unless it is there; returns its YAML."""
    path = folder / "synthetic.yaml"
    if path.exists():
        return path
    images = folder / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (56, 56), "grey").save(folder / "one.png")
    data = (folder / "one.png").read_bytes()
    for number in range(IMAGES):
        (images / f"{number:06}.png").write_bytes(data)
    tasks = []
    for name, share in SHARES.items():
        count = rows * share // sum(SHARES.values())
        records = [record(name, number) for number in range(count)]
        (folder / f"{name}.json").write_text(json.dumps(records))
        test = [{"question_id": 1, "image": "images/000000.png", "text": "What is it?", "answer": "dog"}]
        (folder / f"{name}-test.json").write_text(json.dumps(test))
        files = {"train": f"{name}.json", "test": f"{name}-test.json", "images": "."}
        tasks.append({"name": name, **files, "scorer": "short_answer", "max_new_tokens": 8})
    path.write_text(yaml.safe_dump({"name": "synthetic", "root": ".", "tasks": tasks}, sort_keys=False))
    return path


def record(task: str, number: int) -> dict[str, object]:
    question = f"<image>\nWhat is written on the {number % 97}th thing of the picture, seen from the left in {task}?"
    suffix = "\nAnswer the question using a single word or phrase."
    turns = [{"from": "human", "value": question + suffix}, {"from": "gpt", "value": f"answer {number % 1009}"}]
    return {"id": f"{task}-{number}", "image": f"images/{number % IMAGES:06}.png", "conversations": turns}


def measure(path: Path, folder: Path, title: str) -> None:
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = [sys.executable, "-m", "clmoe.cli", "train", "--config", "multitask", "--task", "all"]
    command += ["--benchmark", str(path), "--output", str(folder / "run" / "01_all"), "training.steps=1"]
    command += ["training.batch_size=8", "training.workers=2", "adapter.train_projector=false"]
    environment = {**os.environ, "CLMOE_CACHE": str(folder / "cache"), "CLMOE_PROGRESS": "0"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    begin = time.perf_counter()
    child = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)  # of this command and its own processes, not of an earlier one
    seconds = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{title}: clmoe train failed with {child.returncode}")
    peak = usage.ru_maxrss / 2**20
    print(f"{title:<12}{seconds:7.1f} s   {peak:5.2f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=569_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/clmoe-startup"))
    options = parser.parse_args()
    path = build(options.folder, options.rows)
    size = sum(file.stat().st_size for file in options.folder.glob("*.json")) / 2**20
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
    print(f"{options.rows} rows, {size:.0f} MiB of JSON, {machine}")
    shutil.rmtree(options.folder / "cache", ignore_errors=True)
    measure(path, options.folder, "empty cache")
    measure(path, options.folder, "again")


if __name__ == "__main__":
    main()
