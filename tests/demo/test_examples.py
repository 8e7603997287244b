"""Examples are test questions of learned tasks, with images that exist."""

import dataclasses
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


def test_the_expected_answer_of_ten_annotators_and_of_a_box(mini: Benchmark, tmp_path: Path) -> None:
    """Not the first of the further fields: those of VQA v2 and RefCOCO hold a size or a type before the answers."""
    row = {"question_id": "1", "text": "What is it?"}
    annotated = {**row, "question_type": "what is", "answers": ["cup"] * 7 + ["mug"] * 3}
    box = {**row, "question_id": "2", "size": [640, 480], "answer_bbox": [0.1, 0.2, 0.3, 0.4]}
    path = tmp_path / "test.json"
    path.write_text(json.dumps([annotated, box]))
    task = dataclasses.replace(mini.task("colour"), test=path, scorer="vqa")
    examples = read_examples(dataclasses.replace(mini, tasks=[task]), ["colour"])
    assert [example.answer for example in examples] == ["cup | mug", "[0.1, 0.2, 0.3, 0.4]"]


def test_a_benchmark_of_other_tasks_is_refused(mini: Benchmark) -> None:
    with pytest.raises(ClmoeError, match="has none of the checkpoint's tasks"):
        read_examples(mini, ["digits"])
