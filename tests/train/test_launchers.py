"""Two processes, under torchrun and with DeepSpeed, train and write the same as one; also DeepSpeed's settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from clmoe.errors import ClmoeError
from clmoe.train import loop as zero
from clmoe.train.loop import OneDevice
from clmoe.train.state import states
from clmoe.utils.tensors import same_bits
from tests.launch import REPOSITORY, environment, launch, needs_deepspeed, stop_when
from tests.runs import LLAVA_CMOE, Killed, Runs, contents, events, on_step, tensors
from tests.support import TASKS

FIRST, SECOND = TASKS[:2]
# Rounding errors grow with the learning rate, whatever causes them.
STEPS = ("training.steps=50", "training.learning_rate=1e-3", "training.projector_learning_rate=1e-4")


def train_line(runs: Runs, output: Path, method: str, task: str, *more: str) -> list[str]:
    """The arguments ``-m clmoe.cli train ...`` for a launcher."""
    fixed = ["--model", str(runs.model), "--benchmark", str(runs.benchmark), "--output", str(output)]
    fixed += [] if task == FIRST or "--previous" in more else ["--order", task]
    return ["-m", "clmoe.cli", "train", "--config", method, "--task", task, *fixed, *more]


def eval_line(runs: Runs, checkpoint: Path) -> list[str]:
    """The arguments ``-m clmoe.cli eval ...`` that write to the checkpoint's run folder."""
    where = ["--benchmark", str(runs.benchmark), "--output", str(checkpoint.parent)]
    return ["-m", "clmoe.cli", "eval", "--checkpoint", str(checkpoint), *where]


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in events(run, "step")]


def engine(run: Path) -> tuple[str, int]:
    (event,) = events(run, "trained")
    return event["engine"], event["processes"]


@pytest.fixture(scope="module")
def alone(runs: Runs) -> Path:
    """CL-MoE's first task, 50 steps in one process; projector and experts have their own learning rates."""
    return runs.train(runs.root / "alone" / FIRST, "clmoe", FIRST, *STEPS)


