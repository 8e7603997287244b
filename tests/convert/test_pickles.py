"""A pickled file hands over its tensors or is refused; nothing in it ever runs."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import clmoe
from clmoe.convert.pickles import CHILD, unpickled
from clmoe.convert.unpickle import check_tensors, convert
from clmoe.errors import ClmoeError

LIMIT = 1 << 20


def read(path: Path, scratch: Path, limit: int = LIMIT) -> dict[str, torch.Tensor]:
    with unpickled(path, scratch, limit) as files:
        return {name: tensor.clone() for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_arrive_bit_for_bit(zipped: bool, tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    content = OrderedDict(
        half=torch.randn(4, 2).half(),
        brain=torch.randn(4).bfloat16(),
        full=torch.tensor([float("nan"), float("inf"), -0.0]),
        turned=torch.randn(3, 5).t(),
        again=shared,
        twice=shared,
        parameter=torch.nn.Parameter(torch.ones(2)),
        positions=torch.arange(5)[None],
    )
    torch.save(content, tmp_path / "weights.bin", _use_new_zipfile_serialization=zipped)
    found = read(tmp_path / "weights.bin", tmp_path)
    assert found.keys() == content.keys()
    for name, tensor in content.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        same = found[name].contiguous().view(torch.uint8) == tensor.detach().contiguous().view(torch.uint8)
        assert same.all(), name
    assert not list(tmp_path.glob(".unpickled-*")), "the copies are gone"


class Canary:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_a_canary_is_never_run(form: str, tmp_path: Path) -> None:
    canary, path = tmp_path / "sang", tmp_path / "adapter_model.bin"
    evil = Canary(canary)
    content = {"lora_A.weight": torch.ones(2), "x": [{"deep": (evil,)}]}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"x": evil}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    problem = "torch does not take it" if form == "plain pickle" else r"it asks for [\w.]*mkdir, which is no tensor"
    with pytest.raises(ClmoeError, match=rf"adapter_model\.bin: refused: {problem}"):
        read(path, tmp_path)
    assert not canary.exists()
    with pytest.raises(FileNotFoundError):  # the test's own check: unprotected, the canary does sing
        canary.rmdir()
    pickle.loads(pickle.dumps(evil))
    assert canary.is_dir()


def test_the_child_runs_isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the environment's modules nor a package in the current folder is imported by it."""
    (tmp_path / "torch.py").write_text(f"import os; os.mkdir({str(tmp_path / 'sang')!r})")
    torch.save({"a": torch.ones(2)}, tmp_path / "a.bin")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "torch.py"))
    monkeypatch.chdir(tmp_path)
    assert read(tmp_path / "a.bin", tmp_path).keys() == {"a"}
    assert not (tmp_path / "sang").exists()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    listed = subprocess.run(
        [sys.executable, "-I", "-c", f"import runpy, sys; runpy.run_path({str(CHILD)!r}); print(*sys.modules)"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not any(name.split(".")[0] == "clmoe" for name in listed.stdout.split())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"a": torch.ones(2, dtype=torch.float64)}, r"tensor a is float64 .*allowed are dense float16"),
        ({"a": torch.ones(2, dtype=torch.int8)}, "tensor a is int8"),
        ({"a": torch.ones(2, 2).to_sparse()}, "tensor a is float32 .*sparse"),
        ({"a": torch.ones(1).expand(1 << 30)}, "tensor a claims 4294967296 bytes"),
        ({"a": 3}, "entry 'a' is a int, not a tensor"),
        ({3: torch.ones(2)}, "entry 3 is a Tensor"),
        ([torch.ones(2)], "it holds a list"),
        (torch.ones(2), "it holds a Tensor"),
    ],
)
def test_what_is_no_mapping_of_allowed_tensors_is_refused(content: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_tensors(content, LIMIT)


def test_a_refusal_names_the_file(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, dtype=torch.float64)}, tmp_path / "odd.bin")
    with pytest.raises(ClmoeError, match=r"odd\.bin: refused: tensor a is float64"):
        read(tmp_path / "odd.bin", tmp_path)


def test_an_oversized_file_is_refused_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.zeros(LIMIT)}, tmp_path / "big.bin")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("a process was started"))
    with pytest.raises(ClmoeError, match=rf"big\.bin: \d+ bytes; at most {LIMIT} are accepted"):
        read(tmp_path / "big.bin", tmp_path)


def test_many_names_for_one_storage_count_each() -> None:
    shared = torch.zeros(1 << 16)
    with pytest.raises(ValueError, match=rf"its tensors take {8 << 18} bytes; at most {LIMIT}"):
        check_tensors({str(n): shared for n in range(8)}, LIMIT)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(tmp_path / "z.bin", "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    with pytest.raises(ValueError, match=r"its member \S+ is compressed"):
        convert(tmp_path / "z.bin", tmp_path, LIMIT)


@pytest.mark.parametrize("damage", ["text", "cut"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.bin"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1" if damage == "text" else path.read_bytes()[:700])
    with pytest.raises(ClmoeError, match=r"damaged\.bin: refused: (?!.*weights_only)"):
        read(path, tmp_path)
    with pytest.raises(ClmoeError, match=r"missing\.bin: no such file"):
        read(tmp_path / "missing.bin", tmp_path)


def test_no_other_file_of_the_package_reads_pickles() -> None:
    package = Path(clmoe.__file__).parent
    words = ("torch.load", "pickle.load", "import pickle", "import dill", "import joblib", "np.load(", "cloudpickle")
    found = {f.name for f in package.rglob("*.py") if any(word in f.read_text() for word in words)}
    assert found == {CHILD.name}
