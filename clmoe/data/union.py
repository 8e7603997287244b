"""The records of several tasks as one sequence, for methods that train on more than one task's."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path, PurePosixPath

from clmoe.data.records import LookedUpRecords, TrainRecord


@dataclass(frozen=True)
class Part:
    """One task's records.

    Attributes:
        name: goes before the records' ids, unless it is empty.
        folder: of its images, relative to the union's image root.
        passes: how often its records occur in the union.
    """

    name: str
    folder: str
    records: Sequence[TrainRecord]
    passes: int = 1

    @classmethod
    def of(cls, name: str, records: Sequence[TrainRecord], image_root: Path, root: Path, passes: int = 1) -> Part:
        """A task's records, in a union whose images are relative to ``root``."""
        return cls(name, os.path.relpath(image_root, root), records, passes)


class UnionRecords(LookedUpRecords):
    """The parts one after the other; a record is looked up in its part when it is asked for."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._ends = list(accumulate(len(part.records) * part.passes for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def record(self, position: int) -> TrainRecord:
        number = bisect_right(self._ends, position)
        part = self.parts[number]
        record = part.records[(position - (self._ends[number - 1] if number else 0)) % len(part.records)]
        image = None if record.image is None else str(PurePosixPath(part.folder) / record.image)
        return replace(record, id=f"{part.name}/{record.id}" if part.name else record.id, image=image)
