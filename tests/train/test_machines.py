"""The scripts for SLURM and for a list of machines start two machines of two processes each, simulated on this one.

Stand-ins for srun, scontrol and scancel start and signal what SLURM would; nothing here needs ssh.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from tests.launch import REPOSITORY, environment, launch, needs_deepspeed
from tests.runs import Runs, contents, events
from tests.support import TASKS

FIRST = TASKS[0]
SETTINGS = ("training.steps=12", "training.batch_size=8", "training.micro_batch_size=2", "training.save_steps=4")
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
  SLURM_NODEID=$node setsid "$@" 2>"$LOGS/node$node" &
  echo $! >>"$LOGS/groups"
done
code=0
for task in $(jobs -p); do wait "$task" || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
case $1 in show) echo 127.0.0.1 ;; *) echo "$*" >>"$LOGS/requeued" ;; esac
"""
SCANCEL = """#!/bin/bash
[ "$*" = "--signal=TERM 7" ] && while read -r group; do kill -TERM -- "-$group"; done <"$LOGS/groups"
"""


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """An environment with the stand-ins in its PATH; they write to ``LOGS``."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PATH": path, "LOGS": str(tmp_path), "GPUS": "2", "NODES": "2", "MASTER_PORT": str(port), "DATA": "/d"}
    return environment() | own | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}


def start(lines: list[list[str]], variables: dict[str, str], logs: Path) -> list[subprocess.Popen[bytes]]:
    """Start each command line with its number as ``NODE_RANK``, unless srun sets it."""
    nodes = []
    for rank, line in enumerate(lines):
        own = variables | ({"NODE_RANK": str(rank)} if len(lines) > 1 else {})
        log = (logs / f"node{rank}").open("wb") if len(lines) > 1 else None
        nodes.append(subprocess.Popen(line, env=own, cwd=REPOSITORY, stderr=log, stdout=subprocess.DEVNULL))
    return nodes


def workers(nodes: list[subprocess.Popen[bytes]]) -> list[psutil.Process]:
    """The processes that train, sorted by rank."""
    below = [child for node in nodes for child in psutil.Process(node.pid).children(recursive=True)]
    found = [child for child in below if child.cmdline()[1:4] == ["-u", "-m", "clmoe.cli"]]
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


def wait_until(condition: Callable[[], bool], nodes: list[subprocess.Popen[bytes]], logs: Path) -> None:
    deadline = time.monotonic() + 500
    while not condition():
        ended = [node.poll() for node in nodes if node.poll() is not None]
        assert not ended, "".join(path.read_text()[-3000:] for path in sorted(logs.glob("node*")))
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    """An uninterrupted run of four processes on one machine."""
    out = runs.root / "four"
    fixed = ["--seed", "0", "--order", FIRST, "--output", str(out), "--base", str(runs.model)]
    launch(4, "-m", "clmoe.cli", "run", "lora", str(runs.benchmark), *fixed, *SETTINGS)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slurm", pytest.param("hostfile", marks=needs_deepspeed)])
def test_a_killed_process_ends_all_and_the_same_command_goes_on(
    kind: str, whole: Path, runs: Runs, variables: dict[str, str], tmp_path: Path
) -> None:
    out, lines = tmp_path / "run", [["bash", "scripts/cluster/slurm.sh", *SETTINGS]]
    variables |= {"OUT": str(out), "MODEL": str(runs.model), "ORDER": FIRST, "DATA": str(runs.benchmark.parent)}
    if kind == "slurm":
        script = tmp_path / "lora.sh"
        script.write_text(f'exec bash {REPOSITORY}/scripts/sequence.sh {runs.benchmark} lora "$@"\n')
        variables["SCRIPT"] = str(script)
    else:
        lines = [["bash", "scripts/sequence.sh", str(runs.benchmark), "lora", *SETTINGS]] * 2
        (tmp_path / "hosts").write_text("127.0.0.1 slots=2\nlocalhost slots=2\n")
        variables |= {"HOSTFILE": str(tmp_path / "hosts"), "LAUNCHER": "deepspeed", "MASTER_ADDR": "127.0.0.1"}

    nodes = start(lines, variables, tmp_path)
    wait_until(lambda: (out / "events.jsonl").is_file() and len(events(out, "step")) >= 6, nodes, tmp_path)
    workers(nodes)[3].kill()
    before = time.monotonic()
    assert all(node.wait(timeout=60) for node in nodes), "the command fails"
    assert time.monotonic() - before < 60
    told = (tmp_path / "node0").read_text()
    assert told.count("process 0 on ") == told.count("the same command continues") == 1
    assert "[rank" not in told, "no traceback of a process that was only waiting"

    assert [node.wait() for node in start(lines, variables, tmp_path)] == [0] * len(lines)
    expected, found = (torch.tensor([event["loss"] for event in events(run, "step")][-4:]) for run in (whole, out))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert events(out, "trained")[-1]["processes"] == 4
    if kind == "slurm":
        files, wanted = contents(out), contents(whole)
        assert files.keys() == wanted.keys()
        assert {name for name in wanted if files[name] != wanted[name]} <= {"events.jsonl", "timing.json"}


def test_slurms_signal_reaches_the_processes_of_all_nodes(variables: dict[str, str], tmp_path: Path) -> None:
    """Both nodes must save: srun would answer SIGTERM with kill -9, and a shell that ends early would end its node."""
    (tmp_path / "child.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        f"own = pathlib.Path({str(tmp_path)!r})\n"
        "def save(*unused):\n"
        "    time.sleep(0.7)\n"
        "    assert not (own / 'requeued').exists()\n"
        "    (own / ('saved' + os.environ['NODE_RANK'])).touch()\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(own / ('ready' + os.environ['NODE_RANK'])).touch()\ntime.sleep(60)\n"
    )
    (tmp_path / "script.sh").write_text(f"set -e\n{sys.executable} {tmp_path / 'child.py'}\n")
    variables |= {"SCRIPT": str(tmp_path / "script.sh"), "OUT": "/o"}
    jobs = start([["bash", "scripts/cluster/slurm.sh"]], variables, tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("ready*"))) == 2, jobs, tmp_path)
    jobs[0].send_signal(signal.SIGTERM)
    assert jobs[0].wait(timeout=30) in (75, 128 + signal.SIGTERM)
    assert {path.name for path in tmp_path.glob("saved*")} == {"saved0", "saved1"}
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
