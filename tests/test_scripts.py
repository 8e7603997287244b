"""The real benchmarks' scripts, the same files that a node runs: to the final table on miniature trees.

With CLMOE_WHOLE_SEQUENCES=1 in the environment every sequence is run whole; else its first two tasks.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clmoe.benchmarks.base import load_benchmark
from clmoe.utils.logging import read_events
from clmoe.utils.paths import known_configs
from tests.launch import REPOSITORY, environment
from tests.trees import TREES

WHOLE = bool(os.environ.get("CLMOE_WHOLE_SEQUENCES"))
SETTINGS = (
    "training.steps=2", "training.batch_size=4", "training.micro_batch_size=2", "training.workers=0",
    "training.learning_rate=0.01", "adapter.rank=8", "adapter.experts=4",
    "evaluation.exact=false", "evaluation.limit=4",
)  # fmt: skip
RUNS = {
    "coin/llava_cmoe": ("options.probe_min_steps=2", "options.locator.hidden=8", "options.locator.draws=2"),
    "cl4vqa/clmoe": (),
    "ucit/clmoe": (),
    "mllm_dcl/lora": (),
}


def shell(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return command("bash", name, *arguments, **variables)


def script(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return command(sys.executable, name, *arguments, **variables)


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        arguments,
        cwd=REPOSITORY,
        env={**environment(), "PATH": path, "GPUS": "1", "LAUNCHER": "python", **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_script_runs_to_the_final_table(name: str, tmp_path: Path, tiny_folder: Path) -> None:
    benchmark = name.split("/")[0]
    tree, out = TREES[benchmark](tmp_path / benchmark), tmp_path / "run"
    names = [task.name for task in load_benchmark(benchmark, tree).tasks]
    order = names if WHOLE else names[:2]
    variables = {"MODEL": str(tiny_folder), "DATA": str(tree), "OUT": str(out), "ORDER": ",".join(order)}
    done = shell(f"scripts/{name}.sh", *SETTINGS, *RUNS[name], **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    matrix = [line.split(",") for line in (out / "matrix.csv").read_text().splitlines()]
    assert matrix[0] == ["after", *order]
    assert [row[0] for row in matrix[1:]] == order
    assert all(matrix[-1])
    assert re.search(rf"^Accuracy matrix: .*\nafter .*{re.escape(order[-1])}$", done.stdout, re.MULTILINE), done.stdout
    assert (out / "report" / "report.md").is_file()
    assert ("WARMUP is not set" in done.stderr) == ("llava_cmoe" in name)


GRIDS = """
rows:
  clmoe: {set: [options.samples=8]}
  clmoe_beta1: {of: clmoe, set: [options.beta=1]}
  broken: {method: clmoe, set: [options.gamma=7]}
grids:
  both: {title: Both, sections: {all: [clmoe, clmoe_beta1]}}
  one: {title: One, sections: {all: [broken]}}
