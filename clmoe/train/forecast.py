"""What a whole sequence takes: steps, memory per GPU, disk, and the files it lacks. Nothing is loaded or trained."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clmoe.benchmarks.base import Benchmark, Task
from clmoe.config import Config
from clmoe.data.counting import count_records
from clmoe.errors import ClmoeError
from clmoe.methods.base import Method
from clmoe.methods.plan import Plan
from clmoe.system.memory import (
    FLOAT32,
    Micro,
    Sharding,
    State,
    activation_peak,
    training_state,
)
from clmoe.train.order import BatchPlan, total_steps
from clmoe.utils.paths import resolve_model_path

TEXT_TOKENS = 64
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Ask:
    """What ``clmoe plan`` is asked besides the configuration.

    Attributes:
        tokens: of a sample, image included; None stands for the image and 64 tokens of text.
        answer_tokens: of a sample.
    """

    sharding: Sharding = field(default_factory=Sharding)
    tokens: int | None = None
    answer_tokens: int = ANSWER_TOKENS


@dataclass(frozen=True)
class TaskCount:
    """Records of a task's files, None where a file is missing; optimizer steps, None where they cannot be known."""

    name: str
    train: int | None
    test: int | None
    steps: int | None


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU in the first task's training; ``activations`` and ``total`` are (kept, recomputed) by tokens."""

    micro: Micro
    state: State
    activations: dict[int, tuple[int, int]]

    def totals(self, tokens: int) -> tuple[int, int]:
        """State and activations together, without and with recomputation."""
        kept, recomputed = self.activations[tokens]
        return self.state.total + kept, self.state.total + recomputed

    def as_json(self) -> dict[str, Any]:
        """Bytes."""
        rows = {}
        for tokens, (kept, recomputed) in self.activations.items():
            total = self.totals(tokens)
            rows[str(tokens)] = {
                "activations": kept,
                "activations_recomputed": recomputed,
                "total": total[0],
                "total_recomputed": total[1],
            }
        state = {name.replace(" ", "_"): size for name, size in self.state.gpu.items()}
        answers = self.micro.answer_tokens
        return {"state": state, "host": self.state.host, "answer_tokens": answers, "by_tokens": rows}


@dataclass(frozen=True)
class Disk:
    """Bytes of a run folder: finished checkpoints, what an unfinished task needs besides, features of the locator.

    ``vision``: of what ``CLMOE_VISION`` would keep elsewhere, if no record shares its image with another.
    """

    checkpoints: int
    unfinished: int
    features: int | None
    vision: int | None

    @property
    def total(self) -> int:
        return self.checkpoints + self.unfinished + (self.features or 0)

    def as_json(self) -> dict[str, Any]:
        """Bytes; ``features`` and ``vision`` are None where records could not be counted; the total is without it."""
        parts = {"checkpoints": self.checkpoints, "unfinished_task": self.unfinished, "features": self.features}
        return {**parts, "total": self.total, "vision": self.vision}


