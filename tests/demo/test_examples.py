"""Examples are test questions of learned tasks, with images that exist."""

import json
from pathlib import Path

import pytest

from clmoe.benchmarks.base import Benchmark
from clmoe.demo.examples import read_examples
from clmoe.errors import ClmoeError


def test_the_first_test_questions_of_every_learned_task(mini: Benchmark, mini_yaml: Path) -> None:
    examples = read_examples(mini, ["side", "colour"], per_task=3)
    assert [example.task for example in examples] == ["colour"] * 3 + ["side"] * 3
    for task in ("colour", "side"):
        rows = json.loads((mini_yaml.parent / task / "test.json").read_text())[:3]
        mine = [example for example in examples if example.task == task]
        assert [(e.question, e.answer) for e in mine] == [(row["text"], row["answer"]) for row in rows]
        assert [e.image for e in mine] == [str(mini_yaml.parent / task / "images" / row["image"]) for row in rows]


def test_a_question_without_an_image(mini: Benchmark) -> None:
    assert read_examples(mini, ["count"], per_task=12)[7].image is None


def test_a_benchmark_of_other_tasks_is_refused(mini: Benchmark) -> None:
    with pytest.raises(ClmoeError, match="has none of the checkpoint's tasks"):
        read_examples(mini, ["digits"])
