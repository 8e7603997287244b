"""Files of other projects: the same rows in every format become the same records; every fault names file and field."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from PIL import Image

from clmoe import cli
from clmoe.benchmarks.base import load_benchmark
from clmoe.benchmarks.prepare import open_benchmark, prepare_raw
from clmoe.data.records import Question, TrainRecord, Turn, load_questions, load_train
from clmoe.errors import ClmoeError
from tests.benchmarks.test_fuzz import VALUES, spoil

ASK = "\nIn one word."
ROWS = [
    ("7", "a.png", "What, or who?", "red, dark"),
    ("x8", "b.png", 'A "quoted"\nline?', "blue"),
    ("9", None, "1 + 1?", "2"),
]
Rows = list[dict[str, Any]]
Writer = Callable[[Path, str, Rows], list[str]]


def json_lines(folder: Path, name: str, rows: Rows) -> list[str]:
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return [f"{name}.jsonl"]


def cells(ending: str, delimiter: str) -> Writer:
    def write(folder: Path, name: str, rows: Rows) -> list[str]:
        with (folder / f"{name}.{ending}").open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
        return [f"{name}.{ending}"]

    return write


def inside(folder: Path, rows: Rows) -> Rows:
    """The rows with the images' bytes inside, as datasets' Image feature stores them."""
    return [
        row | {"image": row["image"] and {"bytes": (folder / row["image"]).read_bytes(), "path": None}} for row in rows
    ]


def parquet(folder: Path, name: str, rows: Rows) -> list[str]:
    for part in range(2):
        Dataset.from_list(inside(folder, rows)).shard(2, part, contiguous=True).to_parquet(
            folder / f"{name}-{part}.parquet"
        )
    return [f"{name}-*.parquet"]


def saved(folder: Path, name: str, rows: Rows) -> list[str]:
    Dataset.from_list(inside(folder, rows)).save_to_disk(str(folder / name))
    return [name]


def whole(folder: Path, name: str, rows: Any) -> list[str]:
    (folder / f"{name}.json").write_text(json.dumps(rows))
    return [f"{name}.json"]


def pair(folder: Path, name: str, rows: Rows) -> list[str]:
    """Questions and annotations in VQA v2's layout; the annotations are in another order."""
    questions = [
        {"question_id": r["id"], "image_id": r["image"][0], "question": r["question"]} for r in rows if r["image"]
    ]
    notes = [{"question_id": r["id"], "multiple_choice_answer": r["answer"], "answer_type": "other"} for r in rows]
    return [
        *whole(folder, f"{name}_annotations", {"annotations": notes[::-1]}),
        *whole(folder, f"{name}_questions", {"questions": questions}),
    ]


def messages(row: dict[str, Any], *names: str, **more: Any) -> dict[str, Any]:
    """LLaMA-Factory's and ms-swift's layout, with ``<image>`` in the text."""
    role, content, asks, says = names
    mark = "<image>" if row["image"] else ""
    turns = [{role: asks, content: mark + row["question"]}, {role: says, content: row["answer"]}]
    images = {"images": [row["image"]]} if row["image"] else {}
    return {"id": row["id"], ("messages" if role == "role" else "conversations"): turns, **images, **more}


