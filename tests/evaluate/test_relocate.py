"""`clmoe matrix`: trying other locators on a finished run trains nothing and answers only what moved."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import clmoe
from clmoe import cli
from clmoe.evaluate import relocate as module
from clmoe.evaluate.answer import Answerer
from clmoe.evaluate.relocate import Cost, Found
from clmoe.report.locators import confusion_frame, score_table, scores_frame, task_table
from tests.runs import Runs, contents, kill
from tests.support import TASKS, TEST_ROWS, load_script

SETTINGS = ("adapter.train_projector=false", "evaluation.margin=0", "evaluation.limit=8")
LOCATORS = ("last", "text_centroid", "random", "knn", "oracle")


@pytest.fixture(scope="module")
def folder(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`separate` on all tasks, with the oracle, and its matrix of `LOCATORS`; `asked` counts what that answered."""
    folder = tmp_path_factory.mktemp("matrix")
    clmoe.run(
        "separate", runs.benchmark, output=folder / "separate-seed0", base=str(runs.model), settings=list(SETTINGS)
    )
    own = {name: content.hex() for name, content in contents(folder).items() if "predictions" in name}
    (folder / "own.json").write_text(json.dumps(own))
    real, asked = Answerer.generate, list[int]()

    def generate(self: Answerer, items: list[Any], *args: Any, **kwargs: Any) -> Any:
        asked.append(len(items))
        return real(self, items, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answerer, "generate", generate)
        matrix(runs, folder, ",".join(LOCATORS))
    (folder / "asked").write_text(str(sum(asked)))
    return folder


