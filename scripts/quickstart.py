"""The quickstart's runs side by side, with a forecast, one line of progress for all, and the report.

    python scripts/quickstart.py [--full] [--seed K] [--jobs N] [--out FOLDER] [--steps N] [--limit N]

Four tasks of the embedded benchmark with a short schedule; with --full all eight, all methods, and the full schedule.
The runs are scripts/grid.py's: the same line again skips what is finished and continues what is not.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO

import grid
import pandas as pd
import yaml
from grid import START, rounds_per_second
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from clmoe.benchmarks.base import load_benchmark
from clmoe.report.page import write_report
from clmoe.report.runs import group_runs
from clmoe.report.tables import located_frame, metrics_frame
from clmoe.utils.logging import read_events

BENCHMARK = "playground-coin"
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class Forecast:
    """How long runs take: from a calibration, and once a run has finished a task, from that run itself.

    Attributes:
        rate: measures, once, the rounds per second of a core; not called if every run is finished.
        cost: by row, the rounds of a training step with its share of all that a task needs besides.
        tasks, steps: tasks of a run, training steps of a task.
        jobs, cores: runs side by side, and the cores that they share.
    """

    rate: Callable[[], float]
    cost: dict[str, float]
    tasks: int
    steps: int
    jobs: int
    cores: int

    def whole(self, label: str) -> float:
        """Seconds of a run that has a core to itself."""
        return (START + self.tasks * self.steps * self.cost[label]) / self.rate()

    def left(self, label: str, before: int, done: int, since: float, elapsed: float) -> float:
        """Seconds of a core that a run still takes after ``elapsed`` of them.

        It began with ``before`` finished tasks and had ``since`` seconds when it had finished ``done`` more.
        """
        per_task = since / done if done else self.whole(label) / self.tasks
        return max(0.0, per_task * (self.tasks - before) - elapsed)

    def together(self, running: list[float], waiting: list[str]) -> float:
        """Seconds until all runs are finished: some ``running`` with these left, others ``waiting`` for a place."""
        work = running + [self.whole(label) for label in waiting]
        return max(max(work, default=0.0), sum(work) / min(self.jobs, self.cores))


class Runs(grid.Grid):
    """A grid whose runs tell how far they are. The longest start first and have priority, so none ends last alone."""

    def __init__(self, args: argparse.Namespace, forecast: Forecast) -> None:
        super().__init__(args)
        self.forecast, self.seed = forecast, args.seeds[0]
        self.chosen.sort(key=lambda row: -forecast.cost[row.label])
        self.waiting = [row.label for row in self.chosen if self.todo(row, self.seed)[0]]
        self.processes: dict[str, tuple[int, float]] = {}  # by run: its number and when it began
        self.finished: dict[str, tuple[int, float]] = {}  # by run: tasks since its start, seconds of a core until then

    def start(self, row: grid.Row, command: list[str], log: BinaryIO) -> subprocess.Popen[bytes]:
        """As in a grid; shorter runs give way to longer ones."""
        child = super().start(row, command, log)
        os.setpriority(os.PRIO_PROCESS, child.pid, min(19, 5 * self.chosen.index(row)))
        if row.label in self.waiting:
            self.waiting.remove(row.label)
        self.processes[row.label] = child.pid, time.time()
        return child

    def state(self) -> tuple[float, str]:
        """Seconds left for all runs, and the tasks that those under way have reached."""
        left, at = [], []
        for label, (process, began) in dict(self.processes).items():
            if (used := core_seconds(process)) is None:
                del self.processes[label]
                continue
            rows: dict[str, float] = {}  # task: when its row of the matrix was last added to
            for event in read_events(self.out / f"{label}-seed{self.seed}" / "events.jsonl"):
                if event["event"] == "evaluated":
                    rows[event["after"]] = datetime.fromisoformat(event["time"]).timestamp()
            done = sum(moment > began for moment in rows.values())
            if done != self.finished.get(label, (0, 0.0))[0]:
                self.finished[label] = done, used
            before, since = len(rows) - done, self.finished.get(label, (0, 0.0))[1]
            left.append(self.forecast.left(label, before, done, since, used))
            at.append(f"{label} {min(len(rows) + 1, self.forecast.tasks)}/{self.forecast.tasks}")
        return self.forecast.together(left, self.waiting), ", ".join(at)


def core_seconds(process: int) -> float | None:
    """Seconds of a core that a process has had so far; None once it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def minutes(seconds: float) -> str:
    """``75 -> 1:15``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def follow(runs: Runs, finished: list[Future[None]]) -> None:
    """One line of progress until all are finished."""
    console, start = Console(stderr=True), time.monotonic()
    columns = (BarColumn(20), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, redirect_stdout=True) as progress:
        row = progress.add_task("", total=None)
        while wait(finished, timeout=1.0).not_done:
            left, at = runs.state()
            elapsed = time.monotonic() - start
            progress.update(row, completed=elapsed, total=elapsed + left, description=f"{minutes(left)} left: {at}")


def table(folders: list[Path]) -> str:
    """The methods' scores in percent, best first, and what the columns mean."""
    groups = group_runs(folders)
    frame = metrics_frame(groups).set_index("label").sort_values("last", ascending=False)
    located = located_frame(groups).query("task == 'overall'").groupby("label")["value"].mean()
    columns = {"last": frame["last"], "immediate": frame["immediate"], "backward transfer": frame["bwt_n_minus_1"]}
    shown = pd.DataFrame(columns | {"tasks found": located, "minutes": frame["minutes"]}).loc[frame.index]
    text = shown.rename_axis(None).to_string(float_format="{:.1f}".format, na_rep="-")
    return f"""
{text}

last                mean score over all tasks at the end
immediate           mean score of each task right after its own training
backward transfer   what the earlier tasks gained or lost from then to the end
tasks found         test questions whose task the locator names"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all methods, eight tasks, the full schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=3, help="methods side by side")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--steps", type=int, help="per task (default: configs/quickstart.yaml's; with --full the benchmark's)"
    )
    parser.add_argument("--limit", type=int, default=100, help="test questions in all rows of the matrix but the last")
    own = parser.parse_args()
    quick = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text(encoding="utf-8"))
    out = own.out or Path("runs/full" if own.full else "runs/quickstart")
    order = "norm" if own.full else quick["order"]
    benchmark = load_benchmark(BENCHMARK, check_files=False)
    steps = own.steps or (benchmark.recipe["training"]["steps"] if own.full else quick["steps"])
    overrides = [f"training.steps={steps}"] + ([] if own.full else [f"evaluation.limit={own.limit}"])
    args = argparse.Namespace(
        grid="published" if own.full else "quickstart", benchmark=BENCHMARK, seeds=[own.seed], jobs=own.jobs, only=[],
        order=order, out=out, base=None, data=None, tuned=None, overrides=overrides,
        file=CONFIGS / ("grids.yaml" if own.full else "quickstart.yaml"),
    )  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    rate, tasks = cache(partial(rounds_per_second, min(own.jobs, cores))), len(benchmark.order(order, own.seed))
    forecast = Forecast(rate, quick["cost"], tasks, steps, own.jobs, cores)
    runs = Runs(args, forecast)
    seconds = forecast.together([], runs.waiting)
    print(f"{', '.join(row.label for row in runs.chosen)} on {tasks} tasks of {BENCHMARK}: {order}")
    print(f"{steps} steps a task, {own.jobs} methods at a time.", end=" ")
    print(f"About {minutes(seconds)}, as measured on this machine." if runs.waiting else "All finished.", flush=True)
    # the frozen base's work on images and questions is done once for all methods
    shared = {"CLMOE_VISION": str(out / "vision"), "CLMOE_FEATURES": str(out / "features")}
    os.environ |= shared | {"CLMOE_PROGRESS": "0"}
    runs.run_all([(row, own.seed) for row in runs.chosen], partial(follow, runs))
    if runs.stopped:
        print(runs.stopped, file=sys.stderr)
        return runs.code
    folders, report = [out / f"{row.label}-seed{own.seed}" for row in runs.chosen], out / "report"
    write_report(folders, report, ("md", "csv", "html"))
    print(table(folders))
    print(f"\nOpen {report}/report.html: curves, matrices, answers then and now.")
    print(f"All tables: {report}/report.md")
    print("For clmoe in your own shell: source .venv/bin/activate")
    return 0


if __name__ == "__main__":
    grid.exit_with(main)
