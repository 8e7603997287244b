"""What the tests of methods share: a task's records, a method at the start of a task, the inputs of modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from peft import PeftModel
from torch import Tensor, nn

from clmoe.bases.inputs import train_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.config import load_config
from clmoe.data.batches import TrainDataset
from clmoe.data.records import TrainRecord, load_train
from clmoe.experts.model import load_adapter
from clmoe.methods import method_class
from clmoe.methods.base import Method, TaskContext
from clmoe.utils.tensors import same_bits
from tests.runs import Runs, tensors, texts
from tests.support import TASKS

NewBase = Callable[[], LoadedBase]


def task_records(benchmark: Path, task: str, count: int | None = None) -> tuple[list[TrainRecord], Path]:
    """The first ``count`` training records of a task (by default all), and their image folder."""
    folder = benchmark.parent / task
    return list(load_train(folder / "train.json", folder / "images"))[:count], folder / "images"


def task_data(base: LoadedBase, benchmark: Path, task: str, count: int | None = None) -> TrainDataset:
    return train_dataset(base, *task_records(benchmark, task, count), 2048)


def begun(
    method: str, base: LoadedBase, runs: Runs, previous: Path, *overrides: str, records: Sequence[TrainRecord] = ()
) -> tuple[Method, PeftModel]:
    """Begin the second task, which follows the checkpoint ``previous``; returns the method and its model."""
    config = load_config(method, {}, list(overrides), str(runs.model))
    model = load_adapter(base.model, previous, trainable=True)
    here, root = Path("unused"), runs.benchmark.parent
    images = root / TASKS[1] / "images"
    started = method_class(method)(config)
    started.begin_task(TaskContext(TASKS[1], 1, records, images, config, base, model, here, here, here, previous, root))
    return started, model


def watch_inputs(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The input of each module in its latest forward pass, by name; every pass updates the dictionary."""
    inputs: dict[str, Tensor] = {}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    return inputs


def same_adapter(first: Path, second: Path) -> bool:
    """Whether the adapters of two checkpoints hold equal bits under equal names."""
    mine, other = tensors(first), tensors(second)
    return mine.keys() == other.keys() and all(same_bits(value, other[name]) for name, value in mine.items())


def answers_alone_and_together(checkpoint: Path, runs: Runs, out: Path) -> list[list[str]]:
    """A checkpoint's answers to the questions of all tasks, asked one by one and in batches of 64."""
    return [
        texts(runs.evaluate(checkpoint, out / size, f"evaluation.batch_size={size}"), TASKS[-1], *TASKS)
        for size in ("1", "64")
    ]
