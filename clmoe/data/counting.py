"""How many records a training or question file holds, without keeping them. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from clmoe.errors import ClmoeError

CHUNK = 1 << 20
SPACE = " \t\n\r"


def count_records(path: Path) -> int:
    """Number of objects in the JSON list that the file holds; one is decoded at a time and dropped.

    Raises:
        ClmoeError: unreadable, or not a list of objects; the record is named. Their fields are not looked at.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return _Scan(path, file.read).count()
    except (OSError, UnicodeDecodeError) as error:
        raise ClmoeError(f"{path}: cannot be read: {error}") from error


class _Scan:
    """A window on the file's text that moves from record to record."""

    def __init__(self, path: Path, read: Callable[[int], str]) -> None:
        self.path, self.read = path, read
        self.text, self.at, self.records, self.size = "", 0, 0, CHUNK
        self.decoder = json.JSONDecoder()

    def count(self) -> int:
        if self.next() != "[":
            self.fail("expected a JSON list of records at the top level")
        self.at += 1
        if self.next() == "]":
            return 0
        while True:
            if self.next() != "{":
                self.fail("expected an object {...}")
            self.skip_object()
            self.records += 1
            mark = self.next()
            if mark == "]":
                return self.records
            if mark != ",":
                self.fail("expected a comma or the end of the list after it")
            self.at += 1

    def more(self) -> bool:
        """Read on, dropping what lies behind; False at the file's end."""
        read = self.read(self.size)
        self.text, self.at = self.text[self.at :] + read, 0
        return bool(read)

    def next(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def skip_object(self) -> None:
        """Step over the object that begins here; what the window cuts is tried again with twice as much text."""
        self.size = CHUNK
        while True:
            try:
                _, self.at = self.decoder.raw_decode(self.text, self.at)
                return
            except json.JSONDecodeError as error:
                self.size *= 2
                if not self.more():
                    self.fail(f"broken JSON: {error.msg}")
            except RecursionError:
                self.fail("nested too deeply")

    def fail(self, problem: str) -> None:
        raise ClmoeError(f"{self.path}: record {self.records} (from 0): {problem}")
