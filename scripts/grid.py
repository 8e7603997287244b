"""Run a grid of configs/grids.yaml on a benchmark: every row with every seed, several side by side, cheapest first.

    python scripts/grid.py GRID [--benchmark B] [--seeds 0,1,2] [--jobs N] [--only LABEL,LABEL] [--list] [key=value ...]
                           [--tuned FOLDER]

A run is the folder OUT/LABEL-seedK, shared by all grids with that row; its output goes to OUT/logs. Run the same line
again after any stop: finished runs are skipped, unfinished ones continue. After a failure nothing new starts.
--list prints what is left and about how many hours it takes.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import yaml

from clmoe.config import build, load_config
from clmoe.errors import ClmoeError
from clmoe.utils.files import read_json
from clmoe.utils.names import unknown
from clmoe.utils.processes import EXIT_CODE

CLMOE = [sys.executable, "-m", "clmoe.cli"]
DEFAULT_SEEDS = 3
COSTS = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"  # measured, by method
START = 4700
"""Rounds of the calibration that a run takes before its first step."""


def rounds_per_second(jobs: int, seconds: float = 1.0) -> float:
    """How fast one of ``jobs`` processes is: rounds of the small model's matrix products and activations, measured.

    It counts each thread's own CPU time, since the benchmark may be drawn at the same time.
    """
    x, w = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in ((1600, 128), (128, 344)))

    def lane(_: int) -> int:
        rounds, end = 0, time.thread_time() + seconds
        while time.thread_time() < end:
            y = x @ w
            y *= 1 / (1 + np.exp(-y))
            rounds += 1
        return rounds

    with ThreadPoolExecutor(jobs) as lanes:
        return sum(lanes.map(lane, range(jobs))) / jobs / seconds


@dataclass(frozen=True)
class Row:
    """One variant; configs/grids.yaml explains its fields."""

    label: str
    method: str = ""
    order: str = ""
    set: list[str] = field(default_factory=list)
    locators: list[str] = field(default_factory=list)
    of: str = ""
    once: bool = False
    benchmark: str = ""


class Grid:
    """The rows of a grid on one benchmark, and their runs. `stopped` says why nothing new starts."""

    def __init__(self, args: argparse.Namespace) -> None:
        content, name = yaml.safe_load(args.file.read_text(encoding="utf-8")), Path(args.benchmark).stem
        self.args, self.stopped, self.code, self.rows = args, "", 0, dict[str, Row]()
        self.children: set[subprocess.Popen[bytes]] = set()
        self.out = args.out or Path("runs/grid") / name
        for label, values in content["rows"].items():
            self.rows[label] = build(Row, {"label": label, **values}, f"{args.file}: rows.{label}")
            for locator in self.rows[label].locators:
                self.rows[f"{label}_{locator}"] = Row(f"{label}_{locator}", of=label, set=[f"locator={locator}"])
        if args.grid not in content["grids"]:
            raise ClmoeError(f"{args.file}: {unknown('grid', args.grid, content['grids'])}")
        grid = content["grids"][args.grid]
        end = f"_{args.grid}" if grid.get("budget") else ""
        wanted = [label.removesuffix(end) for label in args.only]
        wanted = wanted or [row for rows in grid["sections"].values() for row in rows]
        for label in [*wanted, *(row.of for row in self.rows.values() if row.of)]:
            if label not in self.rows:
                raise ClmoeError(f"{args.file}: {unknown('row', label, self.rows)}")
        wanted = {*wanted, *(self.rows[label].of for label in wanted)}
        self.chosen = [row for row in self.rows.values() if row.label in wanted and name.startswith(row.benchmark)]
        counts = {"default": DEFAULT_SEEDS} | grid.get("seeds", {}).get(name, {})
        self.seeds = {row.label: list(range(counts.get(row.label, counts["default"]))) for row in self.chosen}
        if budget := grid.get("budget"):
            self._match(end, [f"budget.{key}={value}" for key, value in budget.items()], grid.get("set", {}))

    def _match(self, end: str, budget: list[str], own: dict[str, list[str]]) -> None:
        """Give all rows, under labels of their own with this ``end``, the grid's budget and what it sets for a row."""
        if evaluated := [row.label for row in self.chosen if row.of]:
            raise ClmoeError(
                f"{self.args.file}: grids.{self.args.grid}: {evaluated[0]} trains nothing that has a budget"
            )
        self.seeds = {f"{label}{end}": seeds for label, seeds in self.seeds.items()}
        self.chosen = [
            replace(row, label=row.label + end, method=row.method or row.label,
                    set=[*row.set, *own.get(row.label, []), *budget])
            for row in self.chosen
        ]  # fmt: skip
        self.rows |= {row.label: row for row in self.chosen}

    def commands(self, row: Row, seed: int) -> list[list[str]]:
        """One `clmoe run`; or a `clmoe eval` for each checkpoint of the row whose checkpoints are evaluated again."""
        args, source, label = self.args, self.rows[row.of or row.label], f"label={row.label}"
        where = ["--order", source.order or args.order, "--output", str(self.out / f"{row.label}-seed{seed}")]
        where += ["--data", args.data] if args.data else []
        if row.of:
            overrides = [text for text in args.overrides if text.startswith("evaluation.")]
            evaluate = [*CLMOE, "eval", "--benchmark", args.benchmark, *where, "--checkpoint"]
            checkpoints = sorted((self.out / f"{row.of}-seed{seed}").glob("[0-9]*_*/"))
            return [[*evaluate, str(checkpoint), label, *row.set, *overrides] for checkpoint in checkpoints]
        where += ["--seed", str(seed), *(["--base", args.base] if args.base else [])]
        return [[*CLMOE, "run", row.method or row.label, args.benchmark, *where, label, *self.settings(row)]]

    def settings(self, row: Row) -> list[str]:
        """Settings of a row that trains: its own, what was chosen for its method, and those of the command line."""
        method, folder = row.method or row.label, self.args.tuned
        tuned = [f"tuned={folder / f'{Path(method).stem}.json'}"] if folder and load_config(method, {}, []).tune else []
        return [*row.set, *tuned, *self.args.overrides]

    def todo(self, row: Row, seed: int) -> tuple[list[list[str]], Path]:
        """The commands that have not succeeded yet (all of them if the run folder is gone), and the run's log."""
        name = f"{row.label}-seed{seed}"
        log = self.out / "logs" / f"{name}.log"
        ended = log.read_text(errors="replace").splitlines() if log.exists() and (self.out / name).exists() else []
        todo = [command for command in self.commands(row, seed) if f"finished: {shlex.join(command)}" not in ended]
        return todo, log

    def run(self, row: Row, seed: int, source: Future[None] | None) -> None:
        """Run what is left of a row, once the run whose checkpoints it needs has ended."""
        if source:
            source.result()
        commands, log = self.todo(row, seed)
        log.parent.mkdir(parents=True, exist_ok=True)
        for command in commands:
            if self.stopped:
                return
            with log.open("ab", buffering=0) as file:
                child = self.start(row, command, file)
                self.children.add(child)
                code = child.wait()
                self.children.discard(child)
                file.write(b"" if code else f"finished: {shlex.join(command)}\n".encode())
            if code and not self.stopped:
                last = log.read_text(errors="replace").splitlines()[-1:]
                self.stopped, self.code = f"{log.stem} failed with {code}: {''.join(last)} ({log})", 1
        if not self.stopped:
            print(f"{log.stem}: finished\n", end="", flush=True)  # one write: others print at the same time

    def hours(self) -> dict[str, float]:
        """By row that trains, about how long a run takes, from its other runs or the cost of its method or of lora.

        Costs were measured in rounds of a calibration, which tells how fast this machine is. A row's cost differs from
        its method's as the FLOPs of their plans do; once rows have finished, their times scale all estimates.
        """
        rate, known = rounds_per_second(self.args.jobs), yaml.safe_load(COSTS.read_text(encoding="utf-8"))["cost"]
        guessed, took = {}, dict[str, float]()
        for row in (row for row in self.chosen if not row.of):
            method = row.method or row.label
            like = method if method in known else "lora"
            (flops, _), (usual, steps) = self._plan(method, tuple(self.settings(row))), self._plan(like, ())
            guessed[row.label] = (START + steps * known[like] * (flops / usual if usual else 1)) / rate / 3600
            ended = [
                self.out / f"{row.label}-seed{seed}" for seed in self.seeds[row.label] if not self.todo(row, seed)[0]
            ]
            if minutes := [
                read_json(run / "timing.json")["minutes"] for run in ended if (run / "timing.json").is_file()
            ]:
                took[row.label] = sum(minutes) / len(minutes) / 60
        scale = sum(took.values()) / sum(guessed[label] for label in took) if took else 1.0
        return {label: took.get(label, scale * guess) for label, guess in guessed.items()}

    @cache  # noqa: B019 (one grid a process)
    def _plan(self, method: str, settings: tuple[str, ...]) -> tuple[float, int]:
        """FLOPs of a run, and its training steps of all tasks."""
        from clmoe import sequence  # --list alone plans, and the quickstart starts with this file
        from clmoe.methods import method_class
        from clmoe.plan import make_plan

        args = self.args
        places = {"order": args.order, "base": args.base, "data": args.data and Path(args.data)}
        benchmark, config, order = sequence.chosen(method, args.benchmark, list(settings), **places)
        kind = method_class(config.method)
        blocks = config.budget.extended_blocks if kind(config).grows else None
        values = make_plan(kind(config), benchmark, order, extended_blocks=blocks)
        steps = (config.training.steps or 0) * len(order)
        return sum(values.get("flops", {}).get(name) or 0 for name in ("training", "answers")), steps

    def start(self, row: Row, command: list[str], log: BinaryIO) -> subprocess.Popen[bytes]:
        """Start a command of a row."""
        return subprocess.Popen(command, stdout=log, stderr=log, process_group=0)

    def run_all(self, jobs: Sequence[tuple[Row, int]], watch: Callable[[list[Future[None]]], object] = wait) -> None:
        """Run rows with their seeds side by side; ``watch`` gets all of them once and returns when they have ended."""
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        with ThreadPoolExecutor(self.args.jobs) as pool:
            started: dict[tuple[str, int], Future[None]] = {}
            for row, seed in jobs:
                started[row.label, seed] = pool.submit(self.run, row, seed, started.get((row.of, seed)))
            watch(list(started.values()))
        for run in started.values():
            run.result()

    def stop(self, *unused: object) -> None:
        """Pass SIGTERM on: every run saves its state and stops."""
        self.stopped, self.code = "interrupted; the same line continues from there", EXIT_CODE
        for child in list(self.children):
            os.killpg(child.pid, signal.SIGTERM)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid")
    parser.add_argument("--benchmark", default="playground-coin")
    parser.add_argument("--seeds", type=lambda text: list(map(int, text.split(","))), metavar="K,K")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=[], metavar="LABEL,LABEL", help="run only these rows"
    )
    parser.add_argument("--order", default="norm", help="order of the tasks, for rows that name none")
    parser.add_argument("--out", type=Path, help="default: runs/grid/BENCHMARK")
    for name in ("--base", "--data"):
        parser.add_argument(name, help="as for clmoe run")
    parser.add_argument("--file", type=Path, default=Path(__file__).resolve().parents[1] / "configs" / "grids.yaml")
    parser.add_argument("--tuned", type=Path, metavar="FOLDER", help="holds METHOD.json of clmoe tune")
    parser.add_argument("--list", action="store_true", help="print what would run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    grid = Grid(args := parser.parse_intermixed_args())
    if args.seeds:
        grid.seeds = dict.fromkeys(grid.seeds, args.seeds)
    # seed by seed; within a seed, cheapest first, and what waits for another row last
    jobs = [(row, seed) for seed in dict.fromkeys(seed for seeds in grid.seeds.values() for seed in seeds)
            for row in sorted(grid.chosen, key=lambda row: bool(row.of))
            if seed in grid.seeds[row.label][: 1 if row.once else None]]  # fmt: skip
    if args.list:
        hours, left = grid.hours(), 0.0
        for row, seed in jobs:
            lines = [shlex.join(command) for command in grid.todo(row, seed)[0]]
            state = "finished" if grid.commands(row, seed) else f"waits for the checkpoints of {row.of}"
            left += hours.get(row.label, 0) if lines else 0
            time_left = f" about {hours[row.label]:.2f} h" if lines and row.label in hours else ""
            print(f"{row.label}-seed{seed}:{time_left}", *(lines or [state]), sep="\n  ")
        print(f"about {left / args.jobs:.1f} h in all, {args.jobs} at a time")
        return 0
    grid.run_all(jobs)
    print(grid.stopped or f"all finished; clmoe report {grid.out}/*-seed*", file=sys.stderr)
    return grid.code


def exit_with(main: Callable[[], int]) -> NoReturn:
    """End the script with its code; an error that the user can fix is one line."""
    try:
        sys.exit(main())
    except ClmoeError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    exit_with(main)
