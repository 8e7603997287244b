"""The embedded benchmarks on disk: their files, their version, and builds that are repeated, interrupted or refused."""

import hashlib
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from clmoe.benchmarks.base import load_benchmark
from clmoe.data.images import load_image
from clmoe.data.records import load_questions, load_train
from clmoe.embedded import build
from clmoe.errors import ClmoeError
from tests.embedded.support import BASE

DRAWN = {("playground-coin", 1): "d1daeb78fb0224ab", ("playground-cl4vqa", 1): "7149fd966a0ec555"}
"""Hash of the small files by name and ``build.VERSION``. Where it differs, raise the version."""


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROWS", {"train": 24, "test": 12})


@pytest.fixture
def small_coin(tmp_path: Path) -> Path:
    return build.prepare("playground-coin", tmp_path / "playground-coin")


@pytest.mark.parametrize("name", build.TASKS)
def test_files_load_and_fit_the_yaml(name: str, tmp_path: Path) -> None:
    benchmark = load_benchmark(name, build.prepare(name, tmp_path / name))
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert [task.name for task in benchmark.tasks] == [task.name for task in build.TASKS[name]]
    for task in benchmark.tasks:
        assert len(load_train(task.train, task.image_root)) == 24
        questions = load_questions(task.test, task.image_root)
        assert len(questions) == 12
        longest = max(len(tokenizer.tokenize(f" {question.answer}")) for question in questions)
        assert longest + 1 <= task.max_new_tokens <= longest + 4, task.name
        assert load_image(task.image_root / str(questions[0].image)).size == (56, 56)


@pytest.mark.parametrize("name", build.TASKS)
def test_another_drawing_is_another_version(name: str, tmp_path: Path) -> None:
    digest = hashlib.sha256()
    for path in sorted(build.prepare(name, tmp_path / name).rglob("*.*")):
        if path.name != build.MARKER:
            digest.update(load_image(path).tobytes() if path.suffix == ".png" else path.read_bytes())
    assert digest.hexdigest()[:16] == DRAWN[name, build.VERSION]


def test_prepare_is_idempotent_and_replaces_another_version(small_coin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {path: path.stat().st_mtime_ns for path in small_coin.rglob("*")}
    before = {path: path.read_bytes() for path in small_coin.rglob("*.*")}
    build.prepare("playground-coin", small_coin)
    assert {path: path.stat().st_mtime_ns for path in small_coin.rglob("*")} == times
    (small_coin / "sqa" / "test.json").unlink()
    (small_coin / "left.over").touch()
    monkeypatch.setattr(build, "VERSION", 0)
    build.prepare("playground-coin", small_coin)
    after = {path: path.read_bytes() for path in small_coin.rglob("*.*")}
    assert after.pop(small_coin / build.MARKER) != before.pop(small_coin / build.MARKER)
    assert after == before


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ClmoeError, match=str(tmp_path)):
        build.prepare("playground-coin", tmp_path)
    with pytest.raises(ClmoeError, match="'playground-coin'"):
        build.prepare("playground-coim", tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_test_row", stop)
    with pytest.raises(KeyboardInterrupt):
        build.prepare("playground-coin", tmp_path / "playground-coin")
    assert list(tmp_path.iterdir()) == []
