"""What became of an answer between a task's training and the end, read from invented prediction files."""

from collections import Counter
from pathlib import Path

import pytest

from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.evaluate.rules.consensus import textvqa
from clmoe.report.predictions import read_pairs
from clmoe.report.run import group_runs, read_run
from clmoe.report.samples import count_outcomes, read_answers, sample_data
from tests.report.folders import TASKS, make_run, predict


def outcomes(run: Path, task: str) -> dict[str, str]:
    return {name: pair.outcome for name, pair in read_pairs(read_run(run))[task].items()}


def test_every_outcome(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0)
    predict(run, "colour_letter", "colour_letter", {"a": ("x", 1), "b": ("x", 1), "c": ("x", 0), "d": ("x", 0)})
    later = {"a": ("x", 1), "b": ("y", 0), "c": ("y", 1), "d": ("y", 0), "e": ("y", 1)}
    predict(run, "box", "colour_letter", later)
    predict(run, "count", "colour_letter", dict.fromkeys(later, ("z", 1.0)))  # a stage between counts for nothing
    found = outcomes(run, "colour_letter")
    assert found == {"a": "kept", "b": "forgotten", "c": "gained", "d": "never", "e": "unknown"}
    pair = read_pairs(read_run(run))["colour_letter"]["b"]
    assert pair.then is not None and pair.now is not None
    assert (pair.then.text, pair.now.text, pair.asked.prompt) == ("x", "y", "ask b")


def test_part_of_a_point_is_right_from_one_half_on(tmp_path: Path) -> None:
    """Figures as the consensus of ten annotators gives them, and the found share of science's states."""
    cup = Question("q", "ask", "", None, {"answers": ["cup"] * 3 + ["mug"] * 2 + ["jar"] + [f"x{i}" for i in range(4)]})
    three, two, one = (textvqa(word, cup, "fixed") for word in ("cup", "mug", "jar"))
    assert (three, two, one) == pytest.approx((0.9, 0.6, 0.3))
    run = make_run(tmp_path, "moe", 0)
    predict(run, "count", "count", {"a": ("cup", three), "b": ("mug", two), "c": ("jar", one), "d": ("Ohio", 0.5)})
    predict(run, "box", "count", {"a": ("mug", two), "b": ("jar", one), "c": ("jar", one), "d": ("", 0.0)})
    assert outcomes(run, "count") == {"a": "kept", "b": "forgotten", "c": "never", "d": "forgotten"}


def test_answers_that_are_scored_as_a_whole_are_neither_right_nor_wrong(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0)
    for after, figure in (("count", 1.2), ("box", 0.1)):
        predict(run, after, "count", {"a": ("a red mug", figure)})
        (run / f"predictions/{after}/count.json").write_text('{"parts": {"BLEU-1": 0.4, "CIDEr": 2.0}}')
    assert outcomes(run, "count") == {"a": "unknown"}
    groups = group_runs([run])
    answers = read_answers(groups)
    assert count_outcomes(answers, "moe", "count") == {}
    (row,) = sample_data(groups, answers, None)["answers"]
    assert row[2:4] == [["a red mug", None], ["a red mug", None]]


def test_the_last_task_is_never_forgotten_and_the_end_is_the_runs_own(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0, order=TASKS[::-1])
    predict(run, "colour_letter", "colour_letter", {"a": ("x", 1), "b": ("x", 0)})
    predict(run, "box", "box", {"a": ("x", 1)})
    predict(run, "colour_letter", "box", {"a": ("x", 0)})
    assert outcomes(run, "colour_letter") == {"a": "kept", "b": "never"}
    assert outcomes(run, "box") == {"a": "forgotten"}


def test_a_run_that_was_measured_with_another_router(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0)
    predict(run, "box", "count.random", {"a": ("x", 1)})
    predict(run, "count", "count.random", {"a": ("x", 1)})
    assert outcomes(run, "count") == {"a": "kept"}
    predict(run, "box", "count", {"a": ("x", 0)})  # the default router counts wherever it was measured
    assert outcomes(run, "count") == {"a": "unknown"}


def test_answers_with_line_breaks_of_unicode_and_cells_never_finished(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0)
    path = run / "predictions/box/box.jsonl"
    predict(run, "box", "box", {"a": ("one", 1), "b": ("two", 1)})
    path.write_text(path.read_text().replace('"one"', '"o\u2028n\x85e"'), encoding="utf-8")
    assert Counter(outcomes(run, "box").values()) == {"kept": 2}
    path.with_suffix(".json").unlink()
    assert outcomes(run, "box") == {}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("text", 3, "row 2: field 'text' is 3; expected str"),
        ("score", "1", "row 2: field 'score' is '1'; expected a number"),
        ("score", float("nan"), "row 2: field 'score' is nan; expected a number"),
        ("image", 1, "row 2: field 'image' is 1; expected str or null"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, field: str, value: object, message: str) -> None:
    run = make_run(tmp_path, "moe", 0)
    predict(run, "box", "box", {"a": ("x", 1)})
    good = (run / "predictions/box/box.jsonl").read_text()
    predict(run, "box", "box", {"b": ("x", 1)}, **{field: value})
    bad = (run / "predictions/box/box.jsonl").read_text()
    (run / "predictions/box/box.jsonl").write_text(good + bad)
    with pytest.raises(ClmoeError, match=r"box\.jsonl") as error:
        read_pairs(read_run(run))
    assert message in str(error.value)
    (run / "predictions/box/box.jsonl").write_text(good + "{cut\n")
    with pytest.raises(ClmoeError, match="row 2: no JSON"):
        read_pairs(read_run(run))
