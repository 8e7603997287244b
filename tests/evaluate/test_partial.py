"""An interrupted cell goes on where it stopped, to the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from clmoe.evaluate.partial import PartialAnswers

from clmoe.evaluate.generate import Answer, Answerer
from tests.runs import Runs, contents, texts
from tests.support import TASKS

TASK = TASKS[0]
SMALL = ("evaluation.batch_size=5",)  # 12 questions: three batches
TIMES = ("events.jsonl", "timing.json")


class Killed(BaseException):
    """Nobody may catch it, as nobody catches kill -9."""


@pytest.fixture
def checkpoint(runs: Runs) -> Path:
    return runs.chain("clmoe", tasks=TASKS[:1])[0]


@pytest.fixture
def straight(runs: Runs, checkpoint: Path) -> dict[str, bytes]:
    """A run folder's files after an evaluation without interruption."""
    run = runs.root / "straight-evaluation"
    runs.evaluate(checkpoint, run, *SMALL)
    assert texts(run, TASK, TASK)
    return finished(run)


def die_at(patch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Die in the ``number``-th generation of full batches from now; the list grows with each one's size."""
    real, sizes = Answerer.generate, []

    def generate(self: Answerer, items: list[Any], *args: Any, **kwargs: Any) -> Any:
        if len(items) > 1:
            if len(sizes) == number:
                raise Killed
            sizes.append(len(items))
        return real(self, items, *args, **kwargs)

    patch.setattr(Answerer, "generate", generate)
    return sizes


def interrupt(runs: Runs, checkpoint: Path, run: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Path:
    """Evaluate until the third batch; returns the file of partial answers."""
    with monkeypatch.context() as patch:
        die_at(patch, 2)
        with pytest.raises(Killed):
            runs.evaluate(checkpoint, run, *SMALL, *overrides)
    (partial,) = (run / "predictions" / TASK).glob(".*partial-*")
    return partial


def resume(runs: Runs, checkpoint: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Evaluate to the end; returns the sizes of the batches that were computed."""
    with monkeypatch.context() as patch:
        sizes = die_at(patch, -1)
        runs.evaluate(checkpoint, run, *SMALL)
    return sizes


def finished(run: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(run).items() if name not in TIMES}


def test_only_what_is_missing_is_answered(
    runs: Runs, checkpoint: Path, straight: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(runs, checkpoint, tmp_path, monkeypatch)
    # the last batch of the located cell, then the oracle's three
    assert resume(runs, checkpoint, tmp_path, monkeypatch) == [2, 5, 5, 2]
    assert finished(tmp_path) == straight


def test_a_batch_that_was_cut_off_is_answered_again(
    runs: Runs, checkpoint: Path, straight: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = interrupt(runs, checkpoint, tmp_path, monkeypatch)
    partial.write_bytes(partial.read_bytes()[:-9])
    assert resume(runs, checkpoint, tmp_path, monkeypatch) == [5, 2, 5, 5, 2]
    assert finished(tmp_path) == straight


def test_answers_of_another_setting_are_not_used(
    runs: Runs, checkpoint: Path, straight: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(runs, checkpoint, tmp_path, monkeypatch, "options.beta=0.25")
    assert resume(runs, checkpoint, tmp_path, monkeypatch) == [5, 5, 2, 5, 5, 2]
    assert finished(tmp_path) == straight


@pytest.mark.parametrize("cells", [1, 2], ids=["first", "last"])
def test_what_a_crash_left_beside_a_complete_cell_goes(
    cells: int,
    runs: Runs,
    checkpoint: Path,
    straight: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = PartialAnswers.remove, []

    def remove(self: PartialAnswers) -> None:
        calls.append(self)
        if len(calls) == cells:
            raise Killed
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(PartialAnswers, "remove", remove)
        with pytest.raises(Killed):
            runs.evaluate(checkpoint, tmp_path, *SMALL)
    assert list((tmp_path / "predictions" / TASK).glob(".*partial-*"))
    resume(runs, checkpoint, tmp_path, monkeypatch)
    assert finished(tmp_path) == straight


@pytest.mark.parametrize("torn", ['{"question_id": "b", "te', '{"question_id": "b", "text": "{}', '{"a": {"vae": 1}'])
def test_files_of_all_processes_are_read_and_torn_ends_closed(
    torn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = PartialAnswers.of(tmp_path / "task.json", {"a": 1})
    other = PartialAnswers.of(tmp_path / "task.oracle.json", {"a": 1})
    answers = {name: Answer(name, 0.5, False, None, {"vae": 1}) for name in "abcd"}
    partial.append([("a", answers["a"])])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + torn.encode())
    partial.append([("c", answers["c"])])
    monkeypatch.setenv("RANK", "1")
    partial.append([("d", answers["d"])])
    monkeypatch.delenv("RANK")
    assert partial.read() == {name: answers[name] for name in "acd"}
    assert other.read() == {}, "another cell's answers"
    assert PartialAnswers.of(tmp_path / "task.json", {"a": 2}).read() == {}
    assert list(tmp_path.iterdir()) == [], "useless files are removed"