def parts(row: dict[str, Any]) -> dict[str, Any]:
    """TRL's prompt and completion, whose content is a list of parts; Arrow fills in keys that a part lacks."""
    image = [{"type": "image", "text": None}] if row["image"] else []
    asked = [{"role": "user", "content": [*image, {"type": "text", "text": row["question"]}]}]
    said = [{"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]}]
    return {"id": row["id"], "images": [row["image"]], "prompt": asked, "completion": said}


CHAT = ("role", "content", "user", "assistant")
FORMATS: dict[str, tuple[Writer, Callable[[dict[str, Any]], dict[str, Any]] | None, dict[str, Any]]] = {
    "JSON": (whole, None, {}),
    "JSON lines": (json_lines, None, {}),
    "CSV": (cells("csv", ","), None, {}),
    "TSV": (cells("tsv", "\t"), lambda r: {"n": r["id"], "pic": r["image"], "q": r["question"], "a": r["answer"]},
            {"columns": {"id": "n", "image": "pic", "question": "q", "answer": "a"}}),
    "LLaVA": (whole, lambda r: messages(r, "from", "value", "human", "gpt"), {}),
    "LLaMA-Factory": (whole, lambda r: messages(r, *CHAT), {}),
    "ms-swift": (json_lines, lambda r: {"id": r["id"], "query": r["question"], "response": r["answer"],
                                        "images": [r["image"]] if r["image"] else []}, {}),
    "TRL": (json_lines, parts, {}),
    "Parquet": (parquet, None, {}),
    "datasets": (saved, None, {}),
    "VQA v2": (pair, None, {"image": "{image_id}.png"}),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two pictures."""
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (6, 4), colour).save(tmp_path / name)
    return tmp_path


def described(folder: Path, train: list[str], test: list[str], **raw: Any) -> Path:
    """The file of a benchmark with one task."""
    task = {"name": "t", "images": ".", "scorer": "short_answer", "max_new_tokens": 4, "text_rows": True}
    task["raw"] = {"train": train, "test": test, **raw}
    (folder / "own.yaml").write_text(yaml.safe_dump({"name": "own", "root": ".", "tasks": [task]}))
    return folder / "own.yaml"


def written(folder: Path, kind: str, spoiled: Callable[[Rows], None] = lambda rows: None) -> Path:
    write, change, raw = FORMATS[kind]
    names = []
    for name in ("train", "test"):
        rows: Rows = [dict(zip(("id", "image", "question", "answer"), row, strict=True)) for row in ROWS]
        rows = rows if change is None else list(map(change, rows))
        if name == "train":
            spoiled(rows)
        names.append(write(folder, name, rows))
    return described(folder, *names, instruction=ASK, **raw)


def check(benchmark: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[bool, str]:
    """Whether ``clmoe data check`` finds nothing bad, and what it says."""
    try:
        cli.main(["data", "check", str(benchmark), "--base", str(tiny_folder)])
    except SystemExit as stop:
        assert stop.code == 2
        return False, capsys.readouterr().err
    return True, capsys.readouterr().out


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_records_in_every_format(
    kind: str, folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ROWS[:2] if kind == "VQA v2" else ROWS
    benchmark = written(folder, kind)
    good, printed = check(benchmark, tiny_folder, capsys)
    assert good and f"{len(rows)} train" in printed and " 0 bad" in printed and "2 different images" in printed, printed
    assert not (folder / "prepared").exists(), "a check writes nothing"
    (task,) = open_benchmark(str(benchmark)).tasks
    records, questions = load_train(task.train, task.image_root), load_questions(task.test, task.image_root)
    for record, question, (name, image, asked, said) in zip(records, questions, rows, strict=True):
        assert record == TrainRecord(name, record.image, (Turn(asked + ASK, said),))
        assert question == Question(name, question.image, asked + ASK, said, {})
        assert record.image == question.image and (record.image is None) == (image is None)
        if image is not None and record.image is not None:
            assert (folder / record.image).read_bytes() == (folder / image).read_bytes()
            assert (record.image == image) == (kind not in ("Parquet", "datasets"))


def test_conversations_of_several_turns(folder: Path) -> None:
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"text {n}"} for n in range(4)]
    train = json_lines(folder, "train", [{"messages": turns, "images": ["a.png"]}])
    test = json_lines(
        folder, "test", [{"question": "q", "answers": [{"answer": "a"}, {"answer": "b"}], "image": "a.png"}]
    )
    (task,) = open_benchmark(str(described(folder, train, test, instruction="!"))).tasks
    (record,) = load_train(task.train, task.image_root)
    assert record == TrainRecord("0", "a.png", (Turn("text 0!", "text 1"), Turn("text 2!", "text 3")))
    (question,) = load_questions(task.test, task.image_root)
    assert question == Question("0", "a.png", "q!", "", {"answers": ["a", "b"]})


def test_training_learns_the_answer_of_most_annotators(folder: Path) -> None:
    """In a tie, the answer that comes first is learned, as in LLaVA's instruction data."""
    answers = [[{"answer": word} for word in words] for words in ("xyyx", "yxx")]
    rows = [{"question": "q", "answers": found, "image": "a.png"} for found in answers]
    names = json_lines(folder, "rows", rows)
    (task,) = open_benchmark(str(described(folder, names, names))).tasks
    assert [record.turns[0].answer for record in load_train(task.train, task.image_root)] == ["x", "x"]


def test_what_has_changed_is_made_again_and_what_somebody_wrote_is_not_touched(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = written(folder, "CSV")
    (task,) = open_benchmark(str(benchmark)).tasks
    assert "train.json: 3 rows" in capsys.readouterr().err
    os.utime(folder / "train.csv", (0, 0))
    assert prepare_raw(task) == [], "the bytes decide"
    before = task.test.stat().st_mtime_ns
    (folder / "train.csv").write_text((folder / "train.csv").read_text().replace("red", "pink"))
    assert "train.json: 3 rows" in prepare_raw(task)[0]
    assert load_train(task.train, folder)[0].turns[0].answer == "pink, dark" and task.test.stat().st_mtime_ns == before
    benchmark.write_text(benchmark.read_text().replace("In one word", "In two words"))
    (task,) = open_benchmark(str(benchmark)).tasks
    assert load_train(task.train, folder)[0].turns[0].question.endswith("In two words.")
    (folder / "test.csv").unlink()
    assert open_benchmark(str(benchmark)).tasks == (task,), "what is prepared is enough"
    task.train.with_suffix(".raw.json").unlink()
    (folder / "train.csv").write_text("other\n")
    assert prepare_raw(task) == [], "it may be the user's own"


def spoiled(*path: Any, value: Any = ...) -> Callable[[Rows], None]:
    return lambda rows: spoil(rows[1], [str(part) for part in path], value)


def of_system(rows: Rows) -> None:
    rows[1]["messages"].insert(0, {"role": "system", "content": "Be brief."})


FAULTS: list[tuple[str, Callable[[Rows], None], str]] = [
    ("JSON", spoiled("question"), "train.json: row 1 (from 0), id 'x8', field 'question'"),
    ("JSON", spoiled("image", value="c.png"), "train.json: row 1 (from 0), id 'x8', field 'image'"),
    ("JSON lines", spoiled("answer", value=True), "train.jsonl: row 1 (from 0), id 'x8', field 'answer'"),
    ("CSV", spoiled("answer"), "train.csv: row 1 (from 0), id 'x8', field 'answer'"),
    ("TSV", spoiled("pic", value="../b.png"), "train.tsv: row 1 (from 0), id 'x8', field 'pic'"),
    ("TSV", spoiled("q", value=""), "field 'q'"),
    ("LLaVA", spoiled("conversations", 1, "from", value="bot"), "field 'conversations[1].from'"),
    ("LLaMA-Factory", spoiled("messages", 1, "content", value="</s>"), "field 'messages[1].content'"),
    ("LLaMA-Factory", spoiled("messages", 1, "role", value="user"), "field 'messages[1].role'"),
    ("LLaMA-Factory", of_system, "field 'messages[0].role'"),
    ("LLaMA-Factory", spoiled("images", value=["a.png", "b.png"]), "field 'images'"),
    ("ms-swift", spoiled("response", value="yes " * 20_000), ""),
    ("TRL", spoiled("prompt", 0, "content", 1, "text", value=None), "field 'prompt[0].content[1].text'"),
    (
        "TRL",
        spoiled("completion", 0, "content", 0, "type", value="audio"),
        "field 'completion[0].content[0]'",
    ),
    ("VQA v2", lambda rows: rows[1].update(image="z.png"), "questions.json: row 1 (from 0), id 'x8', field 'image_id'"),
    ("datasets", lambda rows: rows[1].update(answer=None), "train: row 1 (from 0), id 'x8', field 'answer'"),
]


@pytest.mark.parametrize(("kind", "spoils", "said"), FAULTS)
def test_a_fault_is_named_as_the_file_calls_it(
    kind: str, spoils: Callable[[Rows], None], said: str, folder: Path, tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Both the check and the preparation of the file name the fault; the preparation then writes nothing."""
    benchmark = written(folder, kind, spoils)
    good, printed = check(benchmark, tiny_folder, capsys)
    assert good == (not said) and said in printed, printed
    if said:
        with pytest.raises(ClmoeError) as found:
            open_benchmark(str(benchmark))
        assert said in str(found.value) and not (folder / "prepared").exists()


def test_all_faults_of_a_folder_are_told_at_once(
    folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.jsonl").write_text(
        '{"question": 1}\n{"question": "q"\n{"question": "q", "img": "a.png", "answer": "b"}\n7\n'
    )
    (folder / "bad.csv").write_text('image,question,answer\na.png,q,a,b\na.png,"q",a\nzz.png,q,a\n')
    bytes_of = {"bytes": b"no image", "path": None}
    Dataset.from_list([{"image": bytes_of, "question": "q", "answer": "a"}] * 2).to_parquet(folder / "bad.parquet")
    whole(folder, "q", {"questions": [{"question_id": 1, "image_id": 1, "question": "q"}]})
    benchmark = described(folder, ["bad.jsonl", "bad.csv"], ["bad.parquet", "q.json"])
    for printed in (check(benchmark, tiny_folder, capsys)[1], _refused(benchmark)):
        for line in (
            "bad.jsonl: row 0 (from 0), field 'question'",
            "bad.jsonl: row 1 (from 0)",
            "bad.jsonl: row 2 (from 0), field 'img'",
            "bad.jsonl: row 3 (from 0)",
            "bad.csv: row 0 (from 0)",
            "bad.csv: row 2 (from 0), field 'image'",
            "bad.parquet: 2 rows (0-1), field 'image'",
            "q.json: row 0 (from 0), id 1, field 'question_id'",
        ):
            assert line in printed, (line, printed)
    assert not (folder / "prepared").exists()


def _refused(benchmark: Path) -> str:
    with pytest.raises(ClmoeError) as found:
        open_benchmark(str(benchmark))
    return str(found.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "x", ".parquet"),
        ("a.json", '{"rows": []}', "annotations"),
        ("a.csv", "a,a\n1,2\n", "line 1"),
        ("a.csv", b"question,answer\n\xff,x\n", "UTF-8"),
        ("a.csv", 'question\n"x', ""),
        ("a.parquet", "x", ""),
        ("a.jsonl", "", ""),
        ("nothing-*.parquet", None, "raw.train"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, content: str | bytes | None, said: str, folder: Path) -> None:
    if content is not None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused = _refused(described(folder, [name], [name]))
    assert str(folder / name) in refused and said in refused


def test_a_folder_of_splits_is_none(folder: Path) -> None:
    for split in ("train", "test"):
        saved(folder / "all", split, [{"image": None, "question": "q", "answer": "a"}])
    (folder / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert "all/train" in _refused(described(folder, ["all"], ["all"]))


@pytest.mark.parametrize(
    "raw",
    [{"columns": {"picture": "x"}}, {"image": "{image_id"}, {"instruction": "</s>"}, {"train": []}, {"suffix": "x"}],
)
def test_settings_that_cannot_be_right(raw: dict[str, Any], folder: Path) -> None:
    (key,) = raw
    with pytest.raises(ClmoeError, match=key):
        load_benchmark(str(described(folder, **{"train": ["a.csv"], "test": ["a.csv"]} | raw)), check_files=False)


def test_a_table_under_train_is_told_its_place(folder: Path) -> None:
    values = yaml.safe_load(described(folder, ["a.csv"], ["b.csv"]).read_text())
    values["tasks"][0] |= {"train": "a.csv", "test": "b.json", "raw": None}
    (folder / "own.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ClmoeError, match=r"tasks\[0\]\.raw\.train: \[a\.csv\]"):
        load_benchmark(str(folder / "own.yaml"), check_files=False)


def test_the_raw_files_are_never_written_to(folder: Path) -> None:
    benchmark = described(folder, ["prepared/t/train.json"], ["x.csv"])
    with pytest.raises(ClmoeError, match="different names"):
        load_benchmark(str(benchmark), check_files=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "path"),
    [("LLaMA-Factory", "messages"), ("LLaMA-Factory", "messages.0"), ("LLaMA-Factory", "messages.0.content"),
     ("LLaMA-Factory", "messages.0.role"), ("LLaMA-Factory", "images"), ("LLaMA-Factory", "images.0"),
     ("TRL", "prompt.0.content.0"), ("TRL", "completion"), ("JSON", "id"), ("JSON", "question"), ("JSON", "answer"),
     ("JSON", "answers"), ("JSON", "image")],
)  # fmt: skip
def test_any_value(kind: str, path: str, folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any value in any field is read or is named with its file; what the check accepts can be prepared."""
    for value in VALUES.values():
        benchmark = written(folder, kind, lambda rows, value=value: spoil(rows[1], path.split("."), value))
        good, printed = check(benchmark, tiny_folder, capsys)
        assert good or "train.json" in printed, printed
        if good:
            open_benchmark(str(benchmark))
