"""Commands in processes of their own, one or several, as a launcher starts them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="needs DeepSpeed (pip install 'clmoe[train]') and g++, with which it builds its CPU operations",
)


def environment() -> dict[str, str]:
    """One thread per process, offline, this checkout's package first."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    # where this test runs under a launcher's variables, the processes below must not think they are part of it
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return inherited | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(processes: int, *arguments: str) -> list[str]:
    """``python ARGUMENTS``, by torchrun when there are several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), *arguments]


def launch(processes: int, *arguments: str) -> str:
    """Run to the end; returns what was printed. Fails with the processes' stderr."""
    done = subprocess.run(
        command(processes, *arguments), env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def stop_when(condition: Callable[[], bool], processes: int, *arguments: str, group: bool = False) -> int:
    """Run until ``condition`` holds, then send SIGTERM to the launcher; returns the exit code.

    ``group``: send it to everything that the launcher has started, too.
    """
    process = subprocess.Popen(
        command(processes, *arguments), env=environment(), cwd=REPOSITORY, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 500
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()[-4000:]  # type: ignore[union-attr]
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)
    if group:
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    return process.returncode
