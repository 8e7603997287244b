"""Records of past tasks, kept for later ones: how they are drawn, stored and loaded."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Self

from clmoe.data.batches import sample_records
from clmoe.data.records import Part, TrainRecord, Turn, UnionRecords
from clmoe.errors import ClmoeError
from clmoe.methods.base import TaskContext
from clmoe.methods.lora import Lora
from clmoe.utils.files import read_json, write_json
from clmoe.utils.names import derived_seed
from clmoe.utils.schema import Steps

MEMORY = "memory.json"


@dataclass(frozen=True)
class Remembered:
    """What is kept of one past task; images are relative to the benchmark's folder, ids begin with the task's name."""

    task: str
    drawn_from: int
    seed: int
    records: list[TrainRecord]

    @classmethod
    def of(cls, context: TaskContext, size: int) -> Self:
        """At most ``size`` of the task's records, each subset equally likely, as in a reservoir after one pass."""
        task, seed = context.task, context.config.seed
        drawn = sample_records(context.records, size, derived_seed(seed, f"memory of {task}"))
        records = UnionRecords([Part.of(task, drawn, context.image_root, context.data)])[:]
        return cls(task, len(context.records), seed, records)


def save_memory(memory: Sequence[Remembered], path: Path) -> None:
    """Write a JSON list, one entry per past task, oldest first; a turn is a pair."""
    entries = [asdict(remembered) for remembered in memory]
    for record in (record for entry in entries for record in entry["records"]):
        record["turns"] = [list(turn.values()) for turn in record["turns"]]
    write_json(path, entries)


def load_memory(checkpoint: Path | None) -> list[Remembered]:
    """What ``save_memory`` wrote; an empty list without a checkpoint."""
    entries = [] if checkpoint is None else read_json(checkpoint / MEMORY)
    for entry in entries:
        turns = [tuple(Turn(*turn) for turn in record["turns"]) for record in entry["records"]]
        entry["records"] = [TrainRecord(**r | {"turns": t}) for r, t in zip(entry["records"], turns, strict=True)]
    return [Remembered(**entry) for entry in entries]


def check_memory(checkpoint: Path | None, data: Path) -> list[Remembered]:
    """Like ``load_memory``. Raises ClmoeError unless every image that the memory refers to is still there."""
    memory = load_memory(checkpoint)
    for record in (record for past in memory for record in past.records):
        if record.image is not None and not (data / record.image).is_file():
            raise ClmoeError(
                f"{checkpoint}/{MEMORY}: record {record.id!r}: no file {data / record.image}; past tasks' images are "
                "read from where they were: put them back, or say with --data where the benchmark is now"
            )
    return memory


@dataclass(frozen=True)
class MemoryOptions:
    """Choices of a method that keeps old records.

    Attributes:
        per_task: training records kept of each past task.
    """

    per_task: Steps = 100


class Remembers(Lora):
    """LoRA with a memory of every past task's records; subclasses decide what to do with it."""

    Options: ClassVar[type] = MemoryOptions
    memory = "per_task"

    def check_inputs(self, previous: Path | None, data: Path) -> None:
        check_memory(previous, data)

    def end_task(self, context: TaskContext) -> None:
        """Draw from the task's own records and add them to the parent's memory."""
        newest = Remembered.of(context, self.options.per_task)
        save_memory([*load_memory(context.previous), newest], context.work / MEMORY)
