"""The time left in a sequence, event logs that a crash cut off, the progress bar, and the commit behind a result."""

import io
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from clmoe.errors import Interrupted
from clmoe.utils import logging
from clmoe.utils.logging import EventLog, Progress, Stage, read_events, seconds_left, timed, write_timing

EVENTS = [
    {"event": "trained", "task": "a", "phase": "probe", "seconds": 3.0},
    {"event": "trained", "task": "a", "phase": "trained", "seconds": 7.0},
    {"event": "evaluated", "seconds": 2.0},
    {"event": "trained", "task": "b", "phase": "trained", "seconds": 20.0},
    {"event": "evaluated", "seconds": 4.0},
]


def test_time_left_counts_every_training_and_every_evaluation_to_come() -> None:
    # third of four tasks, 5 s of training left: one more training of 15 s, 3 + 4 evaluations of 3 s
    assert seconds_left(EVENTS, Stage(2, 4), 5.0) == 5 + 15 + 7 * 3
    assert seconds_left([], Stage(2, 4), 5.0) == 10, "the first is all it knows"
    fits = [{"event": "located", "seconds": seconds} for seconds in (2.0, 4.0)]
    assert seconds_left([*EVENTS, *fits], Stage(2, 4), 5.0) == 5 + 15 + 7 * 3 + 2 * 3, "this task's fit and the last's"


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    with timed(log, "trained", task="a") as extra:
        extra["note"] = "x"
    for cut in (b'{"event": "trai', b'{"event": {}', b'{"event": "\xc3'):
        with log.path.open("ab") as file:
            file.write(cut)
        (event,) = read_events(log.path)
        assert (event["event"], event["task"], event["note"]) == ("trained", "a", "x")
    log.write("next")
    assert [event["event"] for event in read_events(log.path)] == ["trained", "next"]
    # the interpreter alone takes some MiB, and no test machine has a TiB to spare
    assert 5 < event["peak_rss_mib"] < 2**20
    with pytest.raises(RuntimeError), timed(log, "failed"):
        raise RuntimeError
    assert len(read_events(log.path)) == 2


def test_minutes_include_what_sigterm_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A phase of 90 s, stopped after 60 of them, goes on for 30 in the next command."""
    log, clock = EventLog(tmp_path / "events.jsonl"), iter((0.0, 60.0, 1000.0, 1030.0))
    monkeypatch.setattr(logging, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(Interrupted), timed(log, "trained", task="a"):
        raise Interrupted("stopped")
    with timed(log, "trained", task="a"):
        pass
    assert [event["event"] for event in read_events(log.path)] == ["interrupted", "trained"]
    write_timing(tmp_path)
    assert json.loads((tmp_path / "timing.json").read_text()) == {"minutes": 1.5}


def test_the_bar_is_silent_when_runs_share_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("CLMOE_PROGRESS", "0")
    with Progress("x", 2, [], Stage(0, 1)) as progress:
        progress.advance(4)
    assert capsys.readouterr().err == ""


def test_steps_of_an_interrupted_command_cost_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier command made 90 of 100 steps and one more took 2 s, so nine steps of 2 s are left."""
    now = iter([100.0, 102.0])
    monkeypatch.setattr(logging.time, "monotonic", lambda: next(now))
    progress = Progress("x", 100, [], Stage(0, 1))
    progress.skip(90)
    progress.advance(4)
    (row,) = progress.bars.tasks
    assert row.completed == 91 and row.fields["state"].endswith("all done in 0:00:18")


def test_the_bar_says_everything_in_a_hundred_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar shows task, phase, steps, loss, speed, peak memory and the sequence's time left, and cuts nothing off."""
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(
        logging, "Console", lambda stderr: Console(file=written, width=100, force_terminal=True, color_system=None)
    )
    monkeypatch.setattr(logging, "peak_memory", lambda: {"peak_rss_mib": 99_000, "peak_cuda_mib": 40_550})
    with Progress(
        "llava_cmoe 2/8 digits (probes)", 120, [{**e, "seconds": 600.0} for e in EVENTS], Stage(1, 8)
    ) as progress:
        progress.show(0.1234)
        progress.advance(16)
    last = [line for line in re.split(r"[\r\n]", written.getvalue()) if "loss" in line][-1]
    title, numbers = last.split("(probes)")
    assert title.endswith("llava_cmoe 2/8 digits ")
    assert re.fullmatch(r"[ ━╸╺]+1/120 loss 0\.123, \d+/s, 39\.6 GiB, all done in [0-9:]+ *", numbers)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert logging._commit(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    assert logging._commit(tmp_path) is None, "no commit yet"
    (tmp_path / "docs").mkdir()
    for name in ("a", "docs/results.md"):
        (tmp_path / name).write_text("1")
        git(tmp_path, "add", name)
    git(tmp_path, "commit", "--quiet", "--message", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")[:12]
    (tmp_path / "run.log").write_text("not the checkout's")
    (tmp_path / "docs" / "results.md").write_text("the results of these runs")
    assert logging._commit(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert logging._commit(tmp_path) == commit + "+"
    monkeypatch.setenv("PATH", "")
    assert logging._commit(tmp_path) is None, "no git"


def test_the_command_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/x/bin/clmoe", "train", "--data", "my data"])
    assert logging.provenance()["command"] == "clmoe train --data 'my data'"
