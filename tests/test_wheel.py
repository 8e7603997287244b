"""What a user without the checkout gets: the wheel holds everything that a run on the embedded benchmark needs."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "clmoe").rglob("__init__.py")}
    assert found == set(listed) - {"clmoe.configs", "clmoe.playground.base"}


@pytest.mark.slow
def test_a_wheel_runs_in_an_empty_folder(tmp_path: Path) -> None:
    wheels, site, empty, source = (tmp_path / name for name in ("wheels", "site", "empty", "source"))
    empty.mkdir()
    for name in ("clmoe", "configs", "playground/base"):  # a build leaves files beside its source
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels)]
    subprocess.run([*pip, str(source)], check=True)
    (wheel,) = wheels.iterdir()
    assert wheel.stat().st_size <= 10 * 2**20
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "clmoe.cli", "run", "lora", "playground-coin", "--order", "digits"]
    settings = ["training.steps=2", "evaluation.limit=4"]
    subprocess.run([*command, *settings], cwd=empty, env=environment, check=True)
    (run,) = (empty / "runs").rglob("matrix.csv")
    assert run.read_text().splitlines()[0] == "after,digits"
    commit = [line for line in (run.parent / "events.jsonl").read_text().splitlines() if '"commit": null' in line]
    assert commit  # the package that ran was the wheel's, not the checkout's
