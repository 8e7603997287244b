"""One task from start to publication: idempotent, resumable to the same bytes, and strict about what it continues."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from clmoe.benchmarks.base import Benchmark, train_records
from clmoe.config import dump_config, load_config
from clmoe.methods.base import TaskContext
from clmoe.methods.clmoe import ClMoe
from clmoe.train import task as task_module
from clmoe.train.checkpoint import verify
from clmoe.train.loop import TaskTrainer
from clmoe.train.task import answers_fit, load_records, prepare_request, training_records
from clmoe.utils.tensors import same_bits
from tests.runs import Killed, Runs, contents, events, kill, on_step, tensors
from tests.support import TASKS, save_tiny

FIRST, SECOND = TASKS[:2]


@pytest.fixture
def chain(runs: Runs) -> list[Path]:
    return runs.chain("clmoe")


def after_end_task(patch: pytest.MonkeyPatch) -> None:
    real = ClMoe.end_task

    def end_then_die(self: ClMoe, context: TaskContext) -> None:
        real(self, context)
        raise Killed

    patch.setattr(ClMoe, "end_task", end_then_die)


def half_way_through_cleaning(patch: pytest.MonkeyPatch) -> None:
    real = shutil.rmtree

    def cut(path: Path, *args: Any, **kwargs: Any) -> None:
        if Path(path).name == ".phases":
            (Path(path) / "trained" / "adapter_model.safetensors").unlink()
            raise Killed
        real(path, *args, **kwargs)

    patch.setattr(shutil, "rmtree", cut)


PHASES = {
    "after_consolidation": after_end_task,
    "saving": lambda patch: patch.setattr(task_module, "dump_config", kill),
    "cleaning": half_way_through_cleaning,
    "publishing": lambda patch: patch.setattr(task_module, "publish", kill),
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_killed_after_training_a_rerun_ends_in_the_same_bytes_without_another(
    phase: str, runs: Runs, chain: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / SECOND
    with monkeypatch.context() as patch:
        PHASES[phase](patch)
        with pytest.raises(Killed):
            runs.train(output, "clmoe", SECOND, previous=chain[0])
    assert output.exists() == (phase == "cleaning"), "nothing is removed before the checkpoint is in its place"
    monkeypatch.setattr(TaskTrainer, "train", kill)
    runs.train(output, "clmoe", SECOND, previous=chain[0])
    assert contents(output) == contents(chain[1])
    assert len(events(tmp_path, "trained")) == 1
    assert list(tmp_path.rglob(".*")) == [], "no working folder is left"


def test_an_interrupted_training_of_another_command_is_refused_and_kept(
    runs: Runs, chain: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run" / SECOND
    with monkeypatch.context() as patch:
        patch.setattr(ClMoe, "end_task", kill)
        with pytest.raises(Killed):
            runs.train(output, "clmoe", SECOND, "seed=7", previous=chain[0])
    for method, settings, named in (
        ("clmoe", [], "seed 7 there, 0 here"),
        ("clmoe", ["seed=7", "training.learning_rate=0.02"], "training.learning_rate 0.01 there, 0.02 here"),
        ("clmoe", ["seed=7", "training.batch_size=4"], "training.batch_size 8 there, 4 here"),
        ("clmoe", ["seed=7", "training.steps=9"], "training.steps 4 there, 9 here"),
        ("clmoe", ["seed=7", "options.gamma=0.5"], "options.gamma 0.7 there, 0.5 here"),
    ):
        assert named in refused(runs, capsys, output, method, SECOND, *settings, previous=chain[0])
    assert "method clmoe there, moelora here" in refused(runs, capsys, output, "moelora", SECOND)
    verify(runs.train(output, "clmoe", SECOND, "seed=7", previous=chain[0]))
    assert len(events(tmp_path / "run", "trained")) == 1, "the training that was kept is used"


@pytest.mark.slow
def test_restart_deletes_an_interrupted_training_and_nothing_that_is_finished(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("training.steps=5", "training.save_steps=2")
    output, alone = tmp_path / "run" / FIRST, runs.train(tmp_path / FIRST, "lora", FIRST, *settings, restart="")
    with monkeypatch.context() as patch:
        on_step(patch, 3)
        with pytest.raises(Killed):
            runs.train(output, "lora", FIRST, "seed=7", *settings)
    with monkeypatch.context() as patch:
        made = on_step(patch, -1)
        runs.train(output, "lora", FIRST, *settings, restart="")
        assert made == [0, 1, 2, 3, 4], "from the first step"
        runs.train(output, "lora", FIRST, *settings, restart="")
    assert len(made) == 5, "it was finished"
    assert contents(output) == contents(alone)


def test_a_later_task_without_previous_is_refused(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(runs, capsys, tmp_path / "run" / SECOND, "lora", SECOND, order="norm")
    assert "--previous" in error and FIRST in error and f"--order {SECOND}" in error


def refused(
    runs: Runs, capsys: pytest.CaptureFixture[str], output: Path, method: str, task: str, *overrides: str, **kwargs: Any
) -> str:
    """The one line that a refused command prints, after checking that it exits with code 2 and leaves no trace."""
    before = contents(output.parent) if output.parent.exists() else None
    with pytest.raises(SystemExit) as stop:
        runs.train(output, method, task, *overrides, **kwargs)
    assert stop.value.code == 2
    assert (contents(output.parent) if output.parent.exists() else None) == before, "something was written"
    error = capsys.readouterr().err
    assert error.startswith("clmoe train: ")
    assert error.count("\n") == 1
    return error


def test_other_settings_in_the_same_output_are_refused(
    runs: Runs, chain: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(runs, capsys, chain[1], "clmoe", SECOND, "training.steps=3", previous=chain[0])
    assert "training.steps 4 there, 3 here" in error
    assert "parent" in refused(runs, capsys, chain[1], "clmoe", SECOND)


def test_another_base_is_refused(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base with other weights under the same name counts as another base."""
    other = str(save_tiny(tmp_path / "other", seed=1))
    swapped = Runs(tmp_path / "swapped", Path(other), runs.benchmark)
    parent = swapped.train(tmp_path / "swapped" / FIRST, "lora", FIRST)
    shutil.rmtree(other)
    shutil.copytree(runs.model, other)
    error = refused(swapped, capsys, tmp_path / "run" / SECOND, "lora", SECOND, previous=parent)
    assert "was trained on a different base" in error