def matrix(runs: Runs, folder: Path, locators: str, *more: str, methods: str = "separate") -> None:
    where = ["--runs", str(folder), "--locators", locators, *more]
    cli.main(["matrix", str(runs.benchmark), "--methods", methods, *where])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def answers(run: Path, after: str, cell: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions" / after / f"{cell}.jsonl").read_text().splitlines()]


def ending(locator: str) -> str:
    return "" if locator == "oracle" else f".{locator}"


@pytest.mark.slow
@pytest.mark.parametrize("locator", LOCATORS)
def test_it_gives_the_answers_of_an_evaluation_of_its_own(
    locator: str, folder: Path, runs: Runs, tmp_path: Path
) -> None:
    """Oracle: `clmoe eval` in a folder that holds no answers to reuse."""
    run = folder / "separate-seed0"
    fresh = runs.evaluate(run / f"03_{TASKS[2]}", tmp_path, locator=locator)
    located, right = 0, list[float]()
    for task in TASKS:
        name = f"{task}{ending(locator)}"
        found, expected = answers(run, TASKS[2], name), answers(fresh, TASKS[2], name)
        assert [(row["text"], row["task"]) for row in found] == [(row["text"], row["task"]) for row in expected]
        located += sum(row["task"] == task for row in found)
        right.append(json.loads((fresh / "predictions" / TASKS[2] / f"{name}.json").read_text())["score"])
    (row,) = [row for row in rows(folder / "matrix" / "matrix.csv") if row["locator"] == locator]
    assert float(row["located"]) == pytest.approx(100 * located / (3 * TEST_ROWS))
    assert float(row["last"]) == pytest.approx(sum(right) / 3)
    confused = Counter(row["task"] for row in answers(run, TASKS[2], f"{TASKS[0]}{ending(locator)}"))
    stored = {
        row["located"]: int(row["count"])
        for row in rows(folder / "matrix" / "confusion.csv")
        if (row["locator"], row["task"]) == (locator, TASKS[0])
    }
    assert {task: count for task, count in stored.items() if count} == confused


@pytest.mark.slow
def test_only_questions_that_moved_to_a_task_are_answered(folder: Path) -> None:
    """Oracle: count all answers, one for each checkpoint, question and task, except those of the run itself."""
    run = folder / "separate-seed0"
    seen: set[tuple[str, str, str]] = set()
    for after in TASKS:
        for task in TASKS if after == TASKS[-1] else (after,):
            own = {(after, row["question_id"], row["task"]) for row in answers(run, after, task)}
            for locator in LOCATORS:
                cell = answers(run, after, f"{task}{ending(locator)}")
                seen |= {(after, row["question_id"], row["task"]) for row in cell} - own
    assert int((folder / "asked").read_text()) == len(seen) > 2 * TEST_ROWS
    before = json.loads((folder / "own.json").read_text())
    assert {name: content.hex() for name, content in contents(folder).items() if name in before} == before


@pytest.mark.slow
def test_a_second_time_loads_no_model(folder: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_answerer", kill)
    before = rows(folder / "matrix" / "matrix.csv")
    matrix(runs, folder, "knn,oracle", "--output", str(folder / "again"))
    again = rows(folder / "again" / "matrix.csv")
    assert again == [row for name in ("knn", "oracle") for row in before if row["locator"] == name]
    knn, oracle = again
    assert int(oracle["bytes"]) == 0 < int(knn["bytes"])
    assert {path.name for path in (folder / "again").iterdir()} == {
        "matrix.md", "matrix.csv", "confusion.csv", "matrix.png", "matrix.svg",
    }  # fmt: skip


@pytest.mark.slow
def test_a_locator_that_another_run_was_trained_with_is_taken_from_it(
    folder: Path, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The locator comes from the other run with that run's settings, and nothing is fitted."""
    runs.copy(folder / "separate-seed0", tmp_path / "separate-seed0")
    settings = [*SETTINGS, "training.steps=1", "locator=prototype", "locator.samples=7"]
    clmoe.run("disco", runs.benchmark, output=tmp_path / "disco-seed0", base=str(runs.model), settings=settings)
    monkeypatch.setattr(module, "fit_tasks", kill)
    matrix(runs, tmp_path, "prototype", methods="separate,disco")
    separate, disco = rows(tmp_path / "matrix" / "matrix.csv")
    assert separate["located"] == disco["located"]
    name = f"{TASKS[0]}.prototype.json"
    (made,) = (tmp_path / "separate-seed0" / "predictions" / TASKS[2]).glob(name)
    assert json.loads(made.read_text())["settings"]["locator"]["samples"] == 7


@pytest.mark.slow
def test_what_has_no_cell_is_one_error_before_any_work(
    folder: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "open_answerer", kill)
    for locators, more, named in (
        ("generated_letter", (), "generated_letter"),
        ("nearest", (), "nearest"),
        ("knn", ("--seeds", "7"), "separate-seed7"),
    ):
        with pytest.raises(SystemExit):
            matrix(runs, folder, locators, *more)
        assert named in capsys.readouterr().err


def found(locator: str, last: float, right: int) -> Found:
    metrics = dict.fromkeys(("last", "immediate", "bwt_n", "bwt_n_minus_1"), last)
    confusion = {"a": Counter({"a": right, "b": 4 - right}), "b": Counter({"b": 4})}
    return Found(locator, metrics, confusion, Cost(10, 80, 1.0, 0.5))


def test_tables_show_mean_and_deviation_over_seeds_and_a_blank_where_nothing_was_measured() -> None:
    results = {
        ("m", 0): [found("knn", 50.0, 2), found("last", 10.0, 0)],
        ("m", 1): [found("knn", 54.0, 4), found("last", 10.0, 0)],
        ("n", 0): [found("knn", 70.0, 3)],
    }
    scores, confusion = scores_frame(results), confusion_frame(results)
    assert score_table(scores, "last").cells.to_numpy().tolist() == [
        ["m", "52.00 ± 2.83", "10.00 ± 0.00"], ["n", "70.00", "–"],
    ]  # fmt: skip
    assert score_table(scores, "located").cells.to_numpy().tolist()[1] == ["n", "87.50", "–"]
    assert task_table(confusion).cells.to_numpy().tolist() == [
        ["m", "knn", "75.00", "100.00"], ["m", "last", "0.00", "100.00"], ["n", "knn", "75.00", "100.00"],
    ]  # fmt: skip


@pytest.mark.slow
def test_what_grows_with_the_number_of_tasks(folder: Path, runs: Runs) -> None:
    """The oracle looks at nothing, so each task adds exactly one LoRA; bytes are those of the checkpoint's files."""
    run = folder / "separate-seed0"
    grown = load_script("bench/growth").grown(run, str(runs.benchmark))
    assert [(row["tasks"], row["task"]) for row in grown] == list(enumerate(TASKS, 1))
    assert len({row["trained"] for row in grown}) == 1
    assert [row["kept"] for row in grown] == [row["trained"] * row["tasks"] for row in grown]
    for row, checkpoint in zip(grown, sorted(run.glob("0*_*")), strict=True):
        files = [file for file in checkpoint.iterdir() if file.is_file() and file.name != "manifest.json"]
        assert row["bytes"] == sum(file.stat().st_size for file in files)
    assert all(row["minutes"] > 0 for row in grown)
