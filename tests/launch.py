"""Run commands in one or more separate processes, as a launcher starts them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="needs DeepSpeed (pip install 'clmoe[train]') and g++, with which it builds its CPU operations",
)


def environment() -> dict[str, str]:
    """The environment of a child process: one thread, offline, and this checkout's package first."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    # the tests may run under a launcher or be measured; the child processes must not think they are part of that
    parts = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLIPCOVER_ENABLED")
    inherited = {k: v for k, v in os.environ.items() if k not in parts}
    return inherited | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(processes: int, *arguments: str) -> list[str]:
    """The command line ``python ARGUMENTS``, started by torchrun if there are several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), *arguments]


_PRELOADED = ["clmoe.commands", "clmoe.evaluate.run", "clmoe.train.task", "deepspeed"]


def launch(processes: int, *arguments: str) -> None:
    """Run ``python ARGUMENTS`` to the end in processes that find each other; if one fails, fail with its output.

    The processes are forked from a server that has imported the libraries once, because a launcher's processes take ten
    seconds of a core to start. test_machines.py and ``stop_when`` use the launchers themselves.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_PRELOADED)
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        shared = environment() | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        several = {"WORLD_SIZE": str(processes)} if processes > 1 else {}
        started = []
        for rank in range(processes):
            own = shared | several | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if several else {})
            log = Path(folder) / f"{rank}.log"
            started.append((server.Process(target=_run, args=(arguments, own, log)), log))
            started[-1][0].start()
        deadline = time.monotonic() + 600
        while any(process.is_alive() for process, _ in started) and time.monotonic() < deadline:
            wait([process.sentinel for process, _ in started if process.is_alive()], timeout=5)
            if any(process.exitcode for process, _ in started):
                break
        failed = [log.read_text()[-4000:] for process, log in started if process.exitcode != 0]
        for process, _ in started:
            process.kill()
            process.join()
    assert not failed, "\n".join(failed)


def _run(arguments: tuple[str, ...], variables: dict[str, str], log: Path) -> None:
    """Run one of the processes as ``python ARGUMENTS`` in this environment and write all its output to ``log``."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(REPOSITORY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def stop_when(condition: Callable[[], bool], processes: int, *arguments: str, group: bool = False) -> int:
    """Run a command until ``condition`` holds, then send SIGTERM to the launcher; return the exit code.

    With ``group``, send it to everything that the launcher has started, too.
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
