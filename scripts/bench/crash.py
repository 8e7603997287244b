"""Kill -9 in every phase of a task sequence, run again, and compare: nothing may be lost or differ.

    python scripts/bench/crash.py OUT [--methods clmoe llava_cmoe] [--kills 2] [--random 10] [--seed 0]

For each method a sequence of three tasks of the embedded benchmark (a few steps each) is run once without interruption
and once more while it is killed: at the named moments below, each `--kills` times, and at `--random` random moments
after the first saved state. Every file but events.jsonl and timing.json must then have the same bytes, the report
included. A moment that was never reached is a failure. Prints a Markdown table of kills survived.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
TASKS = ("sqa", "text", "imnet")
UNCOMPARED = ("events.jsonl", "timing.json")
LENGTH = ("training.steps=8", "training.save_steps=2", "evaluation.limit=24", "evaluation.batch_size=8")
OPTIONS = {
    "clmoe": ["options.samples=64"],
    "llava_cmoe": [
        "options.samples=64",
        "options.probe_min_steps=8",
        "options.initial_experts_from=warmup",
        *(f"options.locator.{value}" for value in ("steps=30", "hidden=16", "latent=4", "draws=2")),
    ],
}


@dataclass(frozen=True)
class Moment:
    """A call of a function at which the process is killed.

    Attributes:
        target: ``module:name`` or ``module:Class.name``.
        call: which call of it, from 1.
        phase: only calls of a trainer of this phase count.
        after: when it has returned instead of when it is entered.
        methods, tasks: where it comes to pass; tasks are numbered from 0.
    """

    target: str
    call: int = 1
    phase: str = ""
    after: bool = False
    methods: tuple[str, ...] = ("clmoe", "llava_cmoe")
    tasks: tuple[int, ...] = (0, 1, 2)


STEP = "clmoe.train.trainer:TaskTrainer.training_step"
MOMENTS = {
    "loading": Moment("clmoe.train.task:_load_base"),
    "warm-up training": Moment(STEP, 3, "initial", methods=("llava_cmoe",), tasks=(0,)),
    "probe training": Moment(STEP, 3, "probe", methods=("llava_cmoe",)),
    "decision": Moment("clmoe.methods.expansion:measure_activations", methods=("llava_cmoe",)),
    "expansion": Moment("clmoe.methods.llava_cmoe:LlavaCMoe._extend", after=True, methods=("llava_cmoe",)),
    "training": Moment(STEP, 3, "trained"),
    "saving a state": Moment("clmoe.train.state:save_tensors", after=True),
    "sealing the phase": Moment("clmoe.train.task:save_adapter"),
    "features": Moment("clmoe.methods.features:base_features", 2),
    "statistics": Moment("clmoe.methods.statistics:save_statistics", methods=("clmoe",)),
    "VAE fit": Moment("clmoe.model.vae_bank:TaskVae.log_p_rec", 10, methods=("llava_cmoe",)),
    "class mean": Moment("clmoe.methods.features:add_class_mean", after=True),
    "consolidation": Moment("clmoe.methods.momentum:consolidate", 3, methods=("clmoe",), tasks=(1, 2)),
    "saving the adapter": Moment("clmoe.train.task:save_adapter", after=True),
    "publishing": Moment("clmoe.train.task:publish"),
    "evaluation": Moment("clmoe.evaluate.generate:Answerer.generate", 2),
    "scoring": Moment("clmoe.evaluate.evaluation:_write_cell"),
    "tables": Moment("clmoe.evaluate.tables:write_tables"),
    "growth files": Moment("clmoe.evaluate.growth:record_growth"),
}
REPORT = {"report": Moment("pathlib:Path.write_text", 2)}


def die_at(moment: Moment) -> None:
    """Arm this process."""
    module_name, _, path = moment.target.partition(":")
    holder: Any = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for part in classes:
        holder = getattr(holder, part)
    real: Callable[..., Any] = getattr(holder, name)
    calls = Counter[str]()

    def armed(*args: Any, **kwargs: Any) -> Any:
        calls["made"] += not moment.phase or args[0].phase.name == moment.phase
        result = real(*args, **kwargs) if moment.after else None
        if calls["made"] == moment.call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result if moment.after else real(*args, **kwargs)

    setattr(holder, name, armed)


def start(line: list[str], moment: str = "") -> subprocess.Popen[bytes]:
    """``clmoe LINE`` in a process of its own, to be killed at ``moment``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CLMOE_PROGRESS": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, __file__, "--child", moment, *line], env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL
    )


def run(line: list[str], moment: str = "") -> int:
    return start(line, moment).wait()


