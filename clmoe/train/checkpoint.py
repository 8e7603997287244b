"""One checkpoint is one folder, written atomically, trusted only with a valid manifest, and aware of its history.

Files are collected in a sibling folder and hashed into ``manifest.json``, which is written last; then the folder is
renamed into place. No file in it holds a time, host or absolute path, so equal runs give equal bytes.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clmoe.config import Config, LocatorConfig, recorded, reload_config
from clmoe.errors import ClmoeError
from clmoe.locators import make_locator
from clmoe.methods import method_class
from clmoe.methods.base import Method
from clmoe.utils import paths
from clmoe.utils.files import file_sha256, flush, json_text, read_json, write_json

FORMAT_VERSION = "2"
OLD_FORMAT = "1"
MANIFEST = paths.MANIFEST
LINEAGE = "continual.json"
CONFIG = "config.yaml"
# What may change while a task is trained: how global batches are computed, how often states are saved and logged.
FREE_TRAINING_KEYS = (
    "micro_batch_size", "gradient_checkpointing", "workers", "save_steps", "keep_states", "logging_steps", "trackers",
)  # fmt: skip
TRAIN = "train."  # the sha256 of a task's training file, in identities
RECORDED_VERSIONS = ("clmoe", "torch", "transformers", "peft", "accelerate")


class SuperfluousFileError(ClmoeError):
    """Somebody put a file into a sealed folder; its own files are intact."""


def sealed_files(folder: Path) -> dict[str, Path]:
    """The files that a manifest vouches for, by relative name.

    A README.md may be written later, and the hub and its downloads add hidden files (``.gitattributes``, ``.cache``).
    """
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    exempt = (MANIFEST, "README.md")
    return {n: path for n, path in files.items() if n not in exempt and not any(p[0] == "." for p in Path(n).parts)}


def seal(folder: Path) -> None:
    """Write the manifest of a folder whose files are complete."""
    files = sealed_files(folder)
    for path in files.values():
        flush(path)
    entries = {name: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for name, path in files.items()}
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "files": entries})
    flush(folder)


def verify(folder: Path) -> str:
    """Check every file of a sealed folder; return the manifest's own sha256, the checkpoint's identity.

    Raises ClmoeError, naming the file, if one is missing, superfluous, truncated or altered.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ClmoeError(f"{folder} is not a finished checkpoint: it has no {MANIFEST}")
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        entries, found = manifest["files"], manifest["format_version"]
        if text != json_text(manifest):  # its own hash is the checkpoint's identity, so every byte counts
            raise ValueError("it has been changed since it was written")
    except (ValueError, KeyError, TypeError) as error:
        raise ClmoeError(f"{path} is damaged: {error}; train this task again or restore the folder") from error
    if found == OLD_FORMAT:
        raise ClmoeError(
            f"{folder} was sealed by clmoe 0.1: run `clmoe convert {folder} NEW_FOLDER` and use the new one"
        )
    if found != FORMAT_VERSION:
        raise ClmoeError(f"{path}: format {found!r} is not {FORMAT_VERSION!r}, which this version of clmoe reads")
    present = sealed_files(folder).keys()
    missing, extra = sorted(entries.keys() - present), sorted(present - entries.keys())
    if missing:
        raise ClmoeError(f"{folder / missing[0]} is missing: restore the file, or train this task again")
    if extra:
        raise SuperfluousFileError(f"{folder / extra[0]} does not belong to this checkpoint: remove the file")
    for name, entry in entries.items():
        if file_sha256(folder / name) != entry["sha256"]:
            raise ClmoeError(f"{folder / name} is damaged (its sha256 differs): restore it or train this task again")
    return file_sha256(path)


def is_complete(folder: Path) -> bool:
    """True for a sealed folder, False where nothing was finished. Raises ClmoeError if it has been damaged since."""
    return (folder / MANIFEST).is_file() and bool(verify(folder))


def work_folder(target: Path) -> Path:
    """Where a checkpoint is built before it is renamed to ``target``."""
    return target.parent / f".{target.name}.partial"


def publish(work: Path, target: Path) -> None:
    """Seal ``work`` and rename it to ``target`` in one step."""
    seal(work)
    work.rename(target)
    flush(target.parent)


