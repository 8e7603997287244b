"""Weight files yield their tensors or are refused, nothing in them ever runs, and what is written is read back."""

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import clmoe
from clmoe.convert import weights
from clmoe.convert.weights import open_tensors, write_weights
from clmoe.errors import ClmoeError


class Canary:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "compressed"])
def test_tensors_arrive_bit_for_bit(form: str, tmp_path: Path) -> None:
    shared, path = torch.randn(3, 4), tmp_path / "weights.bin"
    content = OrderedDict(
        half=torch.randn(4, 2).half(),
        brain=torch.randn(4).bfloat16(),
        full=torch.tensor([3e38, 1e-45, -0.0]),
        turned=torch.randn(3, 5).t(),
        again=shared,
        twice=shared,
        parameter=torch.nn.Parameter(torch.ones(2)),
        positions=torch.arange(5)[None],
    )
    torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    if form == "compressed":  # if mapped, its members would be read while still compressed
        path.rename(tmp_path / "stored")
        with zipfile.ZipFile(tmp_path / "stored") as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            for member in source.namelist():
                target.writestr(member, source.read(member))
    found = open_tensors(path)
    assert found.keys() == content.keys()
    for name, tensor in content.items():
        assert found[name].dtype == tensor.dtype and not found[name].requires_grad
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.detach().contiguous().view(torch.uint8))


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_a_malicious_pickle_is_refused_and_never_runs(form: str, tmp_path: Path) -> None:
    canary, path = tmp_path / "sang", tmp_path / "adapter_model.bin"
    evil = Canary(canary)
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"x": evil}, protocol=2))
    else:
        content = {"lora_A.weight": torch.ones(2), "x": [{"deep": (evil,)}]}
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ClmoeError, match=r"adapter_model\.bin: .*mkdir"):
        open_tensors(path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(evil))  # checks the test itself: without protection, the canary does sing
    assert canary.is_dir()


def test_anything_but_named_dense_tensors_is_refused(tmp_path: Path) -> None:
    ones = torch.ones(2)
    odd = {"'a'": {"a": torch.ones(2, 2).to_sparse()}, "'b'": {"b": {"c": ones}}, "3": {3: ones}, "list": [ones]}
    for named, content in {**odd, "Tensor": ones}.items():
        torch.save(content, tmp_path / "odd.bin")
        with pytest.raises(ClmoeError, match=rf"odd\.bin: .*{named}"):
            open_tensors(tmp_path / "odd.bin")


@pytest.mark.parametrize("damage", ["text", "cut", "missing"])
@pytest.mark.parametrize("name", ["damaged.bin", "damaged.safetensors"])
def test_a_damaged_file_is_named(name: str, damage: str, tmp_path: Path) -> None:
    path, tensors = tmp_path / name, {str(i): torch.ones(1000) for i in range(3)}
    torch.save(tensors, path) if path.suffix == ".bin" else save_file(tensors, path)
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1" if damage == "text" else whole[:700])
    with pytest.raises(ClmoeError, match=re.escape(name)) as refusal:
        open_tensors(path)
    assert "weights_only" not in str(refusal.value), "no advice to switch the protection off"


def test_a_tensor_that_is_not_on_disk_as_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, tensors = weights.save_torch_state_dict, {"a": torch.ones(2), "b": torch.tensor([2.0, -0.0])}
    write_weights(tensors, tmp_path)
    negated = tensors | {"b": tensors["b"].neg()}
    for wrong in (negated, {"a": tensors["a"]}, tensors | {"c": torch.ones(2)}):
        monkeypatch.setattr(weights, "save_torch_state_dict", lambda _, *a, wrong=wrong, **k: write(wrong, *a, **k))
        with pytest.raises(ClmoeError, match=r": [bc] "):
            write_weights(tensors, tmp_path)


def test_no_other_file_of_the_package_reads_pickles() -> None:
    package = Path(clmoe.__file__).parent
    words = ("torch.load", "pickle.load", "import pickle", "import dill", "import joblib", "np.load(", "cloudpickle")
    found = {f.name: f.read_text() for f in package.rglob("*.py") if any(word in f.read_text() for word in words)}
    assert found.keys() == {"weights.py"}
    assert found["weights.py"].count("torch.load(") == found["weights.py"].count("weights_only=True") == 1
