"""The real benchmarks' scripts, the same files that a node runs, reach the final table on miniature trees.

With CLMOE_WHOLE_SEQUENCES=1 in the environment every sequence runs in full, otherwise only its first two tasks.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clmoe.benchmarks.base import load_benchmark
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
    "coin/llava_cmoe": ("options.probe_min_steps=2", "locator.options.hidden=8", "locator.options.draws=2"),
    "cl4vqa/clmoe": (),
    "ucit/clmoe": (),
    "mllm_dcl/lora": (),
}


def shell(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return command("bash", name, *arguments, **variables)


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        arguments,
        cwd=REPOSITORY,
        env={**environment(), "PATH": path, "GPUS": "1", "LAUNCHER": "python", **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
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
    assert re.search(rf"after {re.escape(order[-1])}: ", done.stdout), done.stdout
    assert (out / "report" / "report.md").is_file()
    assert ("WARMUP is not set" in done.stderr) == ("llava_cmoe" in name)


@pytest.fixture
def spoken(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs a script with a `clmoe` that only prints its arguments, so that nothing is trained; returns the lines."""
    fake = tmp_path / "bin" / "clmoe"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "clmoe $*"\n')
    fake.chmod(0o755)
    (tmp_path / "data").mkdir()
    # a copy, because common.sh puts the checkout's own environment first if there is one
    scripts = tmp_path / "scripts"
    subprocess.run(["cp", "-r", str(REPOSITORY / "scripts"), str(scripts)], check=True)

    def run(name: str, *arguments: str, **variables: str) -> list[str]:
        always = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "DATA": str(tmp_path / "data")}
        done = shell(str(scripts / name), *arguments, **always, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_the_variables_become_options_of_clmoe_run(spoken: Callable[..., list[str]]) -> None:
    run, report = spoken("coin/moelora.sh", "adapter.rank=8", SEED="3", ORDER="rev", DEEPSPEED="zero2")
    assert run.startswith("clmoe run moelora coin --seed 3 --order rev --output runs/coin/moelora-rev-seed3 ")
    assert "--base llava-1.5-7b --data " in run
    assert run.endswith(" --deepspeed zero2 adapter.rank=8")
    assert report == "clmoe report runs/coin/moelora-rev-seed3 --format md,csv,tex"


def test_a_script_runs_from_any_folder(spoken: Callable[..., list[str]], tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(tmp_path / "scripts" / "playground" / "lora.sh")],
        cwd=tmp_path, env={**environment(), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OUT": "mine"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "clmoe run lora playground-coin --seed 0 --order norm --output mine\n"


METHODS = ("lora", "moelora", "clmoe", "llava_cmoe", "multitask")
METHOD_SCRIPTS = {
    *(f"{benchmark}/{method}" for benchmark in TREES for method in METHODS),
    *(f"{folder}/{name}" for folder in ("playground", *TREES) for name in known_configs("methods")
      if (REPOSITORY / f"scripts/{folder}/{name}.sh").is_file()),
}  # fmt: skip


def test_every_script_of_a_method_ends_in_its_own_or_the_named_configuration() -> None:
    end = r'exec bash "\$\(dirname "\$0"\)/\.\./%s "\$\{METHOD:-%s\}"( "\$\{warmup\[@\]\}")? "\$@"'
    for folder, name in (script.split("/") for script in sorted(METHOD_SCRIPTS)):
        own = rf'benchmark\.sh" {folder}'
        if folder == "playground":
            own = r'sequence\.sh" "\$\{BENCHMARK:-playground-coin\}"'
        *_, last = (REPOSITORY / f"scripts/{folder}/{name}.sh").read_text().splitlines()
        assert re.fullmatch(end % (own, name), last), f"{folder}/{name}.sh"


@pytest.mark.parametrize("name", ["playground/clmoe", "coin/clmoe", "coin/llava_cmoe"])
def test_a_methods_script_runs_its_own_or_the_named_configuration(name: str, spoken: Callable[..., list[str]]) -> None:
    """A script that ignored METHOD would train another configuration under its label."""
    for variables, config in (({}, Path(name).name), ({"METHOD": "other_config"}, "other_config")):
        trained = [line for line in spoken(f"{name}.sh", **variables) if line.startswith("clmoe run ")]
        assert len(trained) == 1
        assert trained[0].startswith(f"clmoe run {config} ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("coin/lora", {"DATA": "/nowhere"}, "no file /nowhere/Instructions/ScienceQA/train.json"),
        ("ucit/llava_cmoe", {"WARMUP": "/nowhere"}, "WARMUP=/nowhere: no /nowhere/train.json"),
        ("sequence", {}, "usage: bash scripts/sequence.sh BENCHMARK METHOD"),
        ("benchmark", {}, "usage: bash scripts/benchmark.sh BENCHMARK METHOD"),
        ("eval", {}, "usage: RUN="),
        ("cluster/slurm", {}, "usage: SCRIPT="),
        ("cluster/multinode", {}, "usage: HOSTS="),
        (
            "coin/lora",
            {"GPUS": "4", "CUDA_VISIBLE_DEVICES": "0,1", "DATA": "/nowhere"},
            "CUDA_VISIBLE_DEVICES=0,1 names 2",
        ),
        ("cluster/slurm", {"SCRIPT": "x"}, "DATA is not set"),
        ("cluster/multinode", {"SCRIPT": "x", "DATA": "x", "OUT": "x"}, "HOSTS is not set"),
    ],
)
def test_what_is_not_set_is_said(script: str, variables: dict[str, str], message: str) -> None:
    done = shell(f"scripts/{script}.sh", **variables)
    assert done.returncode == 2
    assert message in done.stderr


def test_multinode_writes_the_hostfile(tmp_path: Path) -> None:
    probe = tmp_path / "probe.sh"
    probe.write_text('echo "$LAUNCHER $GPUS $DATA $*"; cat "$HOSTFILE"')
    done = shell(
        "scripts/cluster/multinode.sh", "a=b", SCRIPT=str(probe), DATA="/d", OUT=str(tmp_path / "o"), HOSTS="n1 n2"
    )
    assert done.stdout.splitlines() == ["deepspeed 1 /d a=b", "n1 slots=1", "n2 slots=1"]


TORCHRUN = "python -m torch.distributed.run --nproc_per_node"
NODE_1 = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "5"}


