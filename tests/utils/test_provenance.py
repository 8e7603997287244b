"""The commit behind a result, and whether the files were the commit's."""

import subprocess
from pathlib import Path

import pytest

from clmoe.utils import logging


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert logging._commit(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    assert logging._commit(tmp_path) is None, "no commit yet"
    (tmp_path / "docs").mkdir()
    for name in ("a", "docs/results.md"):
        (tmp_path / name).write_text("1")
        git(tmp_path, "add", name)
    git(tmp_path, "commit", "--quiet", "--message", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")[:12]
    (tmp_path / "run.log").write_text("not the checkout's")
    (tmp_path / "docs" / "results.md").write_text("the results of these runs")
    assert logging._commit(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert logging._commit(tmp_path) == commit + "+"
    monkeypatch.setenv("PATH", "")
    assert logging._commit(tmp_path) is None, "no git"


def test_the_command_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/x/bin/clmoe", "train", "--data", "my data"])
    assert logging.provenance()["command"] == "clmoe train --data 'my data'"
