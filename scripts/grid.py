"""Run a grid of configs/grids.yaml on a benchmark: every row with every seed, several side by side.

    python scripts/grid.py GRID [--benchmark playground-coin] [--seeds 0 1 2] [--jobs N] [--only LABEL ...]
        [key=value ...]

What is finished is skipped, and what was interrupted goes on: give the same line again, in pieces as you like. A row
that would be the same run as an earlier one on this benchmark is left out. A run is a folder OUT/LABEL-seedK, shared by
all grids that have the row. The methods' scripts do the work, so their environment counts (MODEL, DATA, GPUS, ...; with
several --jobs set GPUS=1 and OMP_NUM_THREADS). At the end the rows that are complete go into the table OUT/tables/GRID.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from clmoe.errors import ClmoeError
from clmoe.methods import method_class
from clmoe.report.grid import Grid, Row, Start, default_file, read_grids, repeats, start
from clmoe.report.run import group_runs, read_run
from clmoe.report.tables import comparison_table, to_text
from clmoe.report.write import write_report
from clmoe.utils.names import unknown
from clmoe.utils.paths import repository_root
from clmoe.utils.processes import EXIT_CODE


@dataclass
class Runner:
    """Starts runs, keeps their output in OUT/logs, and remembers which failed."""

    out: Path
    failed: list[str] = field(default_factory=list)
    children: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(self, name: str, started: Start) -> None:
        if self.stopping.is_set():
            return
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        began = monotonic()
        with log.open("ab") as file:
            environment = {**os.environ, "CLMOE_PROGRESS": "0", **started.environment}
            child = subprocess.Popen(
                started.command, cwd=repository_root(), env=environment, stdout=file, stderr=file, process_group=0
            )
            self.children.add(child)
            code = child.wait()
            self.children.discard(child)
        if self.stopping.is_set():
            return
        if code:
            self.failed.append(name)
            last = log.read_text(errors="replace").splitlines()[-1:]
            print(f"{name}: failed with {code}: {''.join(last)} ({log})", file=sys.stderr, flush=True)
        else:
            print(f"{name}: done, {(monotonic() - began) / 60:.1f} min", flush=True)

    def stop(self, *unused: object) -> None:
        """Pass SIGTERM on: every task saves its state and stops."""
        self.stopping.set()
        for child in list(self.children):
            os.killpg(child.pid, signal.SIGTERM)


def seeds_of(row: Row, seeds: list[int]) -> list[int]:
    """A method that trains nothing gives the same figures with every seed."""
    trains = row.of or method_class(row.script).chain != "none"
    return seeds if trains else seeds[:1]


def choose(grid: Grid, only: list[str]) -> list[Row]:
    """The rows asked for, and those whose checkpoints they evaluate."""
    rows = {row.label: row for row in grid.rows}
    for label in only:
        if label not in rows:
            raise ClmoeError(f"--only: {unknown('row', label, rows)}")
    wanted = set(only or rows)
    wanted |= {rows[label].of for label in wanted if rows[label].of}
    return [row for row in grid.rows if row.label in wanted]


def complete(folder: Path) -> bool:
    """The run is there and at its end."""
    return (folder / "run.json").is_file() and read_run(folder).complete


def table(grid: Grid, rows: list[Row], seeds: list[int], out: Path) -> str:
    """Write the report of all complete runs; returns its first table."""
    folders = [row.folder(out, seed) for row in rows for seed in seeds_of(row, seeds)]
    done = [folder for folder in folders if complete(folder)]
    if not done:
        return "no run is complete"
    target = out / "tables" / grid.name
    write_report(done, target, ("md", "csv", "tex"))
    text = to_text(comparison_table(group_runs(done)))
    return f"{text}\n{len(done)} of {len(folders)} runs are complete; all tables and pictures: {target}/report.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid")
    parser.add_argument("--benchmark", default="playground-coin")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--only", nargs="+", default=[], metavar="LABEL", help="these rows of the grid")
    parser.add_argument("--out", type=Path, help="default: runs/grid/BENCHMARK")
    parser.add_argument("--file", type=Path, help="default: configs/grids.yaml")
    parser.add_argument("--list", action="store_true", help="print what would be started, and which of it is complete")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()

    grids = read_grids(args.file or default_file())
    if args.grid not in grids:
        raise ClmoeError(unknown("grid", args.grid, grids))
    grid = grids[args.grid]
    rows, by_label = choose(grid, args.only), {row.label: row for row in grid.rows}
    again = repeats(rows, args.benchmark, args.overrides, os.environ)
    for label, first in again.items():
        print(f"{label}: would be the same run as {first} here, and is left out", file=sys.stderr)
    rows = [row for row in rows if row.label not in again]
    out = (args.out or Path("runs/grid") / Path(args.benchmark).stem).resolve()
    os.environ.setdefault("CLMOE_FEATURES", str(out / "features"))  # one base: its features are computed once

    waves: list[list[tuple[str, Start]]] = [[], []]
    for seed in args.seeds:
        for row in rows:
            if seed in seeds_of(row, args.seeds):
                started = start(row, by_label, args.benchmark, seed, out, args.overrides)
                waves[bool(row.of)].append((row.folder(out, seed).name, started))
    if args.list:
        for name, started in [*waves[0], *waves[1]]:
            state = "complete" if complete(out / name) else "to do"
            print(f"{name:32s} {state:9s} {' '.join(started.command[1:])}")
        return 0

    runner = Runner(out)
    signal.signal(signal.SIGTERM, runner.stop)
    signal.signal(signal.SIGINT, runner.stop)
    for wave in waves:  # the second one evaluates checkpoints of the first
        with ThreadPoolExecutor(args.jobs) as pool:
            for name, started in wave:
                pool.submit(runner.run, name, started)
    if runner.stopping.is_set():
        print("stopped; the same line goes on from there", file=sys.stderr)
        return EXIT_CODE
    print(table(grid, rows, args.seeds, out))
    if runner.failed:
        print(f"failed: {', '.join(runner.failed)}", file=sys.stderr)
    return 1 if runner.failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ClmoeError as error:
        print(f"grid: {error}", file=sys.stderr)
        sys.exit(2)
