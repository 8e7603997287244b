"""Cells of a run folder: filled once, filled again when anything that decides them changes; tables from cells."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from clmoe.evaluate.evaluation import Checkpoint, Request, unanswered
from clmoe.evaluate.partial import PartialAnswers

import clmoe
from clmoe.benchmarks.base import Benchmark, sampled, task_questions
from clmoe.cli import evaluate
from clmoe.config import load_config
from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.evaluate.generate import Answer
from clmoe.evaluate.run import check_tasks, summary_path, write_tables
from tests.runs import Runs, contents, events
from tests.support import TASKS, save_tiny

ORDER = list(TASKS)


class Answers:
    """Answers the first ``right`` questions of every task correctly, and remembers what it was asked."""

    def __init__(self, right: int = 3, task: int | None = 0) -> None:
        self.right, self.task = right, task
        self.asked: list[tuple[str, str, int | None, int]] = []

    def answer(
        self,
        questions: Sequence[Question],
        root: Path,
        limit: int,
        router: str,
        index: int | None,
        advance: Callable,
        partial: PartialAnswers,
    ) -> list[Answer]:
        self.asked.append((questions[0].question_id.split("-")[0], router, index, len(questions)))
        advance(len(questions))
        texts = [q.answer if i < self.right else "?" for i, q in enumerate(questions)]
        return [Answer(text, 0.5, i == 0, self.task, self.found(i)) for i, text in enumerate(texts)]

    def found(self, row: int) -> dict[str, int]:
        """The second decider says the second task for every fourth question."""
        return {} if self.task is None else {"vae": self.task, "prototype": int(row % 4 == 0)}


@pytest.fixture
def checkpoint() -> Checkpoint:
    config = load_config("clmoe", {}, [])
    return Checkpoint(Path("somewhere"), "identity", TASKS[1], ORDER[:2], config, "base")


def requests(*tasks: str, **settings: Any) -> list[Request]:
    values = {"router": "located", "scoring": "fixed", "limit": None, **settings}
    return [Request(task, **values) for task in tasks]


def test_a_cell_holds_predictions_score_and_settings(tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint) -> None:
    stub = Answers(right=3)
    evaluate(tmp_path, mini, checkpoint, requests(*ORDER[:2]), stub)  # type: ignore[arg-type]
    assert stub.asked == [("colour", "located", 0, 12), ("count", "located", 1, 12)]
    folder = tmp_path / "predictions" / TASKS[1]
    rows = [json.loads(line) for line in (folder / "colour.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [f"colour-{i}" for i in range(24, 36)]
    assert [row["score"] for row in rows] == [1.0] * 3 + [0.0] * 9
    assert rows[0]["text"] == rows[0]["answer"] == "A"
    assert {row["task"] for row in rows} == {"colour"}
    summary = json.loads((folder / "colour.json").read_text())
    assert (summary["score"], summary["questions"], summary["redone"], summary["located"]) == (25.0, 12, 1, 100.0)
    assert json.loads((folder / "count.json").read_text())["located"] == 0.0
    assert [event["task"] for event in events(tmp_path, "evaluated")] == ["colour", "count"]


def test_what_each_decider_said_is_counted(tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint) -> None:
    evaluate(tmp_path, mini, checkpoint, requests("count", "colour"), Answers())  # type: ignore[arg-type]
    write_tables(tmp_path, ORDER)
    assert (tmp_path / "locator.csv").read_text().splitlines() == [
        "after,decider,task,located,count",
        "count,prototype,colour,colour,9",
        "count,prototype,colour,count,3",
        "count,vae,colour,colour,12",
        "count,prototype,count,colour,9",
        "count,prototype,count,count,3",
        "count,vae,count,colour,12",
    ]


def test_a_method_that_locates_nothing_has_no_such_table(
    tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint
) -> None:
    evaluate(tmp_path, mini, checkpoint, requests("colour"), Answers(task=None))  # type: ignore[arg-type]
    write_tables(tmp_path, ORDER)
    assert not (tmp_path / "locator.csv").exists()


def test_the_matrix_is_the_default_routers_or_the_only_ones(
    tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint
) -> None:
    cells = requests("colour", "count", router="last")
    evaluate(tmp_path, mini, checkpoint, cells, Answers(right=6))  # type: ignore[arg-type]
    write_tables(tmp_path, ORDER, "last")
    assert (tmp_path / "matrix.csv").read_text() == "after,colour,count,side\ncount,50.0,50.0,\n"
    evaluate(tmp_path, mini, checkpoint, requests("count"), Answers(right=3))  # type: ignore[arg-type]
    write_tables(tmp_path, ORDER, "last")
    assert (tmp_path / "matrix.csv").read_text() == "after,colour,count,side\ncount,,25.0,\n"


def test_filled_cells_are_skipped(tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint) -> None:
    evaluate(tmp_path, mini, checkpoint, requests("colour"), Answers())  # type: ignore[arg-type]
    asked = requests("colour", "count")
    assert unanswered(tmp_path, mini, checkpoint, asked) == asked[1:]


def changed_file(mini: Benchmark, folder: Path, fields: dict[str, Any]) -> Benchmark:
    """The benchmark with a test file of ``colour`` in which one row differs, and whose images are nowhere."""
    rows = json.loads(mini.task("colour").test.read_text())
    rows[5].update(fields)
    (folder / "changed.json").write_text(json.dumps(rows))
    return changed_task(mini, test=folder / "changed.json", image_root=folder / "nowhere")


def changed_task(mini: Benchmark, **fields: Any) -> Benchmark:
    """The benchmark with other fields of task ``colour``."""
    tasks = [dataclasses.replace(t, **fields) if t.name == "colour" else t for t in mini.tasks]
    return dataclasses.replace(mini, tasks=tuple(tasks))


def test_a_cell_is_answered_again_when_anything_that_decides_its_answers_changes(
    tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint
) -> None:
    asked = requests("colour")
    evaluate(tmp_path, mini, checkpoint, asked, Answers())  # type: ignore[arg-type]
    config = checkpoint.config
    inexact = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, exact=False))
    beta = dataclasses.replace(config, options={**config.options, "beta": 1.0})
    half = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, load_in_4bit=True))
    for other in (
        dataclasses.replace(checkpoint, identity="other"),
        *(dataclasses.replace(checkpoint, config=changed) for changed in (inexact, beta, half, small)),
    ):
        assert unanswered(tmp_path, mini, other, asked) == asked
    for fields in ({"suffix": " Answer in one word."}, {"max_new_tokens": 99}):
        assert unanswered(tmp_path, changed_task(mini, **fields), checkpoint, asked) == asked
    for fields in ({"text": "What colour?"}, {"image": "0.png"}, {"question_id": "new"}):
        other_file = changed_file(mini, tmp_path, fields)
        assert unanswered(tmp_path, other_file, checkpoint, asked) == asked
    fewer = requests("colour", limit=4)
    assert unanswered(tmp_path, mini, checkpoint, fewer) == fewer
    relabelled = dataclasses.replace(checkpoint, config=dataclasses.replace(config, label="a nicer name"))
    assert unanswered(tmp_path, mini, relabelled, asked) == [], "a label decides nothing"
    same = changed_file(mini, tmp_path, {})
    assert unanswered(tmp_path, same, checkpoint, asked) == [], "the same questions elsewhere, without their images"

    stub = Answers(right=6)
    again = dataclasses.replace(checkpoint, identity="other")
    evaluate(tmp_path, mini, again, asked, stub)  # type: ignore[arg-type]
    assert len(stub.asked) == 1
    assert cell(tmp_path)["score"] == 50.0


def cell(run: Path) -> dict[str, Any]:
    """The summary of task ``colour``."""
    return dict(json.loads(summary_path(run, TASKS[1], "colour").read_text()))


def test_kept_answers_are_scored_again_without_a_model(tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint) -> None:
    run, fixed = tmp_path / "run", requests("colour")
    evaluate(run, mini, checkpoint, fixed, Answers(right=3))  # type: ignore[arg-type]
    before = contents(run)
    words = changed_task(mini, scorer="short_answer")
    corrected = changed_file(words, tmp_path, {"answer": "?"})  # what the stub said to this one
    for benchmark, asked, settings, right in (
        (mini, requests("colour", scoring="official"), ("official", "option_letter"), 3),
        (words, fixed, ("fixed", "short_answer"), 3),
        (corrected, fixed, ("fixed", "short_answer"), 4),
    ):
        assert unanswered(run, benchmark, checkpoint, asked) == []
        summary = cell(run)
        assert (summary["settings"]["scoring"], summary["settings"]["scorer"]) == settings
        assert summary["score"] == pytest.approx(100 * right / 12)
    assert unanswered(run, mini, checkpoint, fixed) == []
    assert contents(run) == before, "scored as before, the same bytes"


def test_a_crash_between_new_answers_and_their_summary_leaves_the_cell_empty(
    tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(tmp_path, mini, checkpoint, requests("colour"), Answers(right=3))  # type: ignore[arg-type]

    def crash(*unused: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("clmoe.evaluate.evaluation.write_json", crash)
        other = dataclasses.replace(checkpoint, identity="other")
        with pytest.raises(KeyboardInterrupt):
            evaluate(tmp_path, mini, other, requests("colour"), Answers(right=9))  # type: ignore[arg-type]
    official = requests("colour", scoring="official")
    assert unanswered(tmp_path, mini, checkpoint, official) == official, "the other checkpoint's answers lie there"


@pytest.mark.parametrize("damage", [lambda text: "", lambda text: text.partition("\n")[2], lambda text: text[5:]])
def test_answers_that_are_not_those_of_the_questions_are_made_again(
    damage: Callable[[str], str], tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint
) -> None:
    evaluate(tmp_path, mini, checkpoint, requests("colour"), Answers())  # type: ignore[arg-type]
    path = summary_path(tmp_path, TASKS[1], "colour").with_suffix(".jsonl")
    path.write_text(damage(path.read_text()))
    official = requests("colour", scoring="official")
    assert unanswered(tmp_path, mini, checkpoint, official) == official


@pytest.mark.parametrize(
    ("exact", "field", "value", "redone"),
    [
        (True, "margin", 0.5, True),
        (True, "batch_size", 3, False),
        (True, "share_images", False, False),
        (False, "margin", 0.5, False),
        (False, "batch_size", 3, True),
        (False, "share_images", False, True),
    ],
)
def test_a_cell_is_redone_for_what_can_change_its_answers(
    exact: bool, field: str, value: Any, redone: bool, tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint
) -> None:
    """Exact answers depend on the margin and not on how questions are batched; others the other way round."""

    def asked(**fields: Any) -> int:
        stub, config = Answers(), checkpoint.config
        evaluation = dataclasses.replace(config.evaluation, exact=exact, **fields)
        place = dataclasses.replace(checkpoint, config=dataclasses.replace(config, evaluation=evaluation))
        missing = unanswered(tmp_path, mini, place, requests("colour"))
        evaluate(tmp_path, mini, place, missing, stub)  # type: ignore[arg-type]
        return len(stub.asked)

    assert (asked(), asked()) == (1, 0)
    assert asked(**{field: value}) == redone


def test_a_limit_asks_a_sample_of_the_questions(tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint) -> None:
    stub = Answers(right=1)
    evaluate(tmp_path, mini, checkpoint, requests("colour", limit=4), stub)  # type: ignore[arg-type]
    assert stub.asked == [("colour", "located", 0, 4)]
    rows = (tmp_path / "predictions" / TASKS[1] / "colour.jsonl").read_text().splitlines()
    asked = [json.loads(row)["question_id"] for row in rows]
    assert asked == [q.question_id for q in sampled(task_questions(mini.task("colour")), 4)]
    assert write_tables(tmp_path, ORDER)["last"] is None
    assert (tmp_path / "matrix.csv").read_text() == "after,colour,count,side\ncount,25.0,,\n"


def test_a_crash_leaves_the_cell_empty(tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint) -> None:
    class Crash(Answers):
        def answer(self, *args: Any, **kwargs: Any) -> list[Answer]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, mini, checkpoint, requests("colour"), Crash())  # type: ignore[arg-type]
    assert not summary_path(tmp_path, TASKS[1], "colour").exists()
    assert events(tmp_path, "evaluated") == []


def test_what_cannot_be_scored_is_found_before_the_first_question_is_asked(
    tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint
) -> None:
    bad = changed_file(mini, tmp_path, {"answer": "AB"})
    bad = changed_task(bad, image_root=mini.task("colour").image_root)
    stub = Answers()
    with pytest.raises(ClmoeError, match=r"changed\.json: question colour-29: field 'answer' is 'AB'"):
        evaluate(tmp_path / "run", bad, checkpoint, requests("count", "colour"), stub)  # type: ignore[arg-type]
    assert stub.asked == []
    # a question that no answer gets right is asked and counted: published test files hold some
    full_stop = changed_task(bad, scorer="short_answer")
    changed_file(mini, tmp_path, {"answer": "."})
    evaluate(tmp_path / "run", full_stop, checkpoint, requests("colour"), stub)  # type: ignore[arg-type]
    assert cell(tmp_path / "run")["score"] == 25.0


def test_a_sequence_with_a_test_file_that_cannot_be_scored_is_not_begun(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(runs.benchmark.read_text())
    rows = json.loads((Path(values["root"]) / "side/test.json").read_text())
    rows[3]["answer"] = ["left", None]
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    values["tasks"][2]["test"] = str(tmp_path / "bad.json")
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit):
        runs.train(tmp_path / "run/01", "lora", "colour", benchmark=str(tmp_path / "mini.yaml"), then_eval="")
    error = capsys.readouterr().err
    assert f"{tmp_path / 'bad.json'}: row 3 (from 0), id 'side-27', field 'answer[1]'" in error
    assert not (tmp_path / "run").exists()


def test_a_lost_answer_is_an_error_and_not_a_smaller_denominator(
    tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint
) -> None:
    class Loses(Answers):
        def answer(self, *args: Any, **kwargs: Any) -> list[Answer]:
            return super().answer(*args, **kwargs)[:-1]

    with pytest.raises(ClmoeError, match="11 answers for 12 questions: an answer was lost"):
        evaluate(tmp_path, mini, checkpoint, requests("colour"), Loses())  # type: ignore[arg-type]
    assert not summary_path(tmp_path, TASKS[1], "colour").exists()


def fill(run: Path, mini: Benchmark, checkpoint: Checkpoint, right: dict[str, dict[str, int]]) -> None:
    """``{"after": {"task or task.oracle": number of right answers of 12}}``."""
    for after, cells in right.items():
        learned = ORDER if after == "zero_shot" else ORDER[: ORDER.index(after) + 1]
        place = dataclasses.replace(checkpoint, after=after, learned=learned, identity=after)
        for stem, number in cells.items():
            task, _, router = stem.partition(".")
            wanted = requests(task, router=router or "located")
            evaluate(run, mini, place, wanted, Answers(number, task=None))  # type: ignore[arg-type]


def test_matrix_immediate_and_metrics(tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint) -> None:
    fill(tmp_path, mini, checkpoint, {
        "zero_shot": {"colour": 3, "count": 0, "side": 6},
        "colour": {"colour": 12, "colour.oracle": 12},
        "count": {"colour": 6, "count": 9, "count.oracle": 12},
        "side": {"colour": 3, "count": 6, "side": 12, "side.oracle": 12},
    })  # fmt: skip
    result = write_tables(tmp_path, ORDER)
    assert (tmp_path / "matrix.csv").read_text().splitlines() == [
        "after,colour,count,side",
        "zero_shot,25.0,0.0,50.0",
        "colour,100.0,,",
        "count,50.0,75.0,",
        "side,25.0,50.0,100.0",
    ]
    assert (tmp_path / "immediate.csv").read_text().splitlines()[1] == "immediate,100.0,100.0,100.0"
    assert json.loads((tmp_path / "metrics.json").read_text()) == result
    assert result["last"] == pytest.approx(175 / 3)
    assert result["immediate"] == pytest.approx(275 / 3)
    assert result["bwt_n"] == pytest.approx(-100 / 3)
    assert result["bwt_n_minus_1"] == pytest.approx(-50)
    assert result["immediate_known"] == 100.0
    assert result["bwt_known"] == pytest.approx(175 / 3 - 100)


def test_the_bare_model_is_a_row_of_its_own_and_the_end_of_its_own_sequence(
    tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint
) -> None:
    fill(tmp_path, mini, checkpoint, {"zero_shot": {"colour": 3, "count": 0, "side": 6}})
    assert write_tables(tmp_path, ORDER)["last"] is None, "of a run that trains, which has only begun"
    assert (tmp_path / "matrix.csv").read_text().splitlines()[1:] == ["zero_shot,25.0,0.0,50.0"]
    assert write_tables(tmp_path, ORDER, untrained=True)["last"] == pytest.approx(25)
    assert (tmp_path / "matrix.csv").read_text().splitlines()[1:] == ["zero_shot,25.0,0.0,50.0", "side,25.0,0.0,50.0"]
    assert not (tmp_path / "immediate.csv").exists()


def test_the_order_of_the_run_orders_the_table(tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint) -> None:
    fill(tmp_path, mini, checkpoint, {"side": {"colour": 3, "count": 6, "side": 12}})
    write_tables(tmp_path, ORDER[::-1])
    assert (tmp_path / "matrix.csv").read_text() == "after,side,count,colour\nside,100.0,50.0,25.0\n"


def test_tables_show_one_scoring_mode(tmp_path: Path, mini: Benchmark, checkpoint: Checkpoint) -> None:
    fill(
        tmp_path, mini, checkpoint, {"colour": {"colour": 12, "colour.oracle": 12}, "count": {"colour": 6, "count": 9}}
    )
    write_tables(tmp_path, ORDER)
    fixed = (tmp_path / "matrix.csv").read_text()
    first = dataclasses.replace(checkpoint, after="colour", learned=ORDER[:1], identity="colour")
    assert unanswered(tmp_path, mini, first, requests("colour", scoring="official")) == []
    write_tables(tmp_path, ORDER, scoring="official")
    assert (tmp_path / "matrix.csv").read_text() == "after,colour,count,side\ncolour,100.0,,\n"
    assert not (tmp_path / "immediate.csv").exists(), "the cell with the task known is in the other mode still"
    write_tables(tmp_path, ORDER)
    assert (tmp_path / "matrix.csv").read_text() == fixed.replace("colour,100.0,,\n", "")
    assert (tmp_path / "immediate.csv").is_file()


def test_unknown_tasks_are_named_before_anything_is_loaded(mini: Benchmark) -> None:
    check_tasks(mini, ORDER)
    with pytest.raises(ClmoeError, match="Did you mean 'colour'"):
        check_tasks(mini, ["color"])
    with pytest.raises(ClmoeError, match="no task to evaluate"):
        check_tasks(mini, [])


def test_a_models_own_answers_are_scored(runs: Runs, tmp_path: Path) -> None:
    """Some are right and some wrong, so the cell tells them apart; the rule is equality here."""
    runs.evaluate(runs.chain("lora")[1], tmp_path)
    lines = (tmp_path / "predictions" / TASKS[1] / f"{TASKS[1]}.jsonl").read_text().splitlines()
    right = [row["text"] == row["answer"] for row in map(json.loads, lines)]
    assert 0 < sum(right) < len(right) == 12
    after, *cells = (tmp_path / "matrix.csv").read_text().splitlines()[1].split(",")
    assert (after, float(cells[1])) == (TASKS[1], 100 * sum(right) / 12)


def test_the_last_row_has_no_limit(runs: Runs, tmp_path: Path) -> None:
    """It is the result; the same through ``--then-eval`` and ``clmoe eval``."""
    first, second = ORDER[:2]
    settings, order, run = ("training.steps=1", "evaluation.limit=3"), f"{first},{second}", tmp_path / "run"
    runs.train(run / first, "lora", first, *settings, order=order, then_eval="")
    runs.train(run / second, "lora", second, *settings, order=order, then_eval="", previous=run / first)
    for task in (first, second):
        runs.evaluate(run / task, tmp_path / "again", order=order)
    for folder in (run, tmp_path / "again"):
        cells = {
            f"{after}/{task}": summary_path(folder, after, task)
            for after in order.split(",")
            for task in (first, second)
        }
        counts = {name: json.loads(path.read_text())["questions"] for name, path in cells.items() if path.exists()}
        assert counts == {f"{first}/{first}": 3, f"{second}/{first}": 12, f"{second}/{second}": 12}


def test_an_adapter_is_not_evaluated_on_other_weights(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They lie in the very folder that it was trained on."""
    own = Runs(tmp_path, save_tiny(tmp_path / "model"), runs.benchmark)
    checkpoint = own.train(tmp_path / "run" / TASKS[0], "lora", TASKS[0], "training.steps=1")
    save_tiny(own.model, seed=1)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        own.evaluate(checkpoint, tmp_path / "run")
    assert stop.value.code == 2
    assert f"was trained on another base than {own.model}" in capsys.readouterr().err
    with pytest.raises(ClmoeError, match="was trained on another base"):
        clmoe.load(checkpoint)
    assert clmoe.load(checkpoint, model=str(runs.model)).learned == [TASKS[0]]


def test_a_finished_evaluation_loads_no_model(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clmoe.evaluate import answer

    checkpoint = runs.chain("clmoe")[1]
    runs.evaluate(checkpoint, tmp_path)
    before = (tmp_path / "matrix.csv").read_text()

    def refuse(*unused: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(answer, "open_answerer", refuse)
    runs.evaluate(checkpoint, tmp_path)
    assert (tmp_path / "matrix.csv").read_text() == before
    runs.evaluate(checkpoint, tmp_path, scoring="official")
    assert json.loads((tmp_path / "run.json").read_text())["scoring"] == "official"
    with pytest.raises(AssertionError, match="a model was loaded"):
        runs.evaluate(checkpoint, tmp_path, "options.beta=0.25")
