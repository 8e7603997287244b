"""DeepSpeed's settings, and the scripts that start several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clmoe.errors import ClmoeError
from clmoe.train import loop as zero
from tests.launch import REPOSITORY, environment, launch, needs_deepspeed
from tests.runs import Runs, events, tensors
from tests.support import TASKS

FIRST = TASKS[0]


@needs_deepspeed
def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    for name in ("zero2", "zero2_offload"):
        assert zero.deepspeed_settings(str(zero.deepspeed_settings(name))) == zero.deepspeed_settings(name)
    with pytest.raises(ClmoeError, match=r"'zero22'. Did you mean 'zero2'"):
        zero.deepspeed_settings("zero22")
    settings = tmp_path / "mine.json"
    settings.write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}')
    with pytest.raises(ClmoeError, match=r"mine\.json: bf16 would round"):
        zero.deepspeed_settings(str(settings))
    for settings_of_zero in ("{}", '{"zero_optimization": {"stage": 0}}', '{"zero_optimization": {"stage": 3}}'):
        settings.write_text(settings_of_zero)
        with pytest.raises(ClmoeError, match=r"mine\.json: zero_optimization\.stage must be 1 or 2"):
            zero.deepspeed_settings(str(settings))
    settings.write_text("{")
    with pytest.raises(ClmoeError, match=r"mine\.json: cannot be read"):
        zero.deepspeed_settings(str(settings))


def test_without_deepspeed_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    with pytest.raises(ClmoeError, match=r"pip install 'clmoe\[train\]'"):
        zero.deepspeed_settings("zero2")


@needs_deepspeed
def test_one_process_needs_no_launcher(runs: Runs, tmp_path: Path) -> None:
    """The weights of a training with DeepSpeed alone, several phases in one process, are those without it."""
    warm = runs.benchmark.parent / TASKS[2]
    own = ["adapter.train_projector=false", "options.initial_experts_from=warmup", "options.probe_min_steps=2"]
    own += [f"options.warmup_train={warm}/train.json", f"options.warmup_images={warm}/images"]
    own += ["locator.options.steps=5"]
    fixed = ["--model", str(runs.model), "--benchmark", str(runs.benchmark), "--output", str(tmp_path / FIRST)]
    line = ["-m", "clmoe.cli", "train", "--config", "llava_cmoe", "--task", FIRST, *fixed, "--deepspeed", "zero2"]
    launch(1, *line, *own)
    assert [e["engine"] for e in events(tmp_path, "trained")] == ["DeepSpeedEngine"] * 3
    plain = runs.train(tmp_path / "plain" / FIRST, "llava_cmoe", FIRST, *own)
    for name, value in tensors(plain).items():
        # DeepSpeed clips gradients by a norm that it sums in another order
        torch.testing.assert_close(tensors(tmp_path / FIRST)[name], value, rtol=1e-3, atol=1e-5, msg=name)


def sequence_script(runs: Runs, folder: Path, method: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """``scripts/sequence.sh`` with a run of two steps a task in ``folder/run``."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables |= {"OUT": str(folder / "run"), "MODEL": str(runs.model), "PATH": path}
    line = ["bash", "scripts/sequence.sh", str(runs.benchmark), method, "training.steps=2"]
    return subprocess.run(line, env=environment() | variables, cwd=REPOSITORY, capture_output=True, text=True)


def test_the_sequence_script_starts_several_processes(runs: Runs, tmp_path: Path) -> None:
    done = sequence_script(runs, tmp_path, "clmoe", GPUS="2", LAUNCHER="torchrun", ORDER=FIRST)
    assert done.returncode == 0, done.stderr[-3000:]
    (event,) = events(tmp_path / "run", "trained")
    assert (event["engine"], event["processes"]) == ("DistributedDataParallel", 2)
    assert done.stdout.count(f"after {FIRST}: ") == 1, "one process speaks"
    assert (tmp_path / "run" / "matrix.csv").is_file()


def test_an_unknown_launcher_is_named(runs: Runs, tmp_path: Path) -> None:
    done = sequence_script(runs, tmp_path, "lora", LAUNCHER="mpirun")
    assert done.returncode == 2
    assert "LAUNCHER=mpirun is none of python, torchrun, deepspeed" in done.stderr
