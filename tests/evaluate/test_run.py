"""A run folder: cells are filled once, and again after a crash or a change that affects them; files from cells."""

import csv
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import clmoe
from clmoe.benchmarks.base import Benchmark, sampled, task_questions
from clmoe.config import Config, LocatorConfig, load_config
from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.evaluate import run as module
from clmoe.evaluate.answer import Answer, Answerer
from clmoe.evaluate.record import record_checkpoint
from clmoe.evaluate.run import (
    Cell,
    check_questions,
    check_run_order,
    check_tasks,
    fill_cells,
    summary_path,
    write_tables,
)
from clmoe.locators import make_locator
from clmoe.locators.base import Locator
from clmoe.methods.statistics import load_statistics
from clmoe.train.checkpoint import read_checkpoint
from tests.evaluate.opened import checkpoints
from tests.runs import Killed, Runs, contents, events, kill, texts
from tests.support import TASKS, save_tiny

ORDER = list(TASKS)
CONFIG = load_config("clmoe", {}, [])


class Answers:
    """Answers the first ``right`` questions of every task correctly, and remembers what it was asked.

    Questions are located as ``task``; if that is 2, every fourth as the second task and the others as the first.
    """

    def __init__(self, right: int = 3, task: int | None = 0) -> None:
        self.right, self.task = right, task
        self.asked: list[tuple[str, str, int | None, int]] = []

    def answer(
        self, questions: Sequence[Question], root: Path, limit: int, locator: str, index: int | None,
        known: dict[str, Answer], finish: Callable[[list[tuple[str, Answer]]], None],
        same: dict[tuple[str, int | None], Answer],
    ) -> list[Answer]:  # fmt: skip
        self.asked.append((questions[0].question_id.split("-")[0], locator, index, len(questions)))
        found = [int(i % 4 == 0) if self.task == 2 else self.task for i in range(len(questions))]
        texts = [q.answer if i < self.right else "?" for i, q in enumerate(questions)]
        answers = [Answer(text, 0.5, i == 0, task) for i, (text, task) in enumerate(zip(texts, found, strict=True))]
        finish([(q.question_id, answer) for q, answer in zip(questions, answers, strict=True)])
        return answers

    def locator(self, name: str) -> Locator | None:
        return None if self.task is None else make_locator(LocatorConfig(name or "prototype"), 0)


def cell(run: Path, benchmark: Benchmark, task: str = "colour", **changed: Any) -> Cell:
    """A cell of a checkpoint that has learned two tasks."""
    values = {"locator": "", "scoring": "fixed", "limit": None, "config": CONFIG, "identity": "identity"}
    return Cell(run, benchmark.task(task), **{**values, "learned": ORDER[:2], **changed})


def fill(benchmark: Benchmark, stub: Any, *cells: Cell) -> dict[str, Any]:
    """Fill these cells; returns the summary of the last one."""
    fill_cells(list(cells), benchmark, ORDER, stub)
    return summary(cells[-1])


def summary(cell: Cell) -> dict[str, Any]:
    return dict(json.loads(cell.path.read_text()))


def rows_of(cell: Cell) -> list[dict[str, Any]]:
    return [json.loads(line) for line in cell.path.with_suffix(".jsonl").read_text().splitlines()]


def changed(config: Config, section: str, **fields: Any) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


def changed_file(mini: Benchmark, folder: Path, fields: dict[str, Any]) -> Benchmark:
    """The benchmark with a test file of ``colour`` in which one row differs, and whose images do not exist."""
    rows = json.loads(mini.task("colour").test.read_text())
    rows[5].update(fields)
    (folder / "changed.json").write_text(json.dumps(rows))
    return changed_task(mini, test=folder / "changed.json", image_root=folder / "nowhere")


def changed_task(mini: Benchmark, **fields: Any) -> Benchmark:
    """The benchmark with these fields of task ``colour`` changed."""
    tasks = [dataclasses.replace(t, **fields) if t.name == "colour" else t for t in mini.tasks]
    return dataclasses.replace(mini, tasks=tuple(tasks))


def matrix(run: Path) -> list[str]:
    """The rows of the run's matrix."""
    return (run / "matrix.csv").read_text().splitlines()[1:]