"""


def test_a_grid_runs_to_its_table_and_a_second_time_does_nothing(tmp_path: Path, tiny_folder: Path) -> None:
    tree, out = TREES["mllm_dcl"](tmp_path / "tree"), tmp_path / "out"
    (tmp_path / "grids.yaml").write_text(GRIDS)
    variables = {"MODEL": str(tiny_folder), "DATA": str(tree), "ORDER": "RS"}

    def grid(name: str, *seeds: str) -> subprocess.CompletedProcess[str]:
        return script(
            "scripts/grid.py", name, "--benchmark", "mllm_dcl", "--file", str(tmp_path / "grids.yaml"),
            "--out", str(out), "--seeds", *seeds, "--", *SETTINGS, **variables,
        )  # fmt: skip

    done = grid("both", "3")
    assert done.returncode == 0, done.stderr + "".join(path.read_text() for path in (out / "logs").iterdir())
    assert "2 of 2 runs are complete" in done.stdout
    table = (out / "tables" / "both" / "report.csv").read_text().splitlines()
    assert [line.split(",")[:3] for line in table[1:]] == [["clmoe", "clmoe", "3"], ["clmoe_beta1", "clmoe", "3"]]
    started = [event for event in read_events(out / "clmoe-seed3" / "events.jsonl") if event["event"] == "started"]
    assert started[0]["command"].startswith("clmoe train --config clmoe ")
    assert {"seed=3", "label=clmoe", "options.samples=8"} <= set(started[0]["command"].split())
    again = grid("both", "3")
    assert again.returncode == 0, again.stderr
    assert [e for e in read_events(out / "clmoe-seed3" / "events.jsonl") if e["event"] == "started"] == started

    failed = grid("one", "0")
    assert failed.returncode == 1
    assert "broken-seed0: failed with 2: clmoe" in failed.stderr
    assert "gamma" in failed.stderr


def test_scripts_exist_for_every_benchmark_and_method() -> None:
    for benchmark in TREES:
        for method in ("lora", "moelora", "clmoe", "llava_cmoe", "multitask"):
            assert (REPOSITORY / f"scripts/{benchmark}/{method}.sh").is_file()


@pytest.fixture
def spoken(tmp_path: Path) -> Callable[..., list[str]]:
    """Run a script with a `clmoe` that prints what it was asked, so that nothing is trained: its lines."""
    fake = tmp_path / "bin" / "clmoe"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\ncase "$*" in *--steps*) echo "01 a -"; echo "02 b a" ;; *) echo "clmoe $*" ;; esac\n')
    fake.chmod(0o755)
    (tmp_path / "data").mkdir()
    # common.sh puts the checkout's own environment first where there is one
    scripts = tmp_path / "scripts"
    subprocess.run(["cp", "-r", str(REPOSITORY / "scripts"), str(scripts)], check=True)

    def run(name: str, *arguments: str, **variables: str) -> list[str]:
        always = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "DATA": str(tmp_path / "data")}
        done = shell(str(scripts / name), *arguments, **always, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_orders_are_planned_and_named_in_the_run_folder(spoken: Callable[..., list[str]]) -> None:
    own = subprocess.run(["cksum"], input=b"b,a\n", capture_output=True, check=True).stdout.decode().split()[0]
    for order, name in (("", ""), ("rev", "-rev"), ("rand", "-rand"), ("b,a", f"-own{own}")):
        first, second, report = spoken("coin/moelora.sh", "adapter.rank=8", SEED="3", ORDER=order)
        assert f"--order {order or 'norm'} " in first
        assert "--model llava-1.5-7b --benchmark coin" in first
        assert first.endswith("--then-eval seed=3 adapter.rank=8")
        assert f"--previous runs/coin/moelora{name}-seed3/01_a " in second
        assert report.startswith(f"clmoe report runs/coin/moelora{name}-seed3 ")


METHOD_SCRIPTS = [
    str(path.relative_to(REPOSITORY / "scripts"))
    for folder in ("playground", *TREES)
    for path in sorted((REPOSITORY / "scripts" / folder).glob("*.sh"))
    if path.stem in known_configs("methods")
]


@pytest.mark.parametrize("name", METHOD_SCRIPTS)
def test_a_methods_script_runs_its_own_or_the_named_configuration(name: str, spoken: Callable[..., list[str]]) -> None:
    """A grid's row hands its `config` over as METHOD; ignored, it would train another one under the row's label."""
    for variables, config in (({}, Path(name).stem), ({"METHOD": "other_config"}, "other_config")):
        trained = [line for line in spoken(name, **variables) if line.startswith("clmoe train ")]
        assert len(trained) == 2
        assert all(f" --config {config} " in line for line in trained)


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("coin/lora", {"DATA": "/nowhere"}, "no folder /nowhere: put the files of coin there, or set DATA"),
        ("ucit/llava_cmoe", {"WARMUP": "/nowhere"}, "WARMUP=/nowhere: no /nowhere/train.json"),
        ("cluster/slurm", {"SCRIPT": "x"}, "DATA is not set"),
        ("cluster/multinode", {"SCRIPT": "x", "DATA": "x", "OUT": "x"}, "HOSTS is not set"),
    ],
)
def test_what_is_not_set_is_said(script: str, variables: dict[str, str], message: str) -> None:
    done = shell(f"scripts/{script}.sh", **variables)
    assert done.returncode == 2
    assert message in done.stderr


def test_an_indivisible_number_of_gpus_is_an_error(tmp_path: Path, tiny_folder: Path) -> None:
    tree = TREES["mllm_dcl"](tmp_path / "tree")
    done = shell(
        "scripts/mllm_dcl/lora.sh",
        "training.batch_size=6",
        MODEL=str(tiny_folder),
        DATA=str(tree),
        OUT=str(tmp_path / "r"),
    )
    assert done.returncode == 2
    assert "training.batch_size 6 cannot be cut into 1 processes x micro-batches of 4" in done.stderr


def test_multinode_writes_the_hostfile(tmp_path: Path) -> None:
    probe = tmp_path / "probe.sh"
    probe.write_text('echo "$LAUNCHER $GPUS $DATA $*"; cat "$HOSTFILE"')
    done = shell(
        "scripts/cluster/multinode.sh", "a=b", SCRIPT=str(probe), DATA="/d", OUT=str(tmp_path / "o"), HOSTS="n1 n2"
    )
    assert done.stdout.splitlines() == ["deepspeed 1 /d a=b", "n1 slots=1", "n2 slots=1"]


def test_slurm_passes_the_signal_on_and_queues_again(tmp_path: Path) -> None:
    """A batch script is sent SIGTERM alone; what it started must see it, and its exit code be the job's."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/requeued\n')
    (tmp_path / "bin/scontrol").chmod(0o755)
    child = tmp_path / "child.py"
    child.write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*unused):\n"
        "    time.sleep(0.7)\n"
        f"    assert not pathlib.Path({str(tmp_path / 'requeued')!r}).exists()\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\ntime.sleep(60)\n"
    )
    (tmp_path / "script.sh").write_text(f"set -e\n{sys.executable} {child}\n")
    variables = {"SCRIPT": str(tmp_path / "script.sh"), "DATA": "/d", "OUT": "/o", "SLURM_JOB_ID": "7"}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    job = subprocess.Popen(
        ["bash", "scripts/cluster/slurm.sh"], cwd=REPOSITORY, env={**environment(), **variables, "PATH": path}
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) in (75, 128 + signal.SIGTERM)
    assert (tmp_path / "saved").exists(), "the job ended, and was queued again, when all was saved"
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({"GPUS": "2"}, "--num_gpus 2"),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6"}, "--include localhost:4,5,6"),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6", "GPUS": "2"}, "--include localhost:4,5"),
        ({"CUDA_VISIBLE_DEVICES": "4,5", "GPUS": "2", "HOSTFILE": "{hosts}"}, "--num_gpus 2 --hostfile {hosts}"),
    ],
)
def test_deepspeed_is_started_on_the_devices_that_may_be_used(
    variables: dict[str, str], devices: str, spoken: Callable[..., list[str]], tmp_path: Path
) -> None:
    """`deepspeed` is replaced by one that prints what it was asked."""
    hosts = tmp_path / "hosts"
    fake = tmp_path / "bin" / "deepspeed"
    fake.write_text('#!/bin/sh\necho "deepspeed $*"\n')
    fake.chmod(0o755)
    given = {"GPUS": "", "LAUNCHER": "deepspeed", **{k: v.format(hosts=hosts) for k, v in variables.items()}}
    trained = [line for line in spoken("coin/lora.sh", CLMOE_VISION="/cache", **given) if line.startswith("deepspeed ")]
    assert len(trained) == 2
    assert all(line.startswith(f"deepspeed {devices.format(hosts=hosts)} --master_port ") for line in trained)
    ports = [int(line.split("--master_port ")[1].split()[0]) for line in trained]
    assert all(1024 <= port < 65536 for port in ports)
    if "HOSTFILE" in variables:
        handed_over = Path(f"{hosts}.env").read_text().splitlines()
        assert {"CLMOE_VISION=/cache", "HF_HUB_OFFLINE=1", "OMP_NUM_THREADS=1"} <= set(handed_over)


def test_the_cores_are_the_machines_whatever_the_threads() -> None:
    told = command("bash", "-c", "source scripts/common.sh; export OMP_NUM_THREADS=1; cores")
    assert int(told.stdout) == len(os.sched_getaffinity(0))


def test_more_processes_than_visible_devices_are_refused() -> None:
    done = shell("scripts/coin/lora.sh", GPUS="4", CUDA_VISIBLE_DEVICES="0,1", DATA="/nowhere")
    assert (done.returncode, done.stderr) == (2, "GPUS=4, but CUDA_VISIBLE_DEVICES=0,1 names 2\n")
