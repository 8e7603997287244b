"""Record files: what is accepted, faults that are named by file, row and field, and records that stay on disk."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clmoe.data import records
from clmoe.data.records import (
    OnBad,
    Part,
    Question,
    StoredRecords,
    TrainRecord,
    Turn,
    UnionRecords,
    count_records,
    iterate_train,
    load_questions,
    load_train,
)
from clmoe.data.rows import RowError, Seen
from clmoe.errors import ClmoeError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "images" / "sub" / "a.png").write_bytes(b"not decoded here")
    (tmp_path / "outside.png").write_bytes(b"")
    return tmp_path / "images"


def write(root: Path, data: Any) -> Path:
    path = root.parent / "file.json"
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return path


def talk(*values: Any) -> list[dict[str, Any]]:
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


def train_row(**changes: Any) -> dict[str, Any]:
    row = {"id": "k1", "image": "sub/a.png", "conversations": talk("<image>\nWhat is it?", "Dog")}
    return {key: value for key, value in (row | changes).items() if value is not ...}


def question_row(**changes: Any) -> dict[str, Any]:
    row = {"question_id": 17, "image": "sub/a.png", "text": "What is it?", "answer": "mug"}
    return {key: value for key, value in (row | changes).items() if value is not ...}


# ---- What is accepted


def test_training_records(root: Path) -> None:
    rows = [
        train_row(id=7, conversations=talk("<image>\nWhat is it?\nOne word.", "Dog \n", " Where?", "Left")),
        train_row(id="text", image=..., conversations=talk("Say hi.", "hi"), unused={"x": 1}),
        train_row(id="null", image=None, conversations=talk("Say hi.", "hi")),
        train_row(id="end", image="./sub/../sub//a.png", conversations=talk("What is it?\n<image>", "Dog")),
    ]
    path = write(root, rows)
    assert load_train(path, root) == [
        TrainRecord("7", "sub/a.png", (Turn("What is it?\nOne word.", "Dog"), Turn("Where?", "Left"))),
        TrainRecord("text", None, (Turn("Say hi.", "hi"),)),
        TrainRecord("null", None, (Turn("Say hi.", "hi"),)),
        TrainRecord("end", "sub/a.png", (Turn("What is it?", "Dog"),)),
    ]
    assert count_records(path) == 4
    assert not cached(root), "small files stay in memory"


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
    unanswered = write(root, [question_row(answer=..., image="gone.png")])
    assert load_questions(unanswered, root, answered=False, images=False)[0].answer == ""


# ---- Faults

TWO = "<image>\nWhat?"
BAD_TRAIN: dict[str, tuple[Any, str | None]] = {
    "not an object": ("a string", None),
    "no id": (train_row(id=...), "id"),
    "boolean id": (train_row(id=True), "id"),
    "image type": (train_row(image=3), "image"),
    "missing image": (train_row(image="sub/b.png"), "image"),
    "absolute": (train_row(image="/etc/passwd"), "image"),
    "drive": (train_row(image="C:\\a.png"), "image"),
    "escape": (train_row(image="../outside.png"), "image"),
    "hidden escape": (train_row(image="sub/../../outside.png"), "image"),
    "empty talk": (train_row(conversations=[]), "conversations"),
    "turn type": (train_row(conversations=["hi"]), "conversations[0].from"),
    "no answer": (train_row(conversations=talk(TWO)), "conversations"),
    "empty answer": (train_row(conversations=talk(TWO, " ")), "conversations[1].value"),
    "twice human": (train_row(conversations=[talk(TWO)[0], talk("What?")[0]]), "conversations[1].from"),
    "mark missing": (train_row(conversations=talk("What?", "a")), "conversations[0].value"),
    "mark late": (train_row(conversations=talk(TWO, "a", TWO, "b")), "conversations[2].value"),
    "mark twice": (train_row(conversations=talk("<image><image>What?", "a")), "conversations[0].value"),
    "mark in answer": (train_row(conversations=talk(TWO, "<image>")), "conversations[1].value"),
    "mark without image": (train_row(image=...), "conversations[0].value"),
    "no question": (train_row(conversations=talk("<image>\n", "a")), "conversations[0].value"),
    "end token": (train_row(conversations=talk(TWO, "a</s>")), "conversations[1].value"),
    "end in a later question": (train_row(conversations=talk(TWO, "a", "</s>?", "b")), "conversations[2].value"),
    "list of images": (train_row(image=..., images=["sub/a.png"], conversations=talk("What?", "a")), "images"),
    "capital": (train_row(image=None, Image="sub/a.png", conversations=talk("What?", "a")), "Image"),
    "any key": (train_row(image=..., picked="x/y.JPG", conversations=talk("What?", "a")), "picked"),
    "long name": (train_row(image=f"{'x' * 500}.png"), "image"),
    "base64": (train_row(image=f"data:image/png;base64,{'iVBORw0KGgo' * 100}"), "image"),
    "surrogate": (train_row(conversations=talk(TWO + "\ud83d", "a")), "conversations[0].value"),
}
BAD_QUESTIONS: dict[str, tuple[Any, str | None]] = {
    "no id": (question_row(question_id=...), "question_id"),
    "same id": (question_row(question_id="1"), "question_id"),
    "no text": (question_row(text=...), "text"),
    "no answer": (question_row(answer=...), "answer"),
    "answer type": (question_row(answer=3), "answer"),
    "answer list": (question_row(answer=["a", 3]), "answer[1]"),
    "two lists": (question_row(answer=["a"], answers=["b"]), "answer"),
    "empty list": (question_row(answer=[]), "answer"),
    "missing image": (question_row(image="b.png"), "image"),
    "end token": (question_row(text="What?</s>"), "text"),
    "long text": (question_row(text="yes " * 20_000), "text"),
    "half a pair": (question_row(answer=..., answers=["a", "\ud83d"]), "answers"),
    "spelling": (question_row(image=..., image_path="sub/a.png"), "image_path"),
    "pixels": (question_row(answer=..., answer_bbox=[10, 20, 300, 200]), "answer_bbox"),
    "percent": (question_row(answer=..., answer_bbox="[10.5, 20, 30, 99]"), "answer_bbox"),
}
BAD_ROWS = [("train", name) for name in BAD_TRAIN] + [("questions", name) for name in BAD_QUESTIONS]


@pytest.mark.parametrize(("kind", "case"), BAD_ROWS)
def test_a_bad_row_is_named_and_can_be_skipped(kind: str, case: str, root: Path) -> None:
    train = kind == "train"
    row, field = (BAD_TRAIN if train else BAD_QUESTIONS)[case]
    path = write(root, [train_row(id="good") if train else question_row(question_id=1), row])
    load, iterate = (load_train, iterate_train) if train else (load_questions, load_questions)
    with pytest.raises(ClmoeError) as caught:
        load(path, root)
    message = str(caught.value)
    assert message.startswith(f"{path}: row 1 (from 0)")
    assert field is None or f"field '{field}': " in message
    failed: list[ClmoeError] = []
    assert len(list(iterate(path, root, failed.append))) == 1
    assert [str(error) for error in failed] == [message]
    assert len(message) < 400 + len(str(path)), "long values are shortened"


def test_all_bad_rows_are_named_at_once_and_equal_faults_take_one_line(root: Path) -> None:
    rows = [train_row(id=...) for _ in range(200)] + [train_row(image=f"{n}.png") for n in range(3)] + [train_row()]
    rows += [train_row(conversations=[talk(TWO)[0], {"from": "gpt", "value": n}]) for n in range(2)]
    with pytest.raises(ClmoeError) as caught:
        load_train(write(root, rows), root)
    ids, images, answers = str(caught.value).splitlines()
    assert "200 rows (0-199), field 'id'" in ids
    assert "3 rows (200-202), field 'image'" in images and "0.png" in images
    assert "2 rows (204-205), field 'conversations[1].value'" in answers


@pytest.mark.parametrize("place", ["row", "turn", "nested"])
def test_a_key_that_occurs_twice_is_a_bad_row(place: str, root: Path) -> None:
    old, new = {
        "row": ('"id": "k1"', '"id": "k1", "id": "k2"'),
        "turn": ('"from": "gpt"', '"from": "gpt", "from": "gpt"'),
        "nested": ('"x": 1', '"x": 1, "x": 2'),
    }[place]
    text = json.dumps([train_row(id="good"), train_row(more=[{"x": 1}])])
    head, tail = text.rsplit(old, 1)
    with pytest.raises(ClmoeError, match=rf"row 1 .*field '{old.split(chr(34))[1]}'"):
        load_train(write(root, (head + new + tail).encode()), root)


@dataclass(frozen=True)
class Short:
    """Stands in for ``AnswersFit``: counts the characters of the first answer instead of its tokens."""

    key: str = "short"
    max_length: int = 5

    def __call__(self, record: TrainRecord, image_root: Path) -> tuple[int, int]:
        length = len(record.turns[0].answer)
        return (0, length) if length > 9 else (min(length, 5), max(0, length - 5))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("on_bad", ["skip", "mask"])
def test_bad_rows_can_be_left_out_or_masked_and_are_counted(
    on_bad: OnBad, large: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is the same when the file is read and, if it is large, when its cached records are used."""
    monkeypatch.setattr(records, "LARGE_FILE", 1 if large else 10**9)
    answers = ["Dog", "a</s>", "sixsix", "far too long"]
    rows = [train_row(id=f"k{n}", conversations=talk(TWO, answer), extra=n) for n, answer in enumerate(answers)]
    path = write(root, [*rows, train_row(id="t", image=..., conversations=talk("Say hi.", "hi"))])
    for _ in range(2):
        seen = Seen()
        found = load_train(path, root, on_bad, Short(), seen)
        assert isinstance(found, StoredRecords) == large
        assert [record.id for record in found if not record.masked] == ["k0", "k2", "t"]
        assert [row for row, record in enumerate(found) if record.masked] == ([] if on_bad == "skip" else [1, 3])
        assert [error.row for error in seen.bad if isinstance(error, RowError)] == [1, 3]
        assert (seen.rows, seen.cut, seen.without_image, seen.unread) == (5, [2], [4], {"extra": 2})
        assert len(seen.notes()) == 3
    with pytest.raises(ClmoeError, match=r"(?s)row 1 .*row 3 "):
        load_train(path, root, "error", Short())