def test_a_cell_holds_predictions_score_and_settings(tmp_path: Path, mini: Benchmark) -> None:
    stub = Answers(right=3)
    colour, count = (cell(tmp_path, mini, task) for task in ORDER[:2])
    assert fill(mini, stub, colour, count)["located"] == 0.0
    assert stub.asked == [("colour", "", 0, 12), ("count", "", 1, 12)]
    rows = rows_of(colour)
    assert [row["question_id"] for row in rows] == [f"colour-{i}" for i in range(24, 36)]
    assert [row["score"] for row in rows] == [1.0] * 3 + [0.0] * 9
    assert rows[0]["text"] == rows[0]["answer"] == "A"
    assert {row["task"] for row in rows} == {"colour"}
    found = summary(colour)
    assert (found["score"], found["questions"], found["redone"], found["located"]) == (25.0, 12, 1, 100.0)
    assert [event["task"] for event in events(tmp_path, "evaluated")] == ["colour", "count"]
    assert [one.settled() for one in (colour, count, cell(tmp_path, mini, locator="last"))] == [True, True, False]


def test_a_cell_is_answered_again_when_anything_that_decides_its_answers_changes(
    tmp_path: Path, mini: Benchmark
) -> None:
    """Exact answers depend on the margin but not on the batches; for others it is the other way round."""
    for exact in (False, True):
        config = changed(CONFIG, "evaluation", exact=exact)
        fill(mini, Answers(), cell(tmp_path, mini, config=config))
        for section, field, value, decides in (
            ("evaluation", "margin", 0.5, exact),
            ("evaluation", "batch_size", 3, not exact),
            ("evaluation", "share_images", False, not exact),
            ("evaluation", "exact", not exact, True),
            ("model", "dtype", "bfloat16", True),
            ("model", "load_in_4bit", True, True),
        ):
            other = changed(config, section, **{field: value})
            assert cell(tmp_path, mini, config=other).settled() != decides, field
    beta = dataclasses.replace(CONFIG, options={**CONFIG.options, "beta": 1.0})
    assert not cell(tmp_path, mini, config=beta).settled()
    for fields in ({"suffix": " Answer in one word."}, {"max_new_tokens": 99}):
        assert not cell(tmp_path, changed_task(mini, **fields)).settled()
    for row in ({"text": "What colour?"}, {"image": "0.png"}, {"question_id": "new"}):
        assert not cell(tmp_path, changed_file(mini, tmp_path, row)).settled()
    assert not cell(tmp_path, mini, limit=4).settled()
    fitted = changed(CONFIG, "locator", name="nearest_mean")
    fill(mini, Answers(), cell(tmp_path, mini, locator="nearest_mean", config=fitted))
    fewer = changed(fitted, "locator", samples=5)
    assert [cell(tmp_path, mini, locator="nearest_mean", config=c).settled() for c in (fitted, fewer)] == [True, False]
    assert cell(tmp_path, mini, config=dataclasses.replace(CONFIG, label="a nicer name")).settled()
    assert cell(tmp_path, changed_file(mini, tmp_path, {})).settled(), "the same questions elsewhere, without images"
    other = cell(tmp_path, mini, identity="other")
    assert not other.settled()
    assert fill(mini, Answers(right=6), other)["score"] == 50.0


def test_kept_answers_are_scored_again_without_a_model(tmp_path: Path, mini: Benchmark) -> None:
    run = tmp_path / "run"
    fill(mini, Answers(right=3), cell(run, mini))
    before = contents(run)
    words = changed_task(mini, scorer="short_answer")
    corrected = changed_file(words, tmp_path, {"answer": "?"})  # what the stub answered here
    for benchmark, mode, scorer, right in (
        (mini, "official", "option_letter", 3),
        (words, "fixed", "short_answer", 3),
        (corrected, "fixed", "short_answer", 4),
    ):
        again = cell(run, benchmark, scoring=mode)
        assert again.settled()
        assert (summary(again)["settings"]["scoring"], summary(again)["settings"]["scorer"]) == (mode, scorer)
        assert summary(again)["score"] == pytest.approx(100 * right / 12)
    assert cell(run, mini).settled()
    assert contents(run) == before, "scored as before, the same bytes"
    answers = cell(run, mini).path.with_suffix(".jsonl")
    text = answers.read_text()
    for damaged in ("", text.partition("\n")[2], text[5:]):  # not the answers to these questions
        answers.write_text(damaged)
        assert not cell(run, mini, scoring="official").settled()