def build_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Create ``target`` through ``fill(folder)``, all or nothing; does nothing when it is complete."""
    if is_complete(target):
        return
    work = work_folder(target)
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    fill(work)
    publish(work, target)


@dataclass(frozen=True)
class Lineage:
    """Content of ``continual.json``.

    ``tasks`` are those learned so far, oldest first; ``parent`` is the sha256 of the manifest of the checkpoint
    that it continues; ``base`` is the fingerprint of the frozen base. ``steps`` and ``trainable_parameters`` are the
    last task's.
    """

    method: str
    benchmark: str
    tasks: list[str]
    seed: int
    parent: str | None
    base: str
    steps: int
    trainable_parameters: int
    adapter_parameters: int
    effective_scale: float | None
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in RECORDED_VERSIONS})


@dataclass(frozen=True)
class Finished:
    """A verified checkpoint; ``config`` has the overrides that it was read with, ``locator`` is the sealed one."""

    folder: Path
    identity: str
    lineage: Lineage
    config: Config
    locator: LocatorConfig


def lasting(config: Config) -> dict[str, Any]:
    """All settings except those that change the result of training by rounding at most."""
    values = recorded(config)
    for key in FREE_TRAINING_KEYS:
        del values["training"][key]
    return values


def checkpoint_folders(run: Path, tasks: Sequence[str]) -> list[Path]:
    """Where a run keeps the checkpoint of each task, in the order of training: ``01_sqa``, ..."""
    return [run / f"{number:02}_{task}" for number, task in enumerate(tasks, 1)]


def read_checkpoint(folder: Path, overrides: list[str] | None = None) -> Finished:
    """Verify a checkpoint folder and read it, with ``overrides`` for evaluation. Raises ClmoeError like ``verify``."""
    identity = verify(folder)
    try:
        values = dict(read_json(folder / LINEAGE))
        values.pop("config_sha256", None)  # checkpoints of clmoe 0.2.0 have it
        lineage = Lineage(**values)
    except (TypeError, ValueError) as error:
        raise ClmoeError(f"{folder / LINEAGE}: {error}") from error
    sealed = config = reload_config(folder / CONFIG, [])
    if overrides:
        config = reload_config(folder / CONFIG, overrides, checked_method)
    return Finished(folder, identity, lineage, config, sealed.locator)


def checked_method(config: Config) -> Method:
    """The method of a configuration. Raises ClmoeError if its options, or those of the locator it needs, do not fit."""
    method = method_class(config.method)(config)
    if method.keeps_parts:
        locator = make_locator(config.locator, config.seed)
        if locator.asks and not method.letters:
            raise ClmoeError(f"locator={config.locator.name}: {config.method} does not teach the model to say letters")
        if locator.learned and not method.prototypes_learned:
            raise ClmoeError(f"locator={config.locator.name}: {config.method} learns no prototypes")
    return method


def identity(config: Config, benchmark: str, parent: str | None, tasks: list[str]) -> dict[str, Any]:
    """Everything that decides a checkpoint; ``parent`` is as in ``Lineage``."""
    values = lasting(config)
    del values["evaluation"], values["label"]
    return {**values, "benchmark": benchmark, "parent": parent, "tasks": tasks}


def check_same(done: Finished, wanted: dict[str, Any]) -> None:
    """Raise ClmoeError, naming what differs, unless the checkpoint has the identity ``wanted``."""
    lineage = done.lineage
    changed = differences(identity(done.config, lineage.benchmark, lineage.parent, lineage.tasks), wanted)
    if changed:
        raise ClmoeError(
            f"{done.folder} was made with other settings ({changed}): choose another --output or delete it"
        )


def check_successor(parent: Finished, config: Config, benchmark: str, task: str) -> None:
    """Raise ClmoeError, naming what differs, unless ``config`` may continue ``parent`` with ``task``."""
    names = ("method", "model", "adapter")
    there, here = ({name: recorded(c)[name] for name in names} for c in (parent.config, config))
    changed = differences(there | {"benchmark": parent.lineage.benchmark}, here | {"benchmark": benchmark})
    if changed:
        raise ClmoeError(f"--previous {parent.folder} was made with other settings ({changed})")
    if task in parent.lineage.tasks:
        raise ClmoeError(f"--previous {parent.folder} has already learned {task!r} ({', '.join(parent.lineage.tasks)})")


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """``training.learning_rate 0.003 there, 0.001 here; seed 0 there, 1 here``; empty for equal settings."""
    keys = sorted(old.keys() | new.keys())
    return "; ".join(difference(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key))


def difference(name: str, old: Any, new: Any) -> str:
    """``adapter.rank 16 there, 8 here``: the first field that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            there, here = old.get(key), new.get(key)
            if there != here:
                return difference(f"{name}.{key}", there, here)
    if name.startswith(TRAIN):  # hashes, which nobody wants to compare
        return f"{name}: the training file has changed since the start"
    return f"{name} {old} there, {new} here"
