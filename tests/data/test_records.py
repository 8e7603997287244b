"""Reading record files: what is accepted, and that every kind of fault is named with file, row and field."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clmoe.data.records import Question, TrainRecord, Turn, load_questions, load_train
from clmoe.errors import ClmoeError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "images" / "sub" / "a.png").write_bytes(b"not decoded here")
    (tmp_path / "outside.png").write_bytes(b"")
    return tmp_path / "images"


def write(root: Path, data: Any) -> Path:
    path = root.parent / "file.json"
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return path


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


def train_row(**changes: Any) -> dict[str, Any]:
    row = {"id": "k1", "image": "sub/a.png", "conversations": talk("<image>\nWhat is it?", "Dog")}
    return {key: value for key, value in (row | changes).items() if value is not ...}


def question_row(**changes: Any) -> dict[str, Any]:
    row = {"question_id": 17, "image": "sub/a.png", "text": "What is it?", "answer": "mug"}
    return {key: value for key, value in (row | changes).items() if value is not ...}


def test_training_records(root: Path) -> None:
    rows = [
        train_row(id=7, conversations=talk("<image>\nWhat is it?\nOne word.", "Dog \n", " Where?", "Left")),
        train_row(id="text", image=..., conversations=talk("Say hi.", "hi"), unused={"x": 1}),
        train_row(id="null", image=None, conversations=talk("Say hi.", "hi")),
        train_row(id="end", image="./sub/../sub//a.png", conversations=talk("What is it?\n<image>", "Dog")),
    ]
    assert load_train(write(root, rows), root) == [
        TrainRecord("7", "sub/a.png", (Turn("What is it?\nOne word.", "Dog"), Turn("Where?", "Left"))),
        TrainRecord("text", None, (Turn("Say hi.", "hi"),)),
        TrainRecord("null", None, (Turn("Say hi.", "hi"),)),
        TrainRecord("end", "sub/a.png", (Turn("What is it?", "Dog"),)),
    ]


def test_repeated_training_ids_are_numbered(root: Path) -> None:
    rows = [train_row(id=name) for name in ("k", "k", "k#2", "k", 5, "5")]
    ids = [record.id for record in load_train(write(root, rows), root)]
    assert ids == ["k", "k#2", "k#2#2", "k#3", "5", "5#2"]


def test_questions(root: Path) -> None:
    rows = [
        question_row(),
        question_row(question_id="42", text="<image>\nWhich?\nOptions: (A) ice", answer=" A"),
        question_row(question_id="t", image=..., answer=...,
                     answer_bbox="[0.12, 0.30, 0.50, 0.94]", size=[640, 480]),
        question_row(question_id="l", answer=["cola", "coke"], answer_type="Doc"),
    ]  # fmt: skip
    assert load_questions(write(root, rows), root) == [
        Question("17", "sub/a.png", "What is it?", "mug", {}),
        Question("42", "sub/a.png", "Which?\nOptions: (A) ice", " A", {}),
        Question("t", None, "What is it?", "", {"answer_bbox": "[0.12, 0.30, 0.50, 0.94]", "size": [640, 480]}),
        Question("l", "sub/a.png", "What is it?", "", {"answer_type": "Doc", "answers": ["cola", "coke"]}),
    ]


TWO = "<image>\nWhat?"
BAD_TRAIN = {
    "not an object": ("a string", "row 1 (from 0): expected an object {...}, found a string 'a string'"),
    "no id": (
        train_row(id=...),
        "row 1 (from 0), field 'id': expected a string or an integer, found nothing",
    ),
    "boolean id": (
        train_row(id=True),
        "id True, field 'id': expected a string or an integer, found a boolean",
    ),
    "float id": (train_row(id=1.5), "field 'id': expected a string or an integer, found a number 1.5"),
    "image type": (train_row(image=3), "id 'k1', field 'image': expected a string, found a number 3"),
    "empty image": (train_row(image=""), "field 'image': expected some text, found an empty string"),
    "missing image": (train_row(image="sub/b.png"), "field 'image': no file {root}/sub/b.png; add the image"),
    "folder as image": (train_row(image="sub"), "field 'image': no file {root}/sub;"),
    "absolute": (train_row(image="/etc/passwd"), "field 'image': '/etc/passwd' is absolute"),
    "drive": (train_row(image="C:\\a.png"), "field 'image': 'C:\\\\a.png' is absolute"),
    "escape": (train_row(image="../outside.png"), "field 'image': '../outside.png' leaves the image root"),
    "hidden escape": (
        train_row(image="sub/../../outside.png"),
        "field 'image': 'sub/../../outside.png' leaves",
    ),
    "no talk": (
        train_row(conversations=...),
        "field 'conversations': expected a list human, gpt, human, gpt",
    ),
    "empty talk": (train_row(conversations=[]), "field 'conversations': expected a list human, gpt"),
    "turn type": (
        train_row(conversations=["hi"]),
        "field 'conversations[0]': expected an object with 'from'",
    ),
    "no answer": (
        train_row(conversations=talk(TWO)),
        "field 'conversations': the last question has no answer",
    ),
    "empty answer": (
        train_row(conversations=talk(TWO, " ")),
        "field 'conversations[1].value': expected some text",
    ),
    "answer type": (
        train_row(conversations=[*talk(TWO), {"from": "gpt", "value": 3}]),
        "field 'conversations[1].value': expected a string, found a number 3",
    ),
    "order": (
        train_row(conversations=talk(TWO, "a")[::-1]),
        "field 'conversations[0].from': expected 'human' (human and gpt alternate), found a string 'gpt'",
    ),
    "twice human": (
        train_row(conversations=[talk(TWO)[0], talk("What?")[0]]),
        "field 'conversations[1].from': expected 'gpt'",
    ),
    "mark missing": (
        train_row(conversations=talk("What?", "a")),
        "field 'conversations[0].value': 'image' is set, but <image> is missing",
    ),
    "mark late": (
        train_row(conversations=talk(TWO, "a", TWO, "b")),
        "field 'conversations[2].value': <image> may stand in the first human turn only",
    ),
    "mark only late": (
        train_row(conversations=talk("What?", "a", TWO, "b")),
        "field 'conversations[0].value': 'image' is set, but <image> is missing",
    ),
    "mark twice": (
        train_row(conversations=talk("<image><image>What?", "a")),
        "field 'conversations[0].value': expected one <image>, found 2",
    ),
    "mark in answer": (
        train_row(conversations=talk(TWO, "<image>")),
        "field 'conversations[1].value': <image> may not stand in an answer",
    ),
    "mark without image": (
        train_row(image=...),
        "field 'conversations[0].value': <image> is used, but the row has no field 'image'",
    ),
    "no question": (
        train_row(conversations=talk("<image>\n", "a")),
        "field 'conversations[0].value': expected a question besides <image>",
    ),
    "surrogate": (
        train_row(conversations=talk(TWO + "\ud83d", "a")),
        "field 'conversations[0].value': half of a surrogate pair at character 13",
    ),
}
BAD_QUESTIONS = {
    "no id": (
        question_row(question_id=...),
        "field 'question_id': expected a string or an integer, found nothing",
    ),
    "same id": (question_row(question_id="1"), "id '1', field 'question_id': already used by row 0"),
    "no text": (
        question_row(text=...),
        "id 17, field 'text': expected a string, found nothing: the field is missing",
    ),
    "no answer": (
        question_row(answer=...),
        "field 'answer': the question has no expected answer: give one of",
    ),
    "empty answer": (question_row(answer=""), "field 'answer': expected some text, found an empty string"),
    "answer type": (question_row(answer=3), "field 'answer': expected a string, found a number 3"),
    "null answer": (question_row(answer=None), "field 'answer': expected a string, found null"),
    "answer list": (question_row(answer=["a", 3]), "field 'answer[1]': expected a string, found a number 3"),
    "two lists": (question_row(answer=["a"], answers=["b"]), "field 'answer': expected a string, or a list"),
    "empty list": (question_row(answer=[]), "field 'answer': expected a string, or a list"),
    "mark twice": (question_row(text="<image> or <image>?"), "field 'text': expected one <image>, found 2"),
    "mark without image": (
        question_row(image=..., text="<image>\nWhat?"),
        "field 'text': <image> is used, but",
    ),
    "missing image": (question_row(image="b.png"), "field 'image': no file {root}/b.png"),
    "escape": (question_row(image="../outside.png"), "field 'image': '../outside.png' leaves the image root"),
}


@pytest.mark.parametrize("case", BAD_TRAIN)
def test_bad_training_rows_are_named(case: str, root: Path) -> None:
    row, message = BAD_TRAIN[case]
    path = write(root, [train_row(id="good"), row])
    with pytest.raises(ClmoeError) as caught:
        load_train(path, root)
    assert str(caught.value).startswith(f"{path}: row 1 (from 0)")
    assert message.replace("{root}", str(root)) in str(caught.value)


@pytest.mark.parametrize("case", BAD_QUESTIONS)
def test_bad_questions_are_named(case: str, root: Path) -> None:
    row, message = BAD_QUESTIONS[case]
    path = write(root, [question_row(question_id=1), row])
    with pytest.raises(ClmoeError) as caught:
        load_questions(path, root)
    assert str(caught.value).startswith(f"{path}: row 1 (from 0)")
    assert message.replace("{root}", str(root)) in str(caught.value)


BAD_FILES = {
    "empty list": (b"[]", "the list of records is empty"),
    "object": (b'{"id": 1}', "expected a JSON list of records at the top level, found an object"),
    "empty file": (b"", "line 1, column 1: broken JSON"),
    "broken": (b'[\n {"id": 1,,}\n]', "line 2, column 11: broken JSON"),
    "lines": (b'{"id": 1}\n{"id": 2}\n', "line 2, column 1: broken JSON: Extra data (one object per line?"),
    "byte-order mark": (b"\xef\xbb\xbf[]", "begins with a byte-order mark; save it as UTF-8 without one"),
    "utf-16": ("[]".encode("utf-16"), "begins with a byte-order mark"),
    "latin-1": (b'[\n"\xe9"]', "line 2: byte 3 is not UTF-8"),
    "nan": (b'[{"id": "NaN \\" NaN",\n "size": NaN}]', "line 2, column 10: NaN is not JSON"),
    "infinity": (b"[1, -Infinity]", "line 1, column 5: -Infinity is not JSON"),
    "too deep": (b"[" * 100_000, "cannot be parsed as JSON"),
    "long number": (b"[" + b"1" * 5000 + b"]", "cannot be parsed as JSON"),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("load", [load_train, load_questions])
def test_bad_files_are_named(load: Any, case: str, root: Path) -> None:
    raw, message = BAD_FILES[case]
    path = write(root, raw)
    with pytest.raises(ClmoeError) as caught:
        load(path, root)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_missing_file_folder_and_image_root(root: Path) -> None:
    with pytest.raises(ClmoeError, match=r"nothing\.json: cannot be read"):
        load_train(root / "nothing.json", root)
    with pytest.raises(ClmoeError, match="cannot be read"):
        load_train(root, root)
    with pytest.raises(ClmoeError, match=r"field 'image': the image root .*nowhere is not a folder"):
        load_train(write(root, [train_row()]), root / "nowhere")


def test_fast_modules_do_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['clmoe']; "  # as the command line starts
        "import clmoe.data.records, clmoe.benchmarks.base; "
        "print([name for name in ('torch', 'transformers', 'PIL', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