LAUNCHES = {
    "ddp": ([], "DistributedDataParallel"),
    "zero2": (["--deepspeed", "zero2"], "DeepSpeedEngine"),
}


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(("kind", "vision"), [(kind, "") for kind in LAUNCHES] + [("ddp", "vision")])
def test_two_processes_train_as_one(
    kind: str, vision: str, alone: Path, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and weights are those of one process; with ``vision``, both store image features and read each other's."""
    more, wrapped = LAUNCHES[kind]
    if vision:
        monkeypatch.setenv("CLMOE_VISION", str(tmp_path / vision))
    launch(2, *train_line(runs, tmp_path / FIRST, "clmoe", FIRST, *more, *STEPS))
    assert engine(alone.parent) == ("TrainedModel", 1)
    assert engine(tmp_path) == (wrapped, 2)
    expected, found = losses(alone.parent), losses(tmp_path)
    assert len(expected) == 50 and expected[-1] < expected[0] - 0.5, "it learned something"
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)
    rates = [event["learning_rate"] for event in events(tmp_path, "step")]
    assert rates == [event["learning_rate"] for event in events(alone.parent, "step")]
    for name, value in tensors(tmp_path / FIRST).items():
        torch.testing.assert_close(value, tensors(alone)[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("kind", LAUNCHES)
def test_batches_without_images_stop_nobody(kind: str, runs: Runs, tmp_path: Path) -> None:
    """With single records on two processes, every eighth without an image, the tuned projector waits for no gradient.

    ZeRO-2 packs gradients in the order in which they arrive, which must be the same with and without an image.
    """
    more = ("training.steps=6", "training.micro_batch_size=1", *STEPS[1:])
    launch(2, *train_line(runs, tmp_path / "two" / SECOND, "clmoe", SECOND, *LAUNCHES[kind][0], *more))
    runs.train(tmp_path / "one" / SECOND, "clmoe", SECOND, *more)
    found, expected = (torch.tensor(losses(tmp_path / name)) for name in ("two", "one"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.slow
@needs_deepspeed
def test_two_processes_stopped_in_mid_task_go_on_as_one(alone: Path, runs: Runs, tmp_path: Path) -> None:
    """One process continues after SIGTERM to the launcher; torchrun passes it on and ends with its own exit code."""
    output, save = tmp_path / FIRST, "training.save_steps=10"
    line = train_line(runs, output, "clmoe", FIRST, "--deepspeed", "zero2", *STEPS, save)
    phase = tmp_path / f".{FIRST}.partial" / ".phases" / "trained"
    assert stop_when(lambda: (tmp_path / "events.jsonl").is_file() and len(losses(tmp_path)) >= 15, 2, *line) != 0
    (newest, *_) = states(phase)
    made = json.loads((newest / "state.json").read_text())["step"]
    assert made >= 15, "the state of the step in which the signal came"
    before = len(losses(tmp_path))
    runs.train(output, "clmoe", FIRST, *STEPS, save)
    found, expected = losses(tmp_path), losses(alone.parent)
    assert len(found) - before == 50 - made
    torch.testing.assert_close(torch.tensor(found[before:]), torch.tensor(expected[made:]), rtol=1e-5, atol=0)


@pytest.mark.slow
@needs_deepspeed
def test_two_processes_go_on_where_one_was_killed(
    alone: Path, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes continue a state that one wrote; DeepSpeed spreads its weights, moments and step over them."""
    output, made = tmp_path / FIRST, 30
    with monkeypatch.context() as patch:
        on_step(patch, made)
        with pytest.raises(Killed):
            runs.train(output, "clmoe", FIRST, *STEPS, f"training.save_steps={made}")
    before, expected = len(losses(tmp_path)), losses(alone.parent)[made:]
    launch(2, *train_line(runs, output, "clmoe", FIRST, "--deepspeed", "zero2", *STEPS))
    assert engine(tmp_path) == ("DeepSpeedEngine", 2)
    found = losses(tmp_path)[before:]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.slow
@needs_deepspeed
def test_growth_locator_and_evaluation_are_those_of_one_process(runs: Runs, tmp_path: Path) -> None:
    """Two processes do LLaVA-CMoE's second task like one: probes, decision, extension, VAE, evaluation of all tasks."""
    settings = (*LLAVA_CMOE, "options.probe_share=0.5", "options.probe_min_steps=4")
    first, second = runs.chain("llava_cmoe", *settings)
    more = ["--previous", str(first), "--deepspeed", "zero2", *settings]
    launch(2, *train_line(runs, tmp_path / "two" / SECOND, "llava_cmoe", SECOND, *more))
    launch(2, *eval_line(runs, tmp_path / "two" / SECOND))
    two = tmp_path / "two" / SECOND
    plans = [json.loads((folder / "expansion.json").read_text())[-1]["blocks"] for folder in (second, two)]
    for block, decision in plans[0].items():
        if decision["margin"] > 1e-3:
            assert plans[1][block]["added"] == decision["added"], block
        assert plans[1][block]["activations"] == pytest.approx(decision["activations"], abs=0.02)
    for name, value in load_file(second / "locator.safetensors").items():
        assert same_bits(load_file(two / "locator.safetensors")[name], value), name

    shutil.copytree(two, tmp_path / "one" / SECOND)
    runs.evaluate(tmp_path / "one" / SECOND, tmp_path / "one")
    files = contents(tmp_path / "two")
    assert f"predictions/{SECOND}/{FIRST}.jsonl" in files and "matrix.csv" in files
    for name, content in contents(tmp_path / "one").items():
        if name not in ("events.jsonl", "timing.json"):
            assert files[name] == content, name


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(
    ("method", "kind", "state"),
    [
        ("ewc", "zero2", "importance.safetensors"),
        ("lwf", "zero2", None),
        ("der", "ddp", "memory_logits.safetensors"),
        ("olora", "zero2", None),
        ("modalprompt", "zero2", None),
    ],
)
def test_second_tasks_of_baselines_are_those_of_one_process(
    method: str, kind: str, state: str | None, runs: Runs, tmp_path: Path
) -> None:
    """They add a penalty on the weights, a second pass, replayed rows, frozen experts beside new ones, or soft tokens.

    Micro-batches hold one row and activations are recomputed; files that the processes measured together agree, too.
    """
    (first,) = runs.chain(method, tasks=TASKS[:1])
    more = ("training.steps=20", *STEPS[1:], "training.micro_batch_size=1", "training.gradient_checkpointing=true")
    flags, wrapped = LAUNCHES[kind]
    launch(2, *train_line(runs, tmp_path / "two" / SECOND, method, SECOND, "--previous", str(first), *flags, *more))
    runs.train(tmp_path / "one" / SECOND, method, SECOND, *more, previous=first)
    one, two = (tmp_path / name / SECOND for name in ("one", "two"))
    assert engine(two.parent) == (wrapped, 2)
    torch.testing.assert_close(torch.tensor(losses(two.parent)), torch.tensor(losses(one.parent)), rtol=1e-5, atol=0)
    for name, value in tensors(one).items():
        torch.testing.assert_close(tensors(two)[name], value, rtol=1e-3, atol=1e-5, msg=name)
    if state is not None:
        found = load_file(two / state)
        for name, value in load_file(one / state).items():
            torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-4 * float(value.abs().max()), msg=name)


def test_one_process_takes_one_of_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``OneDevice`` takes one GPU; transformers would split each micro-batch over all and average the parts' losses."""
    settings = OneDevice(output_dir=str(tmp_path), use_cpu=True)
    assert settings.n_gpu == 0
    monkeypatch.setattr(settings, "_n_gpu", 8)
    assert TrainingArguments.n_gpu.fget(settings) == 8, "what it would be"
    assert settings.n_gpu == 1


# ---- Settings and scripts


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


@pytest.mark.slow
@needs_deepspeed
def test_one_process_needs_no_launcher(runs: Runs, tmp_path: Path) -> None:
    """DeepSpeed without a launcher, with several phases in one process, gives the same weights as plain training."""
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
    """Run ``scripts/sequence.sh`` with two steps per task into ``folder/run``."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables |= {"OUT": str(folder / "run"), "MODEL": str(runs.model), "PATH": path}
    line = ["bash", "scripts/sequence.sh", str(runs.benchmark), method, "training.steps=2"]
    return subprocess.run(line, env=environment() | variables, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.slow
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
    assert "LAUNCHER=mpirun is not one of python, torchrun, deepspeed" in done.stderr
