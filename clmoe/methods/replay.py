"""Experience replay: records of past tasks are mixed into the training of the new one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmoe.errors import ClmoeError
from clmoe.methods.context import Phase, TaskContext
from clmoe.methods.lora import Lora

if TYPE_CHECKING:
    from clmoe.data.records import TrainRecord

MEMORY = "memory.json"


@dataclass(frozen=True)
class Options:
    """Replay's own choices.

    Attributes:
        per_task: training records kept of each past task.
        ratio: share of them among the samples of a later task's training.
    """

    per_task: int = 100
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.per_task < 1:
            raise ClmoeError("options.per_task must be at least 1")
        if not 0 <= self.ratio < 1:
            raise ClmoeError(f"options.ratio {self.ratio} is not between 0 and below 1")


class Replay(Lora):
    """LoRA; the only method here, with its kin, that sees old tasks' data again."""

    Options = Options

    def check_inputs(self, previous: Path | None, data: Path) -> None:
        from clmoe.methods.memory import check_images, load_memory

        if previous is not None:
            check_images(load_memory(previous / MEMORY), previous / MEMORY, data)

    def phases(self, context: TaskContext) -> list[Phase]:
        """One training, on the task's records and the memory's."""
        from clmoe.data.union import Part
        from clmoe.methods.memory import load_memory, mixed

        if context.previous is None:
            return super().phases(context)
        memory = [record for past in load_memory(context.previous / MEMORY) for record in past.records]
        own = Part.of(context.task, context.records, context.image_root, context.data)
        records = mixed(own, memory, self.options.ratio)
        return [Phase("trained", records, context.data, self.begin_task, self.end_task)]

    def end_task(self, context: TaskContext) -> None:
        """Draw from the task's own records and add them to the parent's memory."""
        self.remember(context)

    def remember(self, context: TaskContext) -> list[TrainRecord]:
        """Write the memory with this task's records; returns those."""
        from clmoe.methods.memory import Remembered, load_memory, save_memory

        memory = [] if context.previous is None else load_memory(context.previous / MEMORY)
        size, seed = self.options.per_task, context.config.seed
        newest = Remembered.draw(context.task, context.records, size, seed, context.image_root, context.data)
        save_memory([*memory, newest], context.work / MEMORY)
        return newest.records


METHOD: Any = Replay