def sequence(method: str, out: Path) -> list[list[str]]:
    """The commands of a run, in order."""
    where = ["--benchmark", "playground-coin", "--order", ",".join(TASKS)]
    warmup = REPOSITORY / "playground/data/playground-coin/warmup"
    own = [*LENGTH, *OPTIONS[method]]
    if method == "llava_cmoe":
        own += [f"options.warmup_train={warmup}/train.json", f"options.warmup_images={warmup}/images"]
    lines = []
    previous: list[str] = []
    for number, task in enumerate(TASKS, 1):
        output = out / f"{number:02}_{task}"
        step = ["train", "--config", method, *where, "--task", task, *previous, "--output", str(output), "--then-eval"]
        lines.append([*step, *own])
        previous = ["--previous", str(output)]
    return lines


def report_line(out: Path) -> list[str]:
    """The report of a finished run, whose minutes are set equal: they are wall time, and a report shows them."""
    (out / "timing.json").write_text('{"minutes": 1.0}\n')
    return ["report", str(out), "--format", "md,csv,tex"]


def check(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(f"FAILED: {message}")


def kill_by_moments(method: str, out: Path, kills: int) -> Counter[str]:
    """Run the sequence, killed at every moment; returns the kills survived."""
    survived: Counter[str] = Counter()
    for task, line in enumerate(sequence(method, out)):
        for name, moment in MOMENTS.items():
            if method not in moment.methods or task not in moment.tasks:
                continue
            # moments that only some tasks have are reached more often in those
            wanted = -(-kills * (moment.tasks.index(task) + 1) // len(moment.tasks))
            while survived[name] < wanted:
                code = run(line, name)
                check(code == -signal.SIGKILL, f"{method}, {TASKS[task]}: never came to '{name}' (exit code {code})")
                survived[name] += 1
        check(run(line) == 0, f"{method}: {TASKS[task]} does not end")
    for name in REPORT:
        for _ in range(kills):
            check(run(report_line(out), name) == -signal.SIGKILL, f"{method}: never came to '{name}'")
            survived[name] += 1
    check(run(report_line(out)) == 0, f"{method}: the report does not end")
    return survived


def kill_at_random(method: str, out: Path, kills: int, rng: random.Random) -> int:
    """Run the sequence, killed ``kills`` times at random moments after the first saved state of a task."""
    done = 0
    lines = sequence(method, out)
    for number, line in enumerate(lines):
        for _ in range(kills * (number + 1) // len(lines) - done):
            process = start(line)
            output = Path(line[line.index("--output") + 1])
            while process.poll() is None and not _has_state(output):
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 4))
            if process.poll() is None:
                process.kill()
                done += 1
            process.wait()
        check(run(line) == 0, f"{method}: {output.name} does not end")
    check(run(report_line(out)) == 0, f"{method}: the report does not end")
    return done


def _has_state(output: Path) -> bool:
    phases = output.parent / f".{output.name}.partial" / ".phases"
    return output.exists() or any(phases.glob("*.step-*/manifest.json")) or any(phases.glob("*/adapter_config.json"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those that hold times."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in UNCOMPARED)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def compare(method: str, straight: Path, broken: Path) -> int:
    """Number of equal files."""
    one, other = contents(straight), contents(broken)
    check(one.keys() == other.keys(), f"{method}: files differ: {sorted(one.keys() ^ other.keys())[:5]}")
    different = [name for name in one if one[name] != other[name]]
    check(not different, f"{method}: {len(different)} files differ, {different[:5]}")
    return len(one)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        moment = (MOMENTS | REPORT).get(sys.argv[2])
        if moment is not None:
            die_at(moment)
        from clmoe import cli

        cli.main(sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--methods", nargs="+", default=["clmoe", "llava_cmoe"], choices=list(OPTIONS))
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--random", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    output = args.output.resolve()
    check(run(["data", "prepare", "playground-coin"]) == 0, "the benchmark cannot be prepared")
    print("| method | moment of kill -9 | kills survived |\n|---|---|---:|")
    for method in args.methods:
        folders = [output / method / name for name in ("straight", "moments", "random")]
        shutil.rmtree(output / method, ignore_errors=True)
        for line in sequence(method, folders[0]):
            check(run(line) == 0, f"{method}: the unbroken run does not end")
        check(run(report_line(folders[0])) == 0, f"{method}: the unbroken run has no report")
        for name, count in kill_by_moments(method, folders[1], args.kills).items():
            print(f"| {method} | {name} | {count} |", flush=True)
        files = compare(method, *folders[:2])
        if args.random:
            print(f"| {method} | random | {kill_at_random(method, folders[2], args.random, rng)} |", flush=True)
            compare(method, folders[0], folders[2])
        print(f"| {method} | files of equal bytes | {files} |", flush=True)


if __name__ == "__main__":
    main()