def node_line(rank: int) -> str:
    """The torchrun command that starts clmoe on one of two nodes with eight GPUs."""
    where = f"--nnodes 2 --node_rank {rank} --master_addr n1 --master_port 5"
    return f"{TORCHRUN} 8 {where} -m clmoe.cli run lora coin"


@pytest.mark.parametrize(
    ("script", "variables", "expected"),
    [
        ("coin/lora.sh", {"GPUS": "1", "LAUNCHER": ""}, ["clmoe run lora coin"]),
        ("coin/lora.sh", {"GPUS": "2", "LAUNCHER": "torchrun"}, [f"{TORCHRUN} 2 --standalone -m clmoe.cli"]),
        ("coin/lora.sh", NODE_1, [node_line(1)]),
        (
            "coin/lora.sh",
            NODE_1 | {"LAUNCHER": "deepspeed", "HOSTFILE": "h"},
            ["deepspeed --num_gpus 8 --hostfile h --no_ssh --node_rank 1 --master_addr n1 --master_port 5 --no_local_"],
        ),
        (
            "cluster/slurm.sh",
            {"NODES": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "5"},
            ["srun --kill-on-bad-exit=1 --ntasks-per-node=1 --cpus-per-task=64 bash -c", "# node 0", node_line(0),
             "# node 1", node_line(1)],
        ),
        (
            "cluster/multinode.sh",
            {"HOSTS": "n1 n2", "MASTER_PORT": "5"},
            ["# {out}/hostfile:", "n1 slots=8", "n2 slots=8",
             "deepspeed --num_gpus 8 --hostfile {out}/hostfile --master_port 5 --no_local_rank --log_level warn"],
        ),
    ],
)  # fmt: skip
def test_a_dry_run_prints_the_commands_and_writes_nothing(
    script: str, variables: dict[str, str], expected: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    always = {"SCRIPT": "scripts/coin/lora.sh", "DATA": str(tmp_path), "OUT": str(out), "DRY_RUN": "1", "GPUS": "8"}
    done = shell(f"scripts/{script}", "label=my run", **always | {"LAUNCHER": ""} | variables)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("clmoe report")]
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start.format(out=out))
        assert " run lora " not in line or line.endswith("'label=my run'")
    assert done.stdout.count("clmoe report") == (0 if variables.get("NODE_RANK") == "1" else 1), (
        "on the first node alone"
    )
    assert not out.exists()


