"""What several processes agree on, tested in two real ones, and the lock that allows one command per run folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clmoe.errors import ClmoeError
from clmoe.utils import processes
from clmoe.utils.files import LOCK, locked
from tests.launch import command, environment, launch
from tests.runs import Runs
from tests.support import TASKS

SCRIPT = """
import sys, json, time
from pathlib import Path
from clmoe.errors import ClmoeError
from clmoe.utils import processes

folder = Path(sys.argv[1])
calls = []
def square(x):
    calls.append(x)
    return x * x

found = {str(n): processes.in_order(list(range(n)), square) for n in (0, 1, 2, 5)}
main = processes.from_main(lambda: processes.rank() + 10)
try:
    processes.from_main(lambda: (_ for _ in ()).throw(ClmoeError("broken")))
    error = None
except ClmoeError as e:
    error = str(e)
if processes.rank() == 1:
    time.sleep(1)
    (folder / "late").touch()
processes.wait_for_all()
assert (folder / "late").exists()
some = [processes.any_of_them(processes.rank() == 1), processes.any_of_them(False)]
told = {"found": found, "calls": calls, "main": main, "error": error, "some": some, "is_main": processes.is_main()}
(folder / f"{processes.rank()}.json").write_text(json.dumps(told))
processes.stop()
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch(2, str(script), str(tmp_path))
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for one in told:
        assert one["found"] == {"0": [], "1": [0], "2": [0, 1], "5": [0, 1, 4, 9, 16]}
        assert one["main"] == 10 and one["error"] == "broken" and one["some"] == [True, False]
    assert [one["is_main"] for one in told] == [True, False]
    assert told[0]["calls"] == [0, 0, 0, 2, 4] and told[1]["calls"] == [1, 1, 3], "each computed its share only"


def test_one_process_needs_no_group() -> None:
    assert processes.count() == 1 and processes.is_main()
    assert processes.in_order([3, 4], lambda x: x + 1) == [4, 5]
    assert processes.from_main(lambda: 7) == 7 and processes.any_of_them(True)
    processes.start()
    processes.stop()


# Like the command line, these scripts do not load the adapter, which takes ten seconds.
LEAVING = """
import atexit, sys
sys.argv[0] = "clmoe"
from clmoe.utils import processes
atexit.register(print, "teardown")
print("work")
processes.leave(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "printed"), [("1", "work\nteardown\n"), ("2", "work\n")])
def test_one_of_several_processes_leaves_without_teardown(number: str, printed: str) -> None:
    variables = environment() | {"WORLD_SIZE": number}
    done = subprocess.run(command(1, "-c", LEAVING), env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, printed), "output is flushed, the code is kept"


HOLD = """
import sys, time
from pathlib import Path
sys.argv[0] = "clmoe"
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
