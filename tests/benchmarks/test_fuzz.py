"""Any value in any field of the data files leads to a clear message or a correct run, never to a traceback."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from clmoe import cli
from tests.trees import draw

pytestmark = pytest.mark.slow

VALUES: dict[str, Any] = {
    "missing": ...,
    "null": None,
    "true": True,
    "zero": 0,
    "huge": 10**400,
    "fraction": -1.5,
    "empty": "",
    "blank": " \n",
    "text": "x",
    "slashes": "../../x",
    "nul": "a\0b",
    "surrogate": "\ud83d",
    "mark": "<image>",
    "end": "</s>",
    "long": "yes " * 20_000,
    "line": "x" * 100_000,
    "list": [],
    "nested": [[1], {"a": None}],
    "object": {},
    "box": [0, 0, 0, 0],
}
CASES = {  # field -> scorers that read it
    "train.id": "vqa",
    "train.image": "vqa",
    "train.conversations": "vqa",
    "train.conversations.0": "vqa",
    "train.conversations.1.from": "vqa",
    "train.conversations.1.value": "vqa",
    "test.question_id": "vqa",
    "test.image": "science",
    "test.text": "science",
    "test.answer": "short_answer option_letter",
    "test.answers": "textvqa",
    "test.answer_bbox": "iou",
    "test.size": "iou",
    "test.extra": "stock",
    "gold.1": "gqa",
    "gold.1.answer": "gqa",
    "gold.1.isBalanced": "gqa",
}


def spoil(value: Any, path: list[str], new: Any) -> None:
    """Replace or remove what is at the path."""
    *folders, last = [int(part) if part.isdigit() and isinstance(value, list) else part for part in path]
    for part in folders:
        value = value[int(part) if isinstance(value, list) else part]
    key = int(last) if isinstance(value, list) else last
    if new is ...:
        value.pop(key, None) if isinstance(value, dict) else value.pop(key)
    else:
        value[key] = new


@pytest.mark.parametrize("case", CASES)
def test_any_value(case: str, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tries each value with every scorer that reads the field; what the check accepts must train and be answered."""
    draw(tmp_path / "data", "a.png", 0)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A"}]
    good = {
        "train": [{"id": str(n), "image": "a.png", "conversations": turns} for n in range(4)],
        "test": [{"question_id": n, "image": "a.png", "text": "What?", "answer": "A"} for n in range(3)],
        "gold": {str(n): {"answer": "A", "isBalanced": True} for n in range(3)},
    }
    kind, _, field = case.partition(".")
    for name, new in VALUES.items():
        for scorer in CASES[case].split():
            files = json.loads(json.dumps(good))
            if scorer == "iou":
                files["test"] = [{**row, "answer_bbox": [0.1, 0.2, 0.3, 0.4], "size": [3, 2]} for row in files["test"]]
            if scorer == "textvqa":
                files["test"] = [{**row, "answers": ["A"] * 10} for row in files["test"]]
            where = field.split(".")
            spoil(files[kind][1] if kind != "gold" else files[kind], where, new)
            for part, value in files.items():
                (tmp_path / "data" / f"{part}.json").write_text(json.dumps(value))
            gold = ", gold: {reader: gqa, files: [gold.json]}" if kind == "gold" else ""
            task = f"name: t, train: train.json, test: test.json, images: ., scorer: {scorer}, max_new_tokens: 2{gold}"
            (tmp_path / "data" / "b.yaml").write_text(f"name: b\nroot: .\ntasks: [{{{task}}}]\n")
            (tmp_path / "run").mkdir(exist_ok=True)
            checked = command(capsys, "data", "check", tmp_path / "data/b.yaml", "--base", tiny_folder)
            line = ["run", "lora", tmp_path / "data/b.yaml", "--base", tiny_folder, "--output", tmp_path / "run"]
            ran = command(capsys, *line, "training.steps=1", "training.batch_size=2", "adapter.rank=2")
            if kind == "train":  # otherwise the checkpoint serves the next value too
                shutil.rmtree(tmp_path / "run")
            assert checked or not ran, f"{name}, {scorer}: the check lists nothing, and the run stops: {ran}"
            for said in filter(None, (checked, ran)):
                assert (f"{kind}.json" in said or "test.json" in said) and len(said) < 3000, f"{name}: {said}"


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error message of a command, empty if it succeeds. Any exception but an exit with code 2 fails the test."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        assert stop.code == 2
        return capsys.readouterr().err
    capsys.readouterr()
    return ""