def test_an_output_that_holds_something_else_is_refused(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run" / "thesis"
    output.mkdir(parents=True)
    (output / "chapter1.txt").write_text("dear")
    assert "is not a finished checkpoint" in refused(runs, capsys, output, "clmoe", FIRST)


def test_what_cannot_be_trained_is_refused(
    runs: Runs, chain: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run" / "x"
    assert "has already learned 'colour'" in refused(runs, capsys, output, "clmoe", FIRST, previous=chain[1])
    assert "leave out --previous" in refused(runs, capsys, output, "multitask", "all", previous=chain[1])
    assert "cannot be cut" in refused(runs, capsys, output, "lora", FIRST, "training.micro_batch_size=3")
    assert "--task all only" in refused(runs, capsys, output, "multitask", FIRST)
    assert "one task at a time" in refused(runs, capsys, output, "lora", "all")
    assert "trains nothing" in refused(runs, capsys, output, "zero_shot", FIRST)
    assert "not in --order" in refused(runs, capsys, output, "lora", FIRST, order=f"{SECOND},{TASKS[2]}")


@pytest.mark.slow
def test_other_records_are_neither_mixed_in_nor_taken_for_trained(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If one answer changes under the same file names, neither an interrupted nor a finished training is continued."""
    shutil.copytree(runs.benchmark.parent, tmp_path / "own")
    yaml, train = tmp_path / "own" / "mini.yaml", tmp_path / "own" / FIRST / "train.json"
    yaml.write_text(yaml.read_text().replace(f"root: {runs.benchmark.parent}", "root: ."))
    own, output = Runs(tmp_path, runs.model, yaml), tmp_path / "run" / FIRST
    before, changed = train.read_text(), train.read_text().replace('"value": "A"', '"value": "B"', 1)
    with monkeypatch.context() as patch:
        on_step(patch, 2)
        with pytest.raises(Killed):
            own.train(output, "lora", FIRST, "training.save_steps=1")
    for _ in ("interrupted", "finished"):
        train.write_text(changed)
        assert f"train.{FIRST}" in refused(own, capsys, output, "lora", FIRST)
        train.write_text(before)
        own.train(output, "lora", FIRST)
    assert contents(output) == contents(runs.chain("lora", tasks=TASKS[:1])[0])
    (tmp_path / "run" / "trained_on.json").unlink()  # runs of older versions lack it
    train.write_text(changed)
    own.train(output, "lora", FIRST)


@pytest.mark.slow
def test_other_warm_up_data_are_found_too(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warm, images = tmp_path / "warm" / "train.json", runs.benchmark.parent / SECOND / "images"
    warm.parent.mkdir()
    shutil.copy(runs.benchmark.parent / SECOND / "train.json", warm)
    options = {"initial_experts_from": "warmup", "warmup_train": warm, "warmup_images": images}
    settings = [
        "adapter.train_projector=false",
        "locator=last",
        *(f"options.{key}={value}" for key, value in options.items()),
    ]
    output = runs.train(tmp_path / "run" / FIRST, "llava_cmoe", FIRST, *settings)
    assert runs.train(output, "llava_cmoe", FIRST, *settings) == output
    warm.write_text(warm.read_text() + "\n")
    assert "train.warm/train.json" in refused(runs, capsys, output, "llava_cmoe", FIRST, *settings)


@pytest.mark.slow
def test_masked_rows_keep_their_place_and_count_nothing(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text of a masked record must not matter, while leaving a record out moves all that follow."""
    shutil.copytree(runs.benchmark.parent, tmp_path / "own")
    train = tmp_path / "own" / FIRST / "train.json"
    rows, found = json.loads(train.read_text()), {}
    yaml = tmp_path / "own" / "mini.yaml"
    yaml.write_text(yaml.read_text().replace(f"root: {runs.benchmark.parent}", "root: ."))
    own = Runs(tmp_path, runs.model, yaml)
    for on_bad, spoiled in (("mask", "</s>"), ("mask", "</s> else"), ("skip", "</s>")):
        rows[0]["conversations"][1]["value"] = rows[1]["conversations"][0]["value"] = spoiled
        train.write_text(json.dumps(rows))
        output = tmp_path / on_bad / str(len(spoiled)) / FIRST
        own.train(output, "lora", FIRST, f"training.on_bad_record={on_bad}")
        assert f"{FIRST}: 2 of 24 rows" in capsys.readouterr().err
        found[on_bad, spoiled] = tensors(output)
    masked, other, left_out = found.values()
    assert all(same_bits(masked[name], other[name]) for name in masked)
    assert not all(same_bits(masked[name], left_out[name]) for name in masked)
    assert "2 rows (0-1)" in refused(own, capsys, tmp_path / "error" / FIRST, "lora", FIRST)


def test_answer_styles_decide_what_a_task_trains_on_and_are_noted(runs: Runs, mini: Benchmark, tmp_path: Path) -> None:
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps({"colour-3": {"brief": "It is the colour of letter A."}}))
    config, styled = (
        load_config("reglora", mini.recipe, pairs, str(runs.model))
        for pairs in ([], ["training.asd=1", f"training.asd_texts={texts}"])
    )
    assert "asd" not in dump_config(config) and "asd: 1" in dump_config(styled)
    found = {}
    for name, one in (("plain", config), ("styled", styled)):
        request = prepare_request(one, mini, FIRST, list(TASKS), None, tmp_path / name)
        found[name], _, _ = load_records(request, None)
        assert (texts.parent.name + "/texts.json" in request.files) == (name == "styled")
    assert list(found["plain"]) == list(train_records(mini.task(FIRST)))
    changed = [a.id for a, b in zip(found["plain"], found["styled"], strict=True) if a != b]
    assert len(changed) == len(found["plain"]) == 24
    assert list(found["styled"]) == list(training_records(styled, mini.task(FIRST), answers_fit(styled)))
    checkpoint = runs.train(tmp_path / "run" / FIRST, "sefe", FIRST, "training.steps=1")
    assert "asd: 0.2" in (checkpoint / "config.yaml").read_text()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_is_named_in_a_line_whoever_reads_it(
    workers: int, runs: Runs, mini: Benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its header is right, so nothing finds it before the step that needs it."""
    data = tmp_path / "data"
    shutil.copytree(mini.root, data)
    values = yaml.safe_load(runs.benchmark.read_text()) | {"root": str(data)}
    (tmp_path / "cut.yaml").write_text(yaml.safe_dump(values))
    for image in (data / TASKS[0] / "images").glob("*.png"):
        image.write_bytes(image.read_bytes()[:-40])
    with pytest.raises(SystemExit) as stop:
        settings = (f"training.workers={workers}", "training.steps=2")
        runs.train(tmp_path / "run" / TASKS[0], "lora", TASKS[0], *settings, benchmark=str(tmp_path / "cut.yaml"))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "Traceback" not in "".join(lines)
    assert lines[-1].startswith("clmoe train: ") and ".png" in lines[-1]


def test_tensorboards_curves_stay_when_the_task_is_sealed(runs: Runs, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    runs.train(tmp_path / "run" / TASKS[0], "lora", TASKS[0], "training.steps=2", "training.trackers=[tensorboard]")
    (curves,) = (tmp_path / "run" / "tensorboard").rglob("events.*")
    assert b"train/loss" in curves.read_bytes()
