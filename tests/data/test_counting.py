"""Counting records in a file without keeping them: the same number as json.loads, wherever the window cuts the text."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from clmoe.data import counting
from clmoe.data.counting import count_records
from clmoe.errors import ClmoeError

ROWS = [{"id": n, "text": 'a "quote", [a, {b}] \\ ü \u2028', "nested": {"list": [1, {"x": None}]}} for n in range(40)]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_the_number_of_records(
    chunk: int, indent: int | None, ascii_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "CHUNK", chunk)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=indent, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
    assert count_records(path) == len(json.loads(path.read_text(encoding="utf-8"))) == 40


def test_an_empty_list_holds_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(" [ ] ")
    assert count_records(path) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"record 0 \(from 0\): expected a JSON list"),
        ('{"a": 1}', "expected a JSON list"),
        ('[{"a": 1}, 3]', r"record 1 \(from 0\): expected an object"),
        ('[{"a": 1} {"b": 2}]', r"record 1 \(from 0\): expected a comma"),
        ('[{"a": 1}, {"b": ', r"record 1 \(from 0\): broken JSON"),
        ('[{"a": 1}', r"record 1 \(from 0\): expected a comma or the end"),
        ('[{"a": 1},]', r"record 1 \(from 0\): expected an object"),
        ("\ufeff[]", "expected a JSON list"),
    ],
)
def test_what_is_no_list_of_records_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ClmoeError, match=rf"rows\.json: .*{message}"):
        count_records(path)


def test_bytes_that_are_no_text_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    with pytest.raises(ClmoeError, match=r"rows\.json: cannot be read"):
        count_records(path)
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(ClmoeError, match=r"rows\.json: cannot be read"):
        count_records(path)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """30 MB of rows are counted with a window of a few megabytes."""
    path, row = tmp_path / "rows.json", json.dumps({"id": "x", "text": "y" * 2900})
    path.write_text("[" + ",".join([row] * 10_000) + "]")
    tracemalloc.start()
    try:
        assert count_records(path) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_torch_is_not_imported() -> None:
    code = "import sys; sys.argv = ['clmoe']; import clmoe.data.counting; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0
