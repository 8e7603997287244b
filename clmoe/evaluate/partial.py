"""Answers of a cell that is not complete yet, so that an interrupted evaluation goes on where it stopped.

Every process appends whole batches to a file of its own beside the cell's predictions; the files vanish with the
completed cell.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmoe.system.files import json_sha256
from clmoe.system.processes import from_main, rank

if TYPE_CHECKING:
    from clmoe.evaluate.generate import Answer


@dataclass(frozen=True)
class PartialAnswers:
    """The files ``.<stem>.partial-<key>-<process>.jsonl`` of one cell.

    Attributes:
        summary: the cell's file; the partial ones lie beside it.
        key: hash of all that the answers depend on; files with another key are of no use.
    """

    summary: Path
    key: str

    @classmethod
    def of(cls, summary: Path, settings: Any) -> PartialAnswers:
        """``settings``: what the answers depend on, as JSON."""
        return cls(summary, json_sha256(settings)[:16])

    def read(self) -> dict[str, Answer]:
        """Answers by question id, from all processes of the interrupted command."""
        return from_main(self._read)

    def _read(self) -> dict[str, Answer]:
        from clmoe.evaluate.generate import Answer

        found = {}
        for path in self._files():
            if self.key not in path.name:
                path.unlink()
                continue
            for row in _whole_rows(path):
                name = row.pop("question_id")
                found[name] = Answer(**row)
        return found

    def append(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Add one batch: question ids and their answers."""
        path = self.summary.with_name(f".{self.summary.stem}.partial-{self.key}-{rank()}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"question_id": name, **dataclasses.asdict(answer)}) + "\n" for name, answer in answers]
        with path.open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a crash cut the last line off
                    lines.insert(0, "\n")
            file.write("".join(lines).encode())

    def remove(self) -> None:
        """The cell is complete."""
        for path in self._files():
            path.unlink()

    def _files(self) -> list[Path]:
        return sorted(self.summary.parent.glob(f".{self.summary.stem}.partial-*.jsonl"))


def _whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, without those that a crash cut off: their batches are answered again."""
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            yield json.loads(line)
        except ValueError:
            continue