def test_several_nodes_need_to_know_each_other() -> None:
    done = shell("scripts/coin/lora.sh", NODES="2", NODE_RANK="0", MASTER_ADDR="n1", DRY_RUN="1")
    assert done.returncode == 2 and "MASTER_PORT is not set" in done.stderr


def test_slurm_passes_the_signal_on_and_queues_again(tmp_path: Path) -> None:
    """SLURM sends SIGTERM to the batch script alone; its child must see it and decide the job's exit code."""
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
    """The script starts `deepspeed`, here a stand-in that prints its arguments, on exactly the devices it may use."""
    hosts = tmp_path / "hosts"
    fake = tmp_path / "bin" / "deepspeed"
    fake.write_text('#!/bin/sh\necho "deepspeed $*"\n')
    fake.chmod(0o755)
    given = {"GPUS": "", "LAUNCHER": "deepspeed", **{k: v.format(hosts=hosts) for k, v in variables.items()}}
    trained = [line for line in spoken("coin/lora.sh", CLMOE_VISION="/cache", **given) if line.startswith("deepspeed ")]
    assert len(trained) == 1
    assert all(line.startswith(f"deepspeed {devices.format(hosts=hosts)} --master_port ") for line in trained)
    ports = [int(line.split("--master_port ")[1].split()[0]) for line in trained]
    assert all(1024 <= port < 65536 for port in ports)
    if "HOSTFILE" in variables:
        handed_over = Path(f"{hosts}.env").read_text().splitlines()
        assert {"CLMOE_VISION=/cache", "HF_HUB_OFFLINE=1", "OMP_NUM_THREADS=1"} <= set(handed_over)


def test_the_cores_are_the_machines_whatever_the_threads() -> None:
    told = command("bash", "-c", "source scripts/common.sh; export OMP_NUM_THREADS=1; cores")
    assert int(told.stdout) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 0), (1, 1)])
def test_ci_fails_with_the_contract_suite_but_not_for_want_of_its_packages(
    code: int, expected: int, tmp_path: Path
) -> None:
    """With stub scripts, `.ci/run` fails if the suite on the oldest packages fails.

    It only reports code 3, which means that these packages cannot be installed.
    """
    for name in (".ci", "scripts", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(REPOSITORY / ".ci" / "run", tmp_path / ".ci")
    (tmp_path / "scripts" / "common.sh").write_text("setup() { :; }\n")
    for name in ("scripts/test.sh", "scripts/gpu_kit.sh", "scripts/quickstart.sh", ".venv/bin/python", "chromium"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "scripts" / "test_versions.sh").write_text(f"echo $*\n[ $1 != lowest ] || exit {code}\n")
    done = command("bash", str(tmp_path / ".ci" / "run"), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == expected, done.stderr
    assert ("NOT TESTED on the lowest" in done.stderr) == (code == 3)
    assert done.stdout.splitlines() == ["lowest", "highest"][: 2 - expected]
