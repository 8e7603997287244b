"""Damaged, forged and unwritable files are named and never executed, and nothing finished is lost."""

from __future__ import annotations

import pickle
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import clmoe
from clmoe.bases.llava import load_base
from clmoe.config import ModelConfig
from clmoe.errors import ClmoeError
from clmoe.train.checkpoint import MANIFEST, read_checkpoint, seal, verify
from clmoe.utils.tensors import load_tensors
from tests.launch import environment
from tests.runs import DAMAGES, LLAVA_CMOE, Runs, contents
from tests.support import TASKS

FIRST, SECOND = TASKS[:2]
CHAINS = {"clmoe": (), "llava_cmoe": LLAVA_CMOE}


class Canary:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture(params=CHAINS)
def checkpoint(request: pytest.FixtureRequest, runs: Runs, tmp_path: Path) -> Path:
    """A copy of a first task's checkpoint that a test may damage."""
    method = request.param
    return runs.copy(runs.chain(method, *CHAINS[method], tasks=(FIRST,))[0], tmp_path / f"{method}-copy")


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_of_a_checkpoint_is_named(damage: str, checkpoint: Path) -> None:
    files = [path for path in checkpoint.iterdir() if path.name != MANIFEST]
    assert len(files) >= 5
    for path in files:
        whole = path.read_bytes()
        DAMAGES[damage](path)
        with pytest.raises(ClmoeError, match=str(path)):
            read_checkpoint(checkpoint)
        path.write_bytes(whole)
    verify(checkpoint)
    DAMAGES[damage](checkpoint / MANIFEST)
    with pytest.raises(ClmoeError, match=str(checkpoint)):
        read_checkpoint(checkpoint)


@pytest.mark.slow
def test_a_forged_checkpoint_executes_nothing(checkpoint: Path, runs: Runs, tmp_path: Path) -> None:
    """Each file in turn is replaced by a pickle under a valid manifest; neither evaluation nor training runs it."""
    canary = tmp_path / "canary"
    forged = pickle.dumps(Canary(canary))
    pickle.loads(forged)
    assert canary.exists(), "the canary sings"
    canary.unlink()
    method = read_checkpoint(checkpoint).lineage.method
    for path in [path for path in checkpoint.iterdir() if path.name != MANIFEST]:
        whole = path.read_bytes()
        path.write_bytes(forged)
        seal(checkpoint)
        for run in (
            lambda: runs.evaluate(checkpoint, tmp_path / "evaluated"),
            lambda: runs.train(tmp_path / "run" / SECOND, method, SECOND, *CHAINS[method], previous=checkpoint),
        ):
            with pytest.raises(SystemExit):
                run()
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
        path.write_bytes(whole)
        assert not canary.exists(), path.name


def test_no_pickle_is_read_in_place_of_safetensors(checkpoint: Path, runs: Runs, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (checkpoint / "adapter_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    (checkpoint / "adapter_model.safetensors").unlink()
    seal(checkpoint)
    with pytest.raises(SystemExit):
        runs.evaluate(checkpoint, tmp_path / "evaluated")
    assert not canary.exists()


def test_a_base_of_pickles_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "base"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(ClmoeError, match=r"expected config\.json and \*\.safetensors"):
        load_base(ModelConfig(path=str(folder)))
    assert not canary.exists()


def test_yaml_that_would_run_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (checkpoint / "config.yaml").write_text(f"method: !!python/object/apply:os.mkdir ['{canary}']\n")
    seal(checkpoint)
    with pytest.raises(ClmoeError, match=r"config\.yaml: cannot be read as YAML"):
        read_checkpoint(checkpoint)
    assert not canary.exists()


@pytest.mark.parametrize("length", [2**62, 2**40, 10_000])
def test_a_header_that_promises_too_much_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a": 1}')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ClmoeError, match=f"{path}: cannot be read as safetensors"):
        load_tensors(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "KiB"


def spoil(file: Path, value: float) -> str:
    """Set one number of a safetensors file to ``value``; return the tensor's name."""
    tensors = load_file(file)
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, {"format": "pt"})
    return name


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_number_that_is_not_finite_is_named_at_every_door(
    value: float, checkpoint: Path, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluation, the next task's training and ``clmoe.load``, which the demo calls too, name the adapter's tensor."""
    method = read_checkpoint(checkpoint).lineage.method
    file = checkpoint / "adapter_model.safetensors"
    name = spoil(file, value)
    seal(checkpoint)
    for door in (
        lambda: runs.evaluate(checkpoint, tmp_path / "evaluated"),
        lambda: runs.train(tmp_path / "run" / SECOND, method, SECOND, *CHAINS[method], previous=checkpoint),
    ):
        with pytest.raises(SystemExit):
            door()
        assert f"{file}: {name} " in capsys.readouterr().err
    assert not (tmp_path / "evaluated" / "matrix.csv").exists()
    with pytest.raises(ClmoeError, match=f"{file}: {name} "):
        clmoe.load(checkpoint)


def test_a_base_that_is_not_finite_is_named_before_training(tiny_folder: Path, runs: Runs, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    name = spoil(folder / "model.safetensors", float("inf"))
    with pytest.raises(ClmoeError, match=f"{folder / 'model.safetensors'}: {name} "):
        load_base(ModelConfig(path=str(folder)))
    with pytest.raises(ClmoeError, match=r"model\.safetensors"):
        clmoe.run("lora", str(runs.benchmark), base=folder, output=tmp_path / "run")
    assert not list(tmp_path.glob("run/0*"))


FULL = """
import resource, signal, sys
from clmoe import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
cli.main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [40_000, 100_000])
def test_a_full_disk_leaves_what_is_finished(limit: int, runs: Runs, tmp_path: Path) -> None:
    """Finished work stays whole if a file above ``limit`` bytes (an adapter, or only a state) cannot be written."""
    first, second = runs.chain("clmoe")
    size = (second / "adapter_model.safetensors").stat().st_size
    assert 40_000 < size < 100_000 < 3 * size
    output = tmp_path / SECOND
    fixed = ["--model", str(runs.model), "--benchmark", str(runs.benchmark), "--previous", str(first)]
    line = ["train", "--config", "clmoe", "--task", SECOND, *fixed, "--output", str(output), "training.save_steps=2"]
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(limit), *line], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr and "What was finished before is whole" in done.stderr
    assert not output.exists()
    verify(first)
    runs.train(output, "clmoe", SECOND, "training.save_steps=2", previous=first)
    for name, content in contents(second).items():
        if name not in ("config.yaml", MANIFEST):
            assert contents(output)[name] == content, name
