"""What a method sees of the task being trained, and the trainings it may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from peft import PeftModel

    from clmoe.config import Config
    from clmoe.data.records import TrainRecord
    from clmoe.model.llava import LoadedBase


STATISTICS = "statistics.safetensors"  # what the routers did on each task so far; the report shows it
PLAN = "plan.json"  # a growing method's record of what each task added; the report shows it


@dataclass
class TaskContext:
    """What a method sees of the task being trained.

    Attributes:
        task, index: the task's name and its position in the sequence, from 0.
        records, image_root: its training set.
        config: the resolved configuration.
        model: base with adapter.
        work: folder that becomes the checkpoint; a method's state files go here. All processes of a command run the
            method, each with a folder of its own, and the main one's becomes the checkpoint.
        sealed: folder that holds, under each finished phase's name, the adapter exactly as that phase left it; in the
            main process's ``work``.
        trained: the newest of those.
        previous: the parent checkpoint, or None.
        data: the benchmark's folder, below which images of every task are found.
    """

    task: str
    index: int
    records: Sequence[TrainRecord]
    image_root: Path
    config: Config
    base: LoadedBase
    model: PeftModel
    work: Path
    sealed: Path
    trained: Path
    previous: Path | None
    data: Path = Path()

    @property
    def run(self) -> Path:
        """The run folder, which holds the checkpoints of the sequence."""
        return self.sealed.parent.parent

    def load(self, folder: Path) -> None:
        """Replace the live adapter by a saved one."""
        from clmoe.model.adapter import detach_adapter, load_adapter

        detach_adapter(self.model)
        self.model = load_adapter(self.base.model, folder, trainable=True)


@dataclass(frozen=True)
class Phase:
    """One training of a task; most methods have one.

    Attributes:
        name: of the phase, and of the folder its adapter is sealed in until the task ends.
        records, image_root: what it trains on.
        begin: called before training: grow, freeze, choose what trains.
        end: called when the trained adapter is sealed, also when an earlier process sealed it.
        learning_rate, steps: None for the configuration's.
        of_task: the records are the task's, which the benchmark may want to be passed over several times.
    """

    name: str
    records: Sequence[TrainRecord]
    image_root: Path
    begin: Callable[[TaskContext], None]
    end: Callable[[TaskContext], None]
    learning_rate: float | None = None
    steps: int | None = None
    of_task: bool = True