def test_a_crash_before_or_after_the_summary_leaves_an_empty_or_a_clean_cell(
    tmp_path: Path, mini: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash before it leaves another checkpoint's answers; after it, hidden files, which the next look removes."""
    one = cell(tmp_path, mini)
    for step, settled in (("_remove_hidden_files", True), ("write_json", False)):
        with monkeypatch.context() as patch:
            patch.setattr(Cell if settled else module, step, kill)
            with pytest.raises(Killed):
                fill(mini, Answers(), one if settled else dataclasses.replace(one, identity="other"))
        assert list(one.path.parent.glob(".*"))
        assert dataclasses.replace(one, scoring="fixed" if settled else "official").settled() == settled
        assert bool(list(one.path.parent.glob(".*"))) != settled


def test_a_lost_answer_is_an_error_and_not_a_smaller_denominator(tmp_path: Path, mini: Benchmark) -> None:
    class Loses(Answers):
        def answer(self, *args: Any) -> list[Answer]:
            return super().answer(*args)[:-1]

    with pytest.raises(ValueError, match="shorter"):
        fill(mini, Loses(), cell(tmp_path, mini))
    assert not cell(tmp_path, mini).path.exists()


def test_what_cannot_be_scored_is_found_before_the_first_question_is_asked(tmp_path: Path, mini: Benchmark) -> None:
    def bad(answer: str) -> Benchmark:
        benchmark = changed_file(mini, tmp_path, {"answer": answer})
        return changed_task(benchmark, image_root=mini.task("colour").image_root)

    stub, named = Answers(), r"changed\.json: question colour-29: field 'answer' is 'AB'"
    with pytest.raises(ClmoeError, match=named):
        fill(bad("AB"), stub, cell(tmp_path, mini, "count"), cell(tmp_path, bad("AB")))
    with pytest.raises(ClmoeError, match=named):
        check_questions(changed_task(bad("AB"), image_root=tmp_path), ["count", "colour"])
    assert stub.asked == []
    # a question that no answer gets right is still asked and counted: published test files hold some
    full_stop = changed_task(bad("."), scorer="short_answer")
    check_questions(full_stop, ORDER)
    assert fill(full_stop, stub, cell(tmp_path, full_stop))["score"] == 25.0
    check_tasks(mini, ORDER)
    with pytest.raises(ClmoeError, match="'colour'"):
        check_tasks(mini, ["color"])


def test_what_the_locator_said_is_counted(tmp_path: Path, mini: Benchmark) -> None:
    """The matrix shows another locator's cells only where there are none of the checkpoint's own."""
    fill(mini, Answers(right=6, task=None), *(cell(tmp_path, mini, task, locator="last") for task in ORDER[:2]))
    write_tables(tmp_path, ORDER, "last")
    assert matrix(tmp_path) == ["count,50.0,50.0,"]
    assert not (tmp_path / "locator.csv").exists()
    fill(mini, Answers(task=2), cell(tmp_path, mini, "count"), cell(tmp_path, mini))
    fill(mini, Answers(task=1), cell(tmp_path, mini, "count", locator="oracle"))
    write_tables(tmp_path, ORDER, "last")
    assert (tmp_path / "locator.csv").read_text().splitlines() == [
        "after,locator,task,located,count",
        "count,prototype,colour,colour,9",
        "count,prototype,colour,count,3",
        "count,prototype,count,colour,9",
        "count,prototype,count,count,3",
    ]
    assert matrix(tmp_path) == ["count,25.0,25.0,"]


def test_matrix_immediate_and_metrics(tmp_path: Path, mini: Benchmark) -> None:
    right = {  # right answers of 12
        "zero_shot": {"colour": 3, "count": 0, "side": 6},
        "colour": {"colour": 12, "colour.oracle": 12},
        "count": {"colour": 6, "count": 9, "count.oracle": 12},
        "side": {"colour": 3, "count": 6, "side": 12, "side.oracle": 12},
    }
    for row, (after, numbers) in enumerate(right.items()):
        for stem, number in numbers.items():
            task, _, locator = stem.partition(".")
            one = cell(tmp_path, mini, task, locator=locator, learned=ORDER[:row], identity=after)
            fill(mini, Answers(number, task=None), one)
    write_tables(tmp_path, ORDER)
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert matrix(tmp_path) == [
        "zero_shot,25.0,0.0,50.0", "colour,100.0,,", "count,50.0,75.0,", "side,25.0,50.0,100.0",
    ]  # fmt: skip
    assert (tmp_path / "immediate.csv").read_text().splitlines()[1] == "immediate,100.0,100.0,100.0"
    assert (result["bwt_n"], result["bwt_known"]) == pytest.approx((-100 / 3, 175 / 3 - 100))
    assert cell(tmp_path, mini, scoring="official", learned=ORDER[:1], identity="colour").settled()
    write_tables(tmp_path, ORDER, scoring="official")
    assert matrix(tmp_path) == ["colour,100.0,,"], "the other cells are in the other mode still"
    assert not (tmp_path / "immediate.csv").exists()
    assert cell(tmp_path, mini, learned=ORDER[:1], identity="colour").settled()
    write_tables(tmp_path, ORDER[::-1])
    assert matrix(tmp_path)[:2] == ["zero_shot,50.0,0.0,25.0", "side,100.0,50.0,25.0"]


def test_a_limit_asks_a_sample_except_in_the_last_row(runs: Runs, tmp_path: Path, mini: Benchmark) -> None:
    first, second = ORDER[:2]
    for done in runs.chain("lora"):
        runs.evaluate(done, tmp_path, "evaluation.limit=3", order=f"{first},{second}")
    cells = ((first, first), (second, first), (second, second))
    asked = [summary_path(tmp_path, *cell).with_suffix(".jsonl").read_text().splitlines() for cell in cells]
    assert [len(rows) for rows in asked] == [3, 12, 12]
    wanted = sampled(task_questions(mini.task(first)), 3)
    assert [json.loads(row)["question_id"] for row in asked[0]] == [question.question_id for question in wanted]
    right = [row["text"] == row["answer"] for row in map(json.loads, asked[2])]  # the rule is equality here
    assert float(matrix(tmp_path)[1].split(",")[2]) == 100 * sum(right) / 12 and 0 < sum(right) < 12


def test_an_adapter_is_not_evaluated_on_other_weights(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other weights replace, in the same folder, those that the adapter was trained on."""
    own = Runs(tmp_path, save_tiny(tmp_path / "model"), runs.benchmark)
    checkpoint = own.train(tmp_path / "run" / TASKS[0], "lora", TASKS[0], "training.steps=1")
    save_tiny(own.model, seed=1)
    with pytest.raises(SystemExit):
        own.evaluate(checkpoint, tmp_path / "run")
    assert f"a different base from {own.model}" in capsys.readouterr().err
    with pytest.raises(ClmoeError, match="a different base"):
        clmoe.load(checkpoint)
    assert clmoe.load(checkpoint, model=str(runs.model)).learned == [TASKS[0]]


def test_the_bare_models_row_leaves_a_training_runs_file_as_it_is(runs: Runs, tmp_path: Path) -> None:
    found = []
    for checkpoint, settings in (("base", []), (runs.chain("lora")[1], ["evaluation.limit=5"]), ("base", [])):
        options = {"model": str(runs.model)} if checkpoint == "base" else {}
        runs.evaluate(checkpoint, tmp_path, *settings, **options)
        info = json.loads((tmp_path / "run.json").read_text())
        found.append((info["method"], info["limit"], info["locator"]))
    assert found == [("zero_shot", None, ""), ("lora", 5, ""), ("lora", 5, "")]
    assert [line.split(",")[0] for line in matrix(tmp_path)] == ["zero_shot", "count"]


def test_another_locator_leaves_what_a_run_says_of_itself(runs: Runs, tmp_path: Path) -> None:
    """The other locator's cells lie next to the run's own; without those, ``run.json`` describes the other locator."""
    first, found = runs.chain("clmoe")[0], []
    for settings in ([], ["locator=oracle", "evaluation.limit=3"]):
        runs.evaluate(first, tmp_path / "run", *settings)
        found.append((tmp_path / "run" / "run.json").read_bytes())
    assert found[0] == found[1]
    alone = json.loads((runs.evaluate(first, tmp_path / "alone", *settings) / "run.json").read_text())
    assert (alone["locator"], alone["limit"]) == ("oracle", 3)


def test_a_folder_holds_one_order(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = runs.chain("lora")[0]
    run = runs.evaluate(first, tmp_path / "run", order="colour,count")
    before = contents(run)
    for checkpoint, options in (
        (first, {"order": "colour,side"}),
        ("base", {"order": "rev", "model": str(runs.model)}),
    ):
        with pytest.raises(SystemExit):
            runs.evaluate(checkpoint, run, **options)
        assert f"{run} holds a run in the order colour, count" in capsys.readouterr().err
        assert contents(run) == before
    for longer_or_shorter in ("colour", "colour,count", "colour,count,side"):
        check_run_order(run, longer_or_shorter.split(","))


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("llava_cmoe", ["expansion.json", "parameters.csv"]),
        ("clmoe", ["parameters.csv", "usage.csv"]),
        ("lora", ["parameters.csv"]),
    ],
)
def test_what_a_report_needs_of_checkpoints_stands_in_the_runs_order_and_stays(
    method: str, names: list[str], runs: Runs, tmp_path: Path
) -> None:
    done = [read_checkpoint(folder) for folder in checkpoints(runs, method)]
    for finished in reversed(done):  # an older checkpoint must not shorten a file
        record_checkpoint(tmp_path, finished, ORDER)
    before = contents(tmp_path)
    assert list(before) == names
    assert (tmp_path / "parameters.csv").read_text().splitlines()[1:] == [
        f"{d.lineage.tasks[-1]},{d.lineage.trainable_parameters},{d.lineage.adapter_parameters}" for d in done
    ]
    if method == "llava_cmoe":
        plan = json.loads((done[1].folder / "expansion.json").read_text())
        assert json.loads((tmp_path / "expansion.json").read_text()) == plan
        assert [entry["task"] for entry in plan] == ORDER[:2]
    if method == "clmoe":
        history = zip(ORDER, load_statistics(done[1].folder / "statistics.safetensors"), strict=False)
        gates = {(task, name): values["gate_mean"] for task, blocks in history for name, values in blocks.items()}
        rows = list(csv.DictReader((tmp_path / "usage.csv").read_text().splitlines()))
        found = {(row["task"], row["block"], row["expert"]): float(row["share"]) for row in rows}
        shares = {(*key, str(i)): float(share) for key, values in gates.items() for i, share in enumerate(values)}
        assert found == pytest.approx(shares, abs=1e-6)
        assert list(dict.fromkeys(row["task"] for row in rows)) == ORDER[:2]
    record_checkpoint(tmp_path, done[0], ORDER)
    assert contents(tmp_path) == before


# An interrupted cell continues and ends in the same bytes

SMALL = ("evaluation.batch_size=5",)  # 12 questions: three batches


def finished(run: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(run).items() if name not in ("events.jsonl", "timing.json")}


def die_at(patch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Die in the ``number``-th generation of a full batch from now (from 0); the list grows by the size of each one."""
    real, sizes = Answerer.generate, []

    def generate(self: Answerer, items: list[Any], *args: Any, **kwargs: Any) -> Any:
        if len(items) > 1:
            if len(sizes) == number:
                raise Killed
            sizes.append(len(items))
        return real(self, items, *args, **kwargs)

    patch.setattr(Answerer, "generate", generate)
    return sizes


@pytest.mark.parametrize(
    ("cut", "overrides", "computed"),
    [
        (0, [], [2]),  # the last batch of the own locator's cell; the oracle's cell finds the same tasks
        (9, [], [5, 2]),  # the file's last line is torn, so its batch is answered again
        (0, ["options.beta=0.25"], [5, 5, 2]),  # answers under another setting are not used
    ],
)
def test_only_what_is_missing_is_answered(
    cut: int, overrides: list[str], computed: list[int], runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = runs.chain("clmoe")[0]
    straight = runs.evaluate(checkpoint, runs.root / "straight-evaluation", *SMALL)
    assert texts(straight, TASKS[0], TASKS[0])
    with monkeypatch.context() as patch:
        die_at(patch, 2)
        with pytest.raises(Killed):
            runs.evaluate(checkpoint, tmp_path, *SMALL, *overrides)
    (partial,) = (tmp_path / "predictions" / TASKS[0]).glob(".*partial-*")
    partial.write_bytes(partial.read_bytes()[: -cut or None])
    sizes = die_at(monkeypatch, -1)
    runs.evaluate(checkpoint, tmp_path, *SMALL)
    assert sizes == computed
    assert finished(tmp_path) == finished(straight)
    monkeypatch.setattr(module, "open_answerer", kill)  # from here on no model is loaded
    runs.evaluate(checkpoint, tmp_path, *SMALL, scoring="official")
    assert json.loads((tmp_path / "run.json").read_text())["scoring"] == "official"


def test_answers_of_all_processes_are_kept_for_the_same_questions(
    tmp_path: Path, mini: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[set[str]] = []

    class Dies(Answers):
        """Dies after the answer to question ``rank``."""

        def answer(self, questions: Sequence[Question], *rest: Any) -> list[Answer]:
            kept.append(set(rest[4]))
            question = questions[module.rank()]
            rest[5]([(question.question_id, Answer("A", 0.5, False, 0))])
            raise Killed

    for rank, changed in ((0, {}), (1, {}), (0, {}), (0, {"locator": "oracle"}), (0, {"limit": 5})):
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        with pytest.raises(Killed):
            fill(mini, Dies(), cell(tmp_path, mini, **changed))
    assert kept == [set(), {"colour-24"}, {"colour-24", "colour-25"}, set(), set()]
