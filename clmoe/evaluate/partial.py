"""Answers of a cell that is not complete yet, so that an interrupted evaluation goes on where it stopped.

Every process appends whole batches to a file of its own beside the cell's predictions; the files vanish with the
completed cell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmoe.utils.files import append_json_lines, json_sha256, read_json_lines
from clmoe.utils.processes import from_main, rank

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
            for row in read_json_lines(path):  # a cut one is missing, and its batch is answered again
                name = row.pop("question_id")
                found[name] = Answer(**row)
        return found

    def append(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Add one batch: question ids and their answers."""
        path = self.summary.with_name(f".{self.summary.stem}.partial-{self.key}-{rank()}.jsonl")
        append_json_lines(path, ({"question_id": name, **dataclasses.asdict(answer)} for name, answer in answers))

    def remove(self) -> None:
        """The cell is complete."""
        for path in self._files():
            path.unlink()

    def _files(self) -> list[Path]:
        return sorted(self.summary.parent.glob(f".{self.summary.stem}.partial-*.jsonl"))