def test_a_file_without_a_good_row_is_refused(root: Path) -> None:
    with pytest.raises(ClmoeError, match=r"(?s)file\.json.*2 rows \(0-1\), field 'id'"):
        load_train(write(root, [train_row(id=...), train_row(id=...)]), root, "skip")


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty list": (b"[]", "empty"),
    "object": (b'{"id": 1}', "list"),
    "empty file": (b"", "line 1, column 1"),
    "broken": (b'[\n {"id": 1,,}\n]', "line 2, column 11"),
    "lines": (b'{"id": 1}\n{"id": 2}\n', "line 2, column 1"),
    "byte-order mark": (b"\xef\xbb\xbf[]", "line 1"),
    "utf-16": ("[]".encode("utf-16"), "line 1"),
    "latin-1": (b'[\n"\xe9"]', "line 2"),
    "nan": (b'[{"size": NaN}]', "NaN"),
    "too deep": (b"[" * 100_000, "JSON"),
    "long number": (b"[" + b"1" * 5000 + b"]", "JSON"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named(case: str, root: Path) -> None:
    raw, place = BAD_FILES[case]
    path = write(root, raw)
    for load in (lambda: load_train(path, root), lambda: load_questions(path, root), lambda: count_records(path)):
        with pytest.raises(ClmoeError) as caught:
            load()
        assert str(caught.value).startswith(f"{path}: ")
        assert place in str(caught.value)


def test_missing_file_folder_and_image_root(root: Path) -> None:
    for path in (root / "nothing.json", root):
        with pytest.raises(ClmoeError, match=str(path)):
            load_train(path, root)
    with pytest.raises(ClmoeError, match=r"row 0 \(from 0\), id 'k1', field 'image': .*nowhere"):
        load_train(write(root, [train_row()]), root / "nowhere")
    with pytest.raises(ClmoeError, match=r"file\.json: row 1 \(from 0\)"):
        count_records(write(root, [train_row(), 3]))


# ---- Records that are made on access


@pytest.fixture
def large(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large, with repeated ids, text-only rows, two turns, umlauts, and several Arrow batches."""
    monkeypatch.setattr(records, "LARGE_FILE", 1)
    rows = []
    for n in range(2500):
        values = [f"{'<image>' if n % 3 else ''}Wofür? {n}", f"ß {n} \u2028", *(["Sure?", "yes"] if n % 5 == 0 else [])]
        rows.append(train_row(id=f"k{n % 4}", image="sub/a.png" if n % 3 else ..., conversations=talk(*values)))
    return write(root, rows)


def cached(root: Path) -> list[Path]:
    return list((root.parent / "cache").rglob("*.arrow"))


def test_stored_records_are_the_records(large: Path, root: Path) -> None:
    expected = list(iterate_train(large, root))
    loaded = load_train(large, root)
    assert isinstance(loaded, StoredRecords)
    assert list(loaded) == [loaded[i] for i in range(len(loaded))] == expected
    assert loaded[3:9:2] == expected[3:9:2] and loaded[-1] == expected[-1]
    for index in (2500, -2501):
        with pytest.raises(IndexError):
            loaded[index]
    pickled = pickle.dumps(loaded)  # loader workers get the file's name, not its content
    assert len(pickled) < 5000 < cached(root)[0].stat().st_size
    assert list(pickle.loads(pickled)) == expected


def test_the_cache_is_used_and_follows_the_content(large: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_train(large, root)
    with monkeypatch.context() as patch:
        patch.setattr(records, "iterate_train", lambda *_, **__: pytest.fail("read again"))
        large.touch()
        assert list(load_train(large, root)) == list(first)
    large.write_text(large.read_text().replace("\\u00df 3 ", "ss 3 "))
    assert load_train(large, root)[3].turns[0].answer == "ss 3"
    assert first[3].turns[0].answer == "ß 3"


@pytest.mark.parametrize("size", [0, 5, 3000, 100_000, -8, -1, None, "hole"])
def test_a_damaged_cache_is_found_and_made_again(
    size: int | str | None, large: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is truncated, is no Arrow file but ends like one, or has a hole, as a full disk leaves it."""
    expected = list(load_train(large, root))
    (file,) = cached(root)
    whole = file.read_bytes()
    hole = whole[:60_000] + bytes(2000) + whole[62_000:]
    file.write_bytes(hole if size == "hole" else bytes(100) + whole[-8:] if size is None else whole[:size])
    assert list(load_train(large, root)) == expected
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line and str(large) in line
    assert file.read_bytes() == whole


def test_processes_that_start_together_make_one_file(large: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = iterate_train, []
    monkeypatch.setattr(records, "iterate_train", lambda *given, **named: made.append(given) or real(*given, **named))
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: list(load_train(large, root)), range(4)))
    assert len(made) == 1
    assert all(found == loaded[0] for found in loaded) and len(loaded[0]) == 2500


def test_a_bad_row_of_a_large_file_is_named_and_nothing_is_kept(large: Path, root: Path) -> None:
    rows = json.loads(large.read_text())
    rows[2000]["image"] = "b.png"
    write(root, rows)
    for _ in range(2):
        with pytest.raises(ClmoeError, match=r"file\.json: row 2000 \(from 0\), id 'k0', field 'image'"):
            load_train(large, root)
    assert not cached(root)


def test_a_union_looks_records_up_in_their_part(tmp_path: Path) -> None:
    def part(name: str, count: int, passes: int = 1) -> Part:
        rows = [TrainRecord(str(n), None if n == 1 else f"{n}.png", ()) for n in range(count)]
        return Part.of(name, rows, tmp_path / name / "images", tmp_path, passes)

    union = UnionRecords([part("a", 3), part("b", 2, passes=2)])
    assert [record.id for record in union] == ["a/0", "a/1", "a/2", "b/0", "b/1", "b/0", "b/1"]
    assert [record.image for record in union][:4] == ["a/images/0.png", None, "a/images/2.png", "b/images/0.png"]
    assert len(union) == 7
    assert union[-1] == union[6] == union[4]
    assert union[1:3] == [union[1], union[2]]
    with pytest.raises(IndexError):
        union[7]
