"""What happened (``events.jsonl``), how long it took (``timing.json``), and how far along the sequence is."""

import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from clmoe.errors import Interrupted
from clmoe.utils.files import append_json_lines, read_json_lines, write_text
from clmoe.utils.processes import is_main


class EventLog:
    """Appends one JSON object per event. Only this file and ``timing.json`` hold times."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **fields: Any) -> None:
        """Append ``{"time", "event", ...fields}``; with several processes, only the main one does."""
        if is_main():
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            append_json_lines(self.path, [{"time": time, "event": event, **fields}])


def read_events(path: Path) -> list[dict[str, Any]]:
    """All complete lines of an event log; a line cut off by a crash is left out."""
    return read_json_lines(path) if path.is_file() else []


@dataclass(frozen=True)
class Stage:
    """Position in a sequence: task ``index`` (from 0) of ``total``."""

    index: int
    total: int


def seconds_left(events: list[dict[str, Any]], stage: Stage, here: float) -> float:
    """Seconds until the whole sequence ends, ``here`` of them for what is under way.

    A later task is expected to train as long as the finished ones did on average, and likewise for each evaluated cell
    and each fit of a locator.
    """
    trained = [e["seconds"] for e in events if e["event"] == "trained"]
    evaluated = [e["seconds"] for e in events if e["event"] == "evaluated"]
    tasks = {e["task"] for e in events if e["event"] == "trained"}  # one may have several phases
    per_training = sum(trained) / len(tasks) if trained else here
    per_evaluation = sum(evaluated) / len(evaluated) if evaluated else 0.0
    located = [e["seconds"] for e in events if e["event"] == "located"]
    fits = (stage.total - len(located)) * sum(located) / len(located) if located else 0.0
    evaluations = sum(range(stage.index + 1, stage.total + 1))
    return here + per_training * (stage.total - stage.index - 1) + per_evaluation * evaluations + max(fits, 0.0)


def _live() -> RichProgress:
    return RichProgress(
        TextColumn("[bold]{task.description}"),
        BarColumn(10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        console=Console(stderr=True),
        disable=not is_main() or not sys.stderr.isatty() or os.environ.get("CLMOE_PROGRESS") == "0",
    )


_shown: list[tuple[RichProgress, TaskID]] = []  # the one live display of this process, and its row for the sequence


@contextmanager
def display(title: str, tasks: int) -> Iterator[None]:
    """Show a row for a whole sequence, and every ``Progress`` in the block below it; ``CLMOE_PROGRESS=0`` hides all."""
    bars = _live()
    _shown.append((bars, bars.add_task(title, total=tasks, state="")))
    try:
        with bars:
            yield
    finally:
        _shown.pop()


def say(line: str) -> None:
    """Print a line for people, above the display where there is one; a sequence's row counts it as a finished task."""
    if is_main():
        print(line, flush=True)
        for bars, sequence in _shown:
            bars.advance(sequence)


class Progress:
    """A row with loss, samples per second (``/s``), peak memory and the whole sequence's time left, in 100 columns."""

    def __init__(self, title: str, total: int, events: list[dict[str, Any]], stage: Stage | None = None) -> None:
        self.total, self.events, self.stage = total, events, stage
        self.start, self.skipped, self.done, self.samples, self.loss = time.monotonic(), 0, 0, 0, ""
        self.own = not _shown
        self.bars = _live() if self.own else _shown[-1][0]
        self.row = self.bars.add_task(title, total=total, state="")

    def __enter__(self) -> "Progress":
        if self.own:
            self.bars.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self.own:
            self.bars.stop()
        else:
            self.bars.remove_task(self.row)

    def show(self, loss: float) -> None:
        self.loss = f"loss {loss:.3f}, "

    def skip(self, steps: int) -> None:
        """``steps`` units of the row were done earlier, by an interrupted command."""
        self.skipped = steps
        self.bars.update(self.row, advance=steps)

    def advance(self, samples: int, steps: int = 1) -> None:
        """``steps`` units of the row are done, over ``samples`` samples."""
        self.done, self.samples = self.done + steps, self.samples + samples
        elapsed = time.monotonic() - self.start
        memory = peak_memory()
        peak = memory.get("peak_cuda_mib", memory["peak_rss_mib"]) / 1024
        state = f"{self.loss}{self.samples / elapsed:.0f}/s, {peak:.1f} GiB"
        if self.stage is not None:
            here = elapsed / self.done * (self.total - self.skipped - self.done)
            left = seconds_left(self.events, self.stage, here)
            state += f", all done in {timedelta(seconds=int(left))}"
        self.bars.update(self.row, advance=steps, state=state)

    def advance_rows(self, rows: int) -> None:
        """``rows`` questions are answered; the row counts questions."""
        self.advance(rows, steps=rows)


@contextmanager
def timed(log: EventLog, event: str, **fields: Any) -> Iterator[dict[str, Any]]:
    """Log ``event`` with duration and memory when the block ends without an error; the block may add fields.

    If SIGTERM ends the block, the event is ``interrupted`` instead, so that this time counts, too.
    """
    start = time.monotonic()
    extra: dict[str, Any] = {}

    def write(event: str) -> None:
        log.write(event, seconds=round(time.monotonic() - start, 3), **peak_memory(), **fields, **extra)

    try:
        yield extra
    except Interrupted:
        write("interrupted")
        raise
    write(event)


def peak_memory() -> dict[str, int]:
    """``peak_rss_mib`` of this process so far; if torch uses a GPU, also ``peak_cuda_mib``, its tensors there."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    peaks = {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit}
    if torch.cuda.is_available():
        peaks["peak_cuda_mib"] = torch.cuda.max_memory_allocated() // 2**20
    return peaks


def write_timing(run: Path) -> None:
    """``timing.json``: minutes of training and evaluation so far, from the event log."""
    spent = sum(event.get("seconds", 0.0) for event in read_events(run / "events.jsonl"))
    text = json.dumps({"minutes": round(spent / 60, 2)}) + "\n"
    write_text(run / "timing.json", text)


def provenance() -> dict[str, str | None]:
    """The checkout's commit and this process's command line.

    ``commit`` ends in ``+`` if files outside docs/ differ from it; it is None without a checkout or git.
    """
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"commit": _commit(Path(__file__).resolve().parents[2]), "command": command}


def _commit(checkout: Path) -> str | None:
    def git(*arguments: str) -> str:
        line = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()

    if not (checkout / ".git").exists():
        return None
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
