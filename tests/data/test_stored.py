"""Training files that are kept on disk as Arrow, and the union of several: equal to the list in memory."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clmoe.data import json_rows as json_rows_module
from clmoe.data import records, stored
from clmoe.data.json_rows import json_rows
from clmoe.data.records import TrainRecord, iterate_train, load_train
from clmoe.data.union import Part, UnionRecords
from clmoe.errors import ClmoeError
from tests.trees import draw, train_row


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large: repeated ids, text-only rows, two turns, umlauts; more rows than one batch."""
    monkeypatch.setattr(records, "LARGE_FILE", 1)
    monkeypatch.setattr(json_rows_module, "_AT_ONCE", 1)
    monkeypatch.setattr(stored, "_BATCH", 7)
    monkeypatch.setenv(stored.CACHE_VARIABLE, str(tmp_path / "cache"))
    draw(tmp_path, "images/a.png", 0)
    rows = []
    for n in range(25):
        row = train_row(f"k{n % 4}", "a.png" if n % 3 else None, f"Wofür? {n}", f"ß {n} \u2028")
        if n % 5 == 0:
            row["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"}]
        rows.append(row)
    (tmp_path / "train.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    return tmp_path / "train.json"


def test_stored_records_are_the_records(large: Path) -> None:
    images = large.parent / "images"
    expected = list(iterate_train(large, images))
    loaded = load_train(large, images)
    assert isinstance(loaded, stored.StoredRecords)
    assert list(loaded) == [loaded[i] for i in range(len(loaded))] == expected
    assert [r.id for r in loaded][:9] == ["k0", "k1", "k2", "k3", "k0#2", "k1#2", "k2#2", "k3#2", "k0#3"]
    assert loaded[-1] == expected[-1]
    assert loaded[3:9:2] == expected[3:9:2]
    for index in (25, -26):
        with pytest.raises(IndexError):
            loaded[index]
    again = pickle.loads(pickle.dumps(loaded))
    assert len(pickle.dumps(loaded)) < 500
    assert list(again) == expected


def test_the_cache_is_used_and_follows_the_content(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = large.parent / "images"
    first = load_train(large, images)
    monkeypatch.setattr(stored, "iterate_train", lambda *_: pytest.fail("read again"))
    large.touch()
    assert list(load_train(large, images)) == list(first)
    monkeypatch.undo()
    monkeypatch.setattr(records, "LARGE_FILE", 1)
    monkeypatch.setenv(stored.CACHE_VARIABLE, str(large.parent / "cache"))
    large.write_text(large.read_text().replace("ß 3", "ss 3"))  # as many bytes
    assert load_train(large, images)[3].turns[0].answer == "ss 3"
    assert first[3].turns[0].answer == "ß 3"


def test_a_bad_row_of_a_large_file_is_named_and_nothing_is_kept(large: Path) -> None:
    rows = json.loads(large.read_text())
    rows[20]["image"] = "b.png"
    rows[20]["conversations"][0]["value"] = "<image>\nWhat?"
    large.write_text(json.dumps(rows))
    for _ in range(2):
        with pytest.raises(ClmoeError, match=r"train\.json: row 20 \(from 0\), id 'k0', field 'image': no file"):
            load_train(large, large.parent / "images")
    assert not list((large.parent / "cache").rglob("*.arrow"))


BROKEN: dict[str, Callable[[str], str]] = {
    "cut": lambda text: text[:-20],
    "comma": lambda text: text.rstrip()[:-1] + ",]",
    "twice": lambda text: text + "[]",
    "constant": lambda text: text.replace('"Sure?"', "NaN", 1),
    "object": lambda text: '{"a": ' + text + "}",
    "empty": lambda text: " [ ] ",
    "colon": lambda text: text.replace("},", "};", 1),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_large_file_is_told_as_a_small_one(case: str, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large.write_text(BROKEN[case](large.read_text()))
    with pytest.raises(ClmoeError) as of_large:
        list(json_rows(large))
    monkeypatch.setattr(json_rows_module, "_AT_ONCE", 2**20)
    with pytest.raises(ClmoeError) as of_small:
        list(json_rows(large))
    assert str(of_large.value) == str(of_small.value)


def test_small_files_are_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stored.CACHE_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "train.json").write_text(json.dumps([train_row("1", None, "What?", "it")]))
    assert isinstance(load_train(tmp_path / "train.json", tmp_path), list)
    assert not (tmp_path / "cache").exists()


def test_union_looks_records_up_in_their_part() -> None:
    def part(name: str, count: int, passes: int = 1, **kinds: Any) -> Part:
        rows = [TrainRecord(str(n), None if n == 1 else f"{n}.png", ()) for n in range(count)]
        return Part(name, f"{name}/images", rows, passes)

    union = UnionRecords([part("a", 3), part("b", 2, passes=2)])
    assert [record.id for record in union] == ["a/0", "a/1", "a/2", "b/0", "b/1", "b/0", "b/1"]
    assert [record.image for record in union][:4] == ["a/images/0.png", None, "a/images/2.png", "b/images/0.png"]
    assert len(union) == 7
    assert union[-1] == union[6] == union[4]
    assert union[1:3] == [union[1], union[2]]
    with pytest.raises(IndexError):
        union[7]
