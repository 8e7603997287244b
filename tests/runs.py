"""Run commands on the miniature benchmark; shared checkpoints are trained once per session and never changed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clmoe import cli
from clmoe.contract import Killed
from clmoe.train.loop import TaskTrainer
from tests.support import TASKS

_SEEDS = count(1000)

DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-2] + bytes([path.read_bytes()[-2] ^ 1, 10])),
    "deleted": lambda path: path.unlink(),
}

LLAVA_CMOE = (
    "adapter.train_projector=false",
    "options.initial_experts_from=first_task",
    *(f"locator.options.{value}" for value in ("steps=20", "hidden=16", "latent=4", "held_out=0.5")),
)
"""Settings with which it is trained in seconds."""
FAST = {"vae": ("locator.options.steps=20", "locator.options.hidden=8", "locator.options.latent=2")}
"""The same for locators."""


def kill(*unused: Any, **also_unused: Any) -> None:
    raise Killed


def on_step(patch: pytest.MonkeyPatch, number: int, act: Callable[[], None] = kill) -> list[int]:
    """Call ``act`` before the ``number``-th forward pass from now (from 0); the returned list grows with every pass."""
    real, seen = TaskTrainer.training_step, []

    def step(self: TaskTrainer, *args: Any, **kwargs: Any) -> Any:
        if len(seen) == number:
            act()
        seen.append(self.state.global_step)
        return real(self, *args, **kwargs)

    patch.setattr(TaskTrainer, "training_step", step)
    return seen


@dataclass
class Runs:
    """Runs ``clmoe`` in this process on the tiny model and the miniature benchmark.

    Attributes:
        root: the folder of the shared runs.
        model, benchmark: the folder of the tiny LLaVA and the YAML of the benchmark.
    """

    root: Path
    model: Path
    benchmark: Path
    made: dict[tuple[str, ...], list[Path]] = field(default_factory=dict)

    def train(
        self, output: Path, method: str, task: str, *overrides: str, previous: Path | None = None, **options: str
    ) -> Path:
        """Run ``clmoe train``, where ``options`` become ``--name value``; return ``output``.

        A later task without ``previous`` begins an order of its own.
        """
        if previous is None and task in TASKS[1:]:
            options = {"order": task} | options
        chosen = {"model": str(self.model), "benchmark": str(self.benchmark), **options}
        arguments = ["train", "--config", method, "--task", task, "--output", str(output)]
        for name, value in chosen.items():
            arguments += [f"--{name.replace('_', '-')}", *([value] if value else [])]
        if previous is not None:
            arguments += ["--previous", str(previous)]
        _move_generators()
        cli.main([*arguments, *overrides])
        return output

    def evaluate(
        self, checkpoint: Path | str, output: Path, *overrides: str, locator: str | None = None, **options: str
    ) -> Path:
        """Run ``clmoe eval``, with another locator than the checkpoint's if one is named; return ``output``."""
        arguments = ["eval", "--checkpoint", str(checkpoint), "--output", str(output)]
        overrides = (*overrides, *([] if locator is None else [f"locator={locator}"]))
        for name, value in {"benchmark": str(self.benchmark), **options}.items():
            arguments += [f"--{name}", value]
        cli.main([*arguments, *overrides])
        return output

    def chain(self, method: str, *overrides: str, tasks: tuple[str, ...] = TASKS[:2]) -> list[Path]:
        """The checkpoints of ``tasks``, trained one after the other. Tests share them and must not change them."""
        key = (method, *overrides)
        done = self.made.setdefault(key, [])
        run = self.root / f"{len(self.made)}-{method}"
        if done:
            run = done[0].parent
        for task in tasks[len(done) :]:
            previous = done[-1] if done else None
            done.append(self.train(run / task, method, task, *overrides, previous=previous))
        return done[: len(tasks)]

    def copy(self, checkpoint: Path, target: Path) -> Path:
        """Copy a checkpoint for a test that damages it."""
        return Path(shutil.copytree(checkpoint, target))


def _move_generators() -> None:
    """Give the global generators another state before each training: a result that depends on it will not repeat."""
    seed = next(_SEEDS)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors in the adapter file, by name."""
    return load_file(checkpoint / "adapter_model.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below ``folder``, by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def texts(run: Path, after: str, *cells: str) -> list[str]:
    """The answers of these cells in order; they must not all be the same, or comparing them would show nothing."""
    files = [run / "predictions" / after / f"{cell}.jsonl" for cell in cells]
    found = [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]
    assert len(set(found)) > 2, f"all answers are {set(found)}"
    return found


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of ``events.jsonl`` for one kind of event."""
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]
