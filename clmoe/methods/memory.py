"""A few training records of every past task: drawn once, kept as text in the checkpoint, their images left in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clmoe.data.batches import sample_records
from clmoe.data.records import TrainRecord, Turn
from clmoe.data.union import Part, UnionRecords
from clmoe.errors import ClmoeError
from clmoe.utils.files import read_json, write_json
from clmoe.utils.names import derived_seed


@dataclass(frozen=True)
class Remembered:
    """What is kept of one past task.

    Attributes:
        task, drawn_from, seed: where the records come from: the task's training set, its size, the run's seed.
        records: images are relative to the benchmark's folder, ids begin with the task's name.
    """

    task: str
    drawn_from: int
    seed: int
    records: list[TrainRecord]

    @classmethod
    def draw(
        cls, task: str, records: Sequence[TrainRecord], size: int, seed: int, image_root: Path, data: Path
    ) -> Remembered:
        """At most ``size`` of a task's records, each subset equally likely: a reservoir after one pass over them."""
        drawn = sample_records(records, size, derived_seed(seed, f"memory of {task}"))
        return cls(task, len(records), seed, UnionRecords([Part.of(task, drawn, image_root, data)])[:])

    def as_json(self) -> dict[str, Any]:
        records = [
            {"id": r.id, "image": r.image, "turns": [[turn.question, turn.answer] for turn in r.turns]}
            for r in self.records
        ]
        return {"task": self.task, "drawn_from": self.drawn_from, "seed": self.seed, "records": records}


def save_memory(memory: Sequence[Remembered], path: Path) -> None:
    """A JSON list, one entry for each past task, oldest first."""
    write_json(path, [remembered.as_json() for remembered in memory])


def load_memory(path: Path) -> list[Remembered]:
    """What ``save_memory`` wrote."""
    return [
        Remembered(
            entry["task"],
            entry["drawn_from"],
            entry["seed"],
            [TrainRecord(r["id"], r["image"], tuple(Turn(*turn) for turn in r["turns"])) for r in entry["records"]],
        )
        for entry in read_json(path)
    ]


def check_images(memory: Sequence[Remembered], path: Path, data: Path) -> None:
    """Every image that the memory points to is still there.

    Raises:
        ClmoeError: naming the file, the record, and the image.
    """
    for remembered in memory:
        for record in remembered.records:
            if record.image is not None and not (data / record.image).is_file():
                raise ClmoeError(
                    f"{path}: record {record.id!r}: no file {data / record.image}; past tasks' images are read where "
                    "they lay: put them back, or say with --data where the benchmark is now"
                )


def mixed(own: Part, memory: Sequence[TrainRecord], ratio: float) -> UnionRecords:
    """The task's own records, then as many of ``memory``, over and over in order, as make a share of ``ratio``."""
    wanted = round(len(own.records) * ratio / (1 - ratio)) if memory else 0
    return UnionRecords([own, Part("", "", [memory[i % len(memory)] for i in range(wanted)])])
