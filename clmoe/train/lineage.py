"""A checkpoint's place in its sequence: ``continual.json``, and what may follow what. Free of torch, so it is fast."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmoe.config import Config, recorded, reload_config
from clmoe.errors import ClmoeError
from clmoe.train.checkpoint import verify
from clmoe.utils.files import json_sha256, read_json

if TYPE_CHECKING:
    from peft import PeftModel

    from clmoe.methods.base import Method

LINEAGE = "continual.json"
CONFIG = "config.yaml"
# What may change while a task is trained: how its global batches are computed, how often its state is saved and logged.
FREE_TRAINING_KEYS = (
    "micro_batch_size", "gradient_checkpointing", "workers", "save_steps", "keep_states", "logging_steps", "trackers",
)  # fmt: skip
RECORDED_VERSIONS = ("clmoe", "torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Lineage:
    """Content of ``continual.json``.

    Attributes:
        tasks: learned so far, oldest first.
        parent: manifest sha256 of the checkpoint it continues, None for the first.
        base: fingerprint of the frozen base.
        config_sha256: of everything that determines the training, see ``training_identity``.
        steps: optimizer steps of this task.
        trainable_parameters: while training this task; ``adapter_parameters`` counts frozen ones too.
        effective_scale: ``s`` times the mean gate, None where it has no meaning.
    """

    method: str
    benchmark: str
    tasks: list[str]
    seed: int
    parent: str | None
    base: str
    config_sha256: str
    steps: int
    trainable_parameters: int
    adapter_parameters: int
    effective_scale: float | None
    versions: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def lineage_of(
    method: Method,
    model: PeftModel,
    *,
    benchmark: str,
    tasks: list[str],
    parent: Finished | None,
    base: str,
    steps: int,
) -> Lineage:
    """That of a checkpoint of this adapted model; ``base`` is the frozen base's fingerprint."""
    from clmoe.model.adapter import count_parameters

    trainable, adapter = count_parameters(model)
    return Lineage(
        method=method.config.method,
        benchmark=benchmark,
        tasks=tasks,
        seed=method.config.seed,
        parent=None if parent is None else parent.identity,
        base=base,
        config_sha256=training_identity(method.config),
        steps=steps,
        trainable_parameters=trainable,
        adapter_parameters=adapter,
        effective_scale=method.effective_scale(),
        versions=versions(),
    )


def training_identity(config: Config) -> str:
    """sha256 over what determines a task's training."""
    return json_sha256(_decisive(config))


def _decisive(config: Config) -> dict[str, Any]:
    """All but the evaluation settings, the label, and what changes a result by rounding at most."""
    values = recorded(config)
    del values["evaluation"], values["label"]
    for key in FREE_TRAINING_KEYS:
        del values["training"][key]
    return values


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the result."""
    return {name: version(name) for name in RECORDED_VERSIONS}


@dataclass(frozen=True)
class Finished:
    """A verified checkpoint: its folder, identity (manifest sha256), lineage and frozen configuration."""

    folder: Path
    identity: str
    lineage: Lineage
    config: Config


def read_checkpoint(folder: Path, overrides: list[str] | None = None) -> Finished:
    """Verify a checkpoint folder and read its lineage; ``overrides`` change its configuration for evaluation.

    Raises:
        ClmoeError: not a finished checkpoint, damaged, or of a strange content; the file is named.
    """
    identity = verify(folder)
    try:
        lineage = Lineage(**read_json(folder / LINEAGE))
    except TypeError as error:
        raise ClmoeError(f"{folder / LINEAGE}: {error}") from error
    return Finished(folder, identity, lineage, reload_config(folder / CONFIG, overrides or []))


def check_successor(parent: Finished, config: Config, benchmark: str, task: str) -> None:
    """``config`` may continue ``parent`` with ``task``.

    Raises:
        ClmoeError: another benchmark, method, base or adapter, or a task that was learned already.
    """
    if parent.lineage.benchmark != benchmark:
        raise ClmoeError(
            f"--previous {parent.folder} was trained on benchmark {parent.lineage.benchmark}, not {benchmark}"
        )
    if task in parent.lineage.tasks:
        raise ClmoeError(f"--previous {parent.folder} has learned {task!r} already ({', '.join(parent.lineage.tasks)})")
    for name in ("method", "model", "adapter"):
        old, new = recorded(parent.config)[name], recorded(config)[name]
        if old != new:
            raise ClmoeError(f"--previous {parent.folder} was made with another {name}: {_difference(name, old, new)}")


def check_same_run(done: Finished, config: Config, benchmark: str, parent: Finished | None, tasks: list[str]) -> None:
    """A finished output folder is what this command would make again.

    Raises:
        ClmoeError: it was made with other settings, on another benchmark, from another parent, or has learned other
            tasks.
    """
    if done.lineage.benchmark != benchmark:
        raise ClmoeError(
            f"{done.folder} was trained on benchmark {done.lineage.benchmark}, not {benchmark}: choose another "
            "--output or delete it"
        )
    if done.lineage.config_sha256 != training_identity(config):
        old, new = _decisive(done.config), _decisive(config)
        changed = [k for k in new if old[k] != new[k]]
        text = "; ".join(_difference(key, old[key], new[key]) for key in changed) or "by an older version of clmoe"
        raise ClmoeError(f"{done.folder} was made with other settings ({text}): choose another --output or delete it")
    if done.lineage.parent != (None if parent is None else parent.identity):
        raise ClmoeError(
            f"{done.folder} continues another checkpoint than --previous: choose another --output or delete it"
        )
    if done.lineage.tasks != tasks:
        raise ClmoeError(
            f"{done.folder} has learned {', '.join(done.lineage.tasks)}, not {', '.join(tasks)}: choose another folder"
        )


def _difference(name: str, old: Any, new: Any) -> str:
    """``adapter.rank 16 there, 8 here`` for the first field that differs."""
    if isinstance(old, dict):
        for key in sorted(old.keys() | new.keys()):
            there, here = old.get(key), new.get(key)
            if there != here:
                return f"{name}.{key} {there} there, {here} here"
    return f"{name} {old} there, {new} here"
