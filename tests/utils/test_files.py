"""One command per run folder, and no lock that outlives its holder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from clmoe.errors import ClmoeError
from clmoe.utils.files import LOCK, locked
from tests.launch import environment
from tests.runs import Runs
from tests.support import TASKS

HOLD = """
import sys, time
from pathlib import Path
from clmoe.utils.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of ``tmp_path/run``."""
    line = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process  # type: ignore[misc]
    process.kill()
    process.wait()


def test_a_second_command_is_refused_until_the_first_is_dead(
    holder: subprocess.Popen[str], runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        runs.train(run / TASKS[0], "lora", TASKS[0])
    assert stop.value.code == 2
    assert f"{run} is in use by process {holder.pid} on " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        runs.evaluate("base", run, model=str(runs.model))
    assert "in use by" in capsys.readouterr().err
    assert [path.name for path in sorted(run.iterdir())] == [LOCK, f"{LOCK}.holder"]
    holder.kill()
    holder.wait()
    with locked(run):
        assert (run / LOCK).is_file()
    assert not (run / LOCK).exists()


def test_it_is_released_after_an_error_and_a_new_empty_folder_goes(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ClmoeError, match="broken"), locked(tmp_path / "run"):
            raise ClmoeError("broken")
    assert not (tmp_path / "run").exists()
