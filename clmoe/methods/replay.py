"""Records of past tasks are seen again: replay, and DER++ (NeurIPS 2020), which also keeps the logits of then."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Self

import torch
from peft import PeftModel
from torch import Tensor

from clmoe.bases.inputs import over_train_batches, train_dataset
from clmoe.data.batches import sample_records
from clmoe.data.records import Part, TrainRecord, Turn, UnionRecords
from clmoe.errors import ClmoeError
from clmoe.experts.forward import adapted_base, answer_logits, answer_rows, mean_over_samples
from clmoe.experts.routing import RouteTrace
from clmoe.methods.base import Phase, TaskContext
from clmoe.methods.lora import Lora
from clmoe.utils.files import read_json, write_json
from clmoe.utils.names import derived_seed
from clmoe.utils.schema import NotNegative, Range, Steps
from clmoe.utils.tensors import load_tensors, save_tensors

MEMORY, LOGITS = "memory.json", "memory_logits.safetensors"


@dataclass(frozen=True)
class Remembered:
    """What is kept of one past task; images are relative to the benchmark's folder, ids begin with the task's name."""

    task: str
    drawn_from: int
    seed: int
    records: list[TrainRecord]

    @classmethod
    def draw(
        cls, task: str, records: Sequence[TrainRecord], size: int, seed: int, image_root: Path, data: Path
    ) -> Self:
        """At most ``size`` of a task's records, each subset equally likely: a reservoir after one pass over them."""
        drawn = sample_records(records, size, derived_seed(seed, f"memory of {task}"))
        return cls(task, len(records), seed, UnionRecords([Part.of(task, drawn, image_root, data)])[:])


def save_memory(memory: Sequence[Remembered], path: Path) -> None:
    """A JSON list, one entry for each past task, oldest first; a turn is a pair."""
    entries = [asdict(remembered) for remembered in memory]
    for record in (record for entry in entries for record in entry["records"]):
        record["turns"] = [list(turn.values()) for turn in record["turns"]]
    write_json(path, entries)


def load_memory(checkpoint: Path | None) -> list[Remembered]:
    """What ``save_memory`` wrote; nothing without a checkpoint."""
    entries = [] if checkpoint is None else read_json(checkpoint / MEMORY)
    for entry in entries:
        turns = [tuple(Turn(*turn) for turn in record["turns"]) for record in entry["records"]]
        entry["records"] = [TrainRecord(**r | {"turns": t}) for r, t in zip(entry["records"], turns, strict=True)]
    return [Remembered(**entry) for entry in entries]


def check_memory(checkpoint: Path | None, data: Path) -> list[Remembered]:
    """As ``load_memory``. Raises ClmoeError unless every image that the memory points to is still there."""
    memory = load_memory(checkpoint)
    for record in (record for past in memory for record in past.records):
        if record.image is not None and not (data / record.image).is_file():
            raise ClmoeError(
                f"{checkpoint}/{MEMORY}: record {record.id!r}: no file {data / record.image}; past tasks' images are "
                "read where they lay: put them back, or say with --data where the benchmark is now"
            )
    return memory


def mixed(own: Part, memory: Sequence[TrainRecord], ratio: float) -> UnionRecords:
    """The task's own records, then as many of ``memory``, over and over in order, as make a share of ``ratio``."""
    wanted = round(len(own.records) * ratio / (1 - ratio)) if memory else 0
    return UnionRecords([own, Part("", "", [memory[i % len(memory)] for i in range(wanted)])])


@dataclass(frozen=True)
class MemoryOptions:
    """Choices of a method that keeps old records.

    Attributes:
        per_task: training records kept of each past task.
    """

    per_task: Steps = 100


class Remembers(Lora):
    """LoRA with a memory of every past task's records; what a method does with it is up to its kin."""

    Options: ClassVar[type] = MemoryOptions
    memory = "per_task"

    def check_inputs(self, previous: Path | None, data: Path) -> None:
        check_memory(previous, data)

    def end_task(self, context: TaskContext) -> None:
        """Draw from the task's own records and add them to the parent's memory."""
        size, seed = self.options.per_task, context.config.seed
        newest = Remembered.draw(context.task, context.records, size, seed, context.image_root, context.data)
        save_memory([*load_memory(context.previous), newest], context.work / MEMORY)


@dataclass(frozen=True)
class ReplayOptions(MemoryOptions):
    """Replay's own choices.

    Attributes:
        ratio: share of the memory in the samples of a later task's training.
    """

    ratio: Annotated[float, Range(0, 0.99)] = 0.5


class Replay(Remembers):
    """The memory is trained on again, mixed with the new task's records."""

    Options = ReplayOptions

    def phases(self, context: TaskContext) -> list[Phase]:
        """One training, on the task's records and the memory's."""
        if context.previous is None:
            return super().phases(context)
        memory = [record for past in load_memory(context.previous) for record in past.records]
        own = Part.of(context.task, context.records, context.image_root, context.data)
        records = mixed(own, memory, self.options.ratio)
        return [Phase("trained", records, context.data, self.begin_task, self.end_task)]


@dataclass(frozen=True)
class DerOptions(ReplayOptions):
    """DER's own choices, besides replay's.

    Attributes:
        weight: alpha, of the squared distance between logits.
    """

    weight: NotNegative = 0.1


class Der(Replay):
    """The memory also holds, for every token of its answers, the logits at the end of the record's own task."""

    Options = DerOptions
    reads_logits = True

    def begin_task(self, context: TaskContext) -> None:
        """Read the parent's logits; a memory record's place among them is its place in the memory."""
        self._own = len(context.records)
        self._logits = load_logits(context.previous)

    def extra_loss(self, model: PeftModel, trace: RouteTrace, batch: dict[str, Tensor]) -> Tensor | None:
        """``mean over samples and their tokens of |z - h|^2 / V``; samples of the new task count as 0."""
        if not self._logits:
            return None
        now, labels = batch["logits"], batch["labels"]
        before = now.detach().clone()
        of = answer_rows(labels)
        for row, place in enumerate(batch["rows"].tolist()):
            if place >= self._own:
                before[of == row] = self._logits[(place - self._own) % len(self._logits)].to(now)
        distances = torch.square(now - before).mean(-1)
        return self.options.weight * mean_over_samples(distances, labels)

    def end_task(self, context: TaskContext) -> None:
        """Draw the task's records, and store what the trained model says to them."""
        super().end_task(context)
        config, base, adapted = context.config, context.base, adapted_base(context.model.eval())
        records = load_memory(context.work)[-1].records

        def one(batch: dict[str, Tensor]) -> list[Tensor]:
            lengths = torch.bincount(answer_rows(batch["labels"]), minlength=len(batch["labels"]))
            return list(answer_logits(adapted, batch).cpu().split(lengths.tolist()))

        dataset = train_dataset(base, records, context.data, config.training.max_length)
        with torch.no_grad():
            batches = over_train_batches(base, dataset, config.evaluation.batch_size, one)
        old = load_logits(context.previous)
        every = [*old, *(logits for batch in batches for logits in batch)]
        save_tensors({f"{i:06}": logits.clone() for i, logits in enumerate(every)}, context.work / LOGITS)


def load_logits(checkpoint: Path | None) -> list[Tensor]:
    """``[n, V]`` float32 of each record of the memory, in its order."""
    return [] if checkpoint is None else [logits for _, logits in sorted(load_tensors(checkpoint / LOGITS).items())]


METHODS = {"replay": Replay, "der": Der}
