"""Fifty tasks in one process: does a step get slower, or the process larger, beyond what added experts explain?

    OMP_NUM_THREADS=1 python scripts/bench/soak.py OUT [--methods clmoe llava_cmoe] [--tasks 50] [--steps 10]
        [--set key=value ...]

Every task is the embedded benchmark's first one under a new name, trained from the checkpoint before. Prints, in groups
of tasks, the median CPU milliseconds of a training step (preemption does not lengthen them), the resident memory after
the task, and the experts per block; then the last group's figures over the second one's (the first one warms up).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil
import yaml

from clmoe import cli
from clmoe.benchmarks.base import load_benchmark
from clmoe.train.loop import TaskTrainer

GROUPS = 5
OPTIONS = {
    "clmoe": ["options.samples=64", "locator.samples=64"],
    "llava_cmoe": [
        "locator.samples=64",
        "options.probe_min_steps=5",
        "options.initial_experts_from=first_task",
        *(f"locator.options.{value}" for value in ("steps=20", "hidden=64", "latent=8", "draws=2")),
    ],
}


@dataclass(frozen=True)
class Task:
    """One task's step in CPU milliseconds, the memory after it in MiB, and the mean experts of a block."""

    step: float
    memory: float
    experts: float


def write_benchmark(folder: Path, tasks: int) -> Path:
    """The embedded benchmark's first task, again and again: batches of one length, so that steps can be compared."""
    source = load_benchmark("playground-coin")
    task = source.tasks[0]
    entries = [
        {
            "name": f"t{number:03}",
            "train": str(task.train),
            "test": str(task.test),
            "images": str(task.image_root),
            "scorer": task.scorer,
            "max_new_tokens": task.max_new_tokens,
        }
        for number in range(tasks)
    ]
    path = folder / "soak.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"name": "soak", "root": "/", "recipe": source.recipe, "tasks": entries}))
    return path


@contextlib.contextmanager
def timed_steps() -> Iterator[list[float]]:
    """CPU milliseconds of every training step of the main phase."""
    real, spent = TaskTrainer.training_step, []

    def step(self: TaskTrainer, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = real(self, *args, **kwargs)
        if self.phase.name == "trained":
            spent.append(1e3 * (time.process_time() - start))
        return result

    TaskTrainer.training_step = step  # type: ignore[method-assign]
    yield spent
    TaskTrainer.training_step = real  # type: ignore[method-assign]


def experts(checkpoint: Path) -> float:
    """Mean number of experts of a block."""
    layout = json.loads((checkpoint / "adapter_config.json").read_text())["layout"]
    return mean(len(owners) for owners in layout.values())


def soak(method: str, benchmark: Path, out: Path, tasks: int, overrides: list[str]) -> list[Task]:
    """Train all tasks in this process."""
    measured, previous = [], []
    for number in range(tasks):
        name = f"t{number:03}"
        line = ["train", "--config", method, "--benchmark", str(benchmark), "--task", name, *previous]
        line += ["--output", str(out / name), *OPTIONS[method], *overrides]
        with timed_steps() as spent, contextlib.redirect_stdout(io.StringIO()):
            cli.main(line)
        gc.collect()
        memory = psutil.Process().memory_info().rss / 2**20
        measured.append(Task(median(spent), memory, experts(out / name)))
        previous = ["--previous", str(out / name)]
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="options.alpha=-9: nothing is added")
    args = parser.parse_args()
    output = args.output.resolve()
    benchmark = write_benchmark(output, args.tasks)
    print("| method | tasks | step, CPU ms | memory after, MiB | experts per block |\n|---|---|---:|---:|---:|")
    for method in args.methods:
        shutil.rmtree(output / method, ignore_errors=True)
        done = soak(method, benchmark, output / method, args.tasks, [f"training.steps={args.steps}", *args.set])
        size = args.tasks // GROUPS
        groups = [done[k * size : (k + 1) * size] for k in range(GROUPS)]
        rows = [(median(t.step for t in g), median(t.memory for t in g), mean(t.experts for t in g)) for g in groups]
        for k, (step, memory, count) in enumerate(rows):
            span = f"{k * size + 1}-{(k + 1) * size}"
            print(f"| {method} | {span} | {step:.1f} | {memory:.0f} | {count:.1f} |", flush=True)
        ratios = [f"{last / second:.2f}" for last, second in zip(rows[-1], rows[1], strict=True)]
        print(f"| {method} | last group / second | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