@dataclass(frozen=True)
class Forecast:
    """The second half of ``clmoe plan``.

    Attributes:
        batches: how a global batch is cut; None when nothing is trained.
        missing: files and folders that a run would stop at.
        notes: what will be fetched or made.
    """

    tasks: list[TaskCount]
    batches: BatchPlan | None
    recompute: bool
    memory: Memory | None
    disk: Disk | None
    missing: list[str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """What ``clmoe plan --json`` adds to the parameters."""
        batches = self.batches
        return {
            "tasks": [
                {"task": t.name, "train_records": t.train, "test_records": t.test, "steps": t.steps} for t in self.tasks
            ],
            "batch": None
            if batches is None
            else {
                "global": batches.batch_size,
                "gpus": batches.processes,
                "micro": batches.micro,
                "accumulation": batches.accumulation,
            },
            "gradient_checkpointing": self.recompute,
            "memory": None if self.memory is None else self.memory.as_json(),
            "disk": None if self.disk is None else self.disk.as_json(),
            "missing": self.missing,
            "notes": self.notes,
        }


def make_forecast(method: Method, benchmark: Benchmark, order: list[str], plan: Plan, ask: Ask) -> Forecast:
    """Count records, and work out the rest from the plan's shapes.

    Raises:
        ClmoeError: a global batch that cannot be cut over the GPUs.
    """
    config = method.config
    chosen = [benchmark.task(name) for name in order]
    missing, notes = _absent(method, benchmark, chosen)
    counts = [_count(task, config, missing) for task in chosen]
    training = config.training
    union = method.chain == "union"
    batches = memory = disk = None
    tasks = counts
    if plan.training is None:
        tasks = [TaskCount(c.name, c.train, c.test, 0) for c in counts]
    else:
        gpus = ask.sharding.gpus
        batches = BatchPlan(config.seed, 0, training.batch_size, training.micro_batch_size, gpus)
        memory = _memory(config, plan, ask, batches.micro)
        tasks = [*counts, _union(config, chosen, counts)] if union else counts
        steps = sum(t.steps or 0 for t in tasks[-1:]) if union else max((t.steps or 0 for t in tasks), default=0)
        disk = _disk(method, plan, counts, steps)
    return Forecast(tasks, batches, training.gradient_checkpointing, memory, disk, missing, notes)


def _count(task: Task, config: Config, missing: list[str]) -> TaskCount:
    """A file that is there and cannot be counted is as good as missing."""
    found: list[int | None] = []
    for path in (task.train, task.test):
        found.append(None)
        if path.is_file():
            try:
                found[-1] = count_records(path)
            except ClmoeError as error:
                missing.append(str(error))
    train, test = found
    return TaskCount(task.name, train, test, _steps(config, train, config.training.steps, task.passes))


def _steps(config: Config, records: int | None, fixed: int | None, passes: int = 1) -> int | None:
    if fixed is None and not records:
        return None
    return total_steps(records or 0, config.training.batch_size, config.training.epochs * passes, fixed)


def _union(config: Config, tasks: list[Task], counts: list[TaskCount]) -> TaskCount:
    """All tasks at once, each with its passes, as ``clmoe train --task all`` takes them."""
    trains = [c.train * task.passes for task, c in zip(tasks, counts, strict=True) if c.train is not None]
    train = sum(trains) if len(trains) == len(counts) else None
    fixed = config.training.steps
    steps = _steps(config, train, None if fixed is None else fixed * len(counts))
    return TaskCount("all", train, None, steps)


def _absent(method: Method, benchmark: Benchmark, tasks: list[Task]) -> tuple[list[str], list[str]]:
    """(what is missing, what will be fetched or made)."""
    missing: list[str] = []
    notes: list[str] = []
    if benchmark.built_on_first_use and not benchmark.root.exists():
        notes.append(f"{benchmark.root} is made by the first training (or by clmoe data prepare {benchmark.name})")
    else:
        if not benchmark.root.is_dir():
            missing.append(f"data folder {benchmark.root}")
        names = [task.name for task in tasks]
        missing += [f"{name}: {kind} file {path}" for name, kind, path in benchmark.missing_files() if name in names]
        for task in tasks:
            if not task.image_root.is_dir():
                missing.append(f"{task.name}: image folder {task.image_root}")
    for check in (lambda: _require_model(method.config, notes), lambda: method.check_inputs(None, benchmark.root)):
        try:
            check()
        except ClmoeError as error:
            missing.append(str(error))
    return missing, notes


def _require_model(config: Config, notes: list[str]) -> None:
    """The weights are in a folder or in the hub's cache, or, as a note says, can be fetched.

    Raises:
        ClmoeError: none of these.
    """
    path = config.model.path
    folder = Path(resolve_model_path(path))
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")):
            raise ClmoeError(f"model {folder}: no *.safetensors in it")
        return
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(path, "config.json"), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise ClmoeError(f"model {path}: neither a folder nor in the hub's cache, and HF_HUB_OFFLINE is set")
    notes.append(f"model {path} is not here: fetched from the hub by the first training")


def _memory(config: Config, plan: Plan, ask: Ask, samples: int) -> Memory:
    """At the usual length and at ``training.max_length``."""
    assert plan.training is not None
    shapes = plan.training
    usual = ask.tokens or shapes.llava.image_tokens + TEXT_TOKENS
    activations = {}
    for tokens in sorted({min(usual, config.training.max_length), config.training.max_length}):
        answers = min(ask.answer_tokens, tokens)
        micro = Micro(samples, tokens, answers, shapes.dtype_bytes, config.model.attention)
        kept, recomputed = (activation_peak(shapes.llava, shapes.attached, micro, again) for again in (False, True))
        activations[tokens] = (kept, recomputed)
    return Memory(micro, training_state(shapes.tensors, ask.sharding), activations)


def _disk(method: Method, plan: Plan, counts: list[TaskCount], steps: int) -> Disk:
    """A checkpoint holds the whole adapter, so a method that grows writes more for every task."""
    assert plan.training is not None
    number = {"union": 1}.get(method.chain, len(counts))
    later = method.chain == "sequence"
    adapters = [plan.training.adapter_bytes + (index * plan.locator if later else 0) for index in range(1, number + 1)]
    if plan.growth is not None:
        grown, growth = 0, plan.growth
        blocks = growth.blocks if growth.extended_blocks is None else growth.extended_blocks
        for index in range(1, number):
            routers = growth.blocks * growth.router + index * blocks * growth.router_row
            grown += round(FLOAT32 * (blocks * growth.one_expert + routers))
            adapters[index] += grown
    training = method.config.training
    states = min(training.keep_states, (steps - 1) // training.save_steps) + 1 if training.save_steps and steps else 1
    unfinished = 3 * plan.training.tensors.trainable_bytes * states + adapters[-1]
    return Disk(sum(adapters), unfinished, _features(method, plan, counts), _vision(plan, counts))


def _features(method: Method, plan: Plan, counts: list[TaskCount]) -> int | None:
    """float32 features of a task's first training samples and of all its questions."""
    assert plan.training is not None
    if not method.finds_task or os.environ.get("CLMOE_FEATURES"):
        return 0
    if any(c.train is None or c.test is None for c in counts):
        return None
    rows = sum(min(method.located_on, c.train or 0) + (c.test or 0) for c in counts)
    return rows * plan.training.llava.hidden * FLOAT32


def _vision(plan: Plan, counts: list[TaskCount]) -> int | None:
    """The tower's states of an image for every record and question."""
    assert plan.training is not None
    if any(c.train is None or c.test is None for c in counts):
        return None
    shapes, images = plan.training.llava, sum((c.train or 0) + (c.test or 0) for c in counts)
    return images * shapes.patches * shapes.vision_hidden * plan.training.dtype_bytes
