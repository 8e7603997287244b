"""The folder that a task is built in: what becomes the checkpoint, and hidden inside it the phases that lead there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clmoe.train.checkpoint import MANIFEST, work_folder
from clmoe.utils.files import read_json, write_json
from clmoe.utils.processes import is_main

PHASES = ".phases"  # hidden, so that it is never part of a checkpoint
IDENTITY = "identity.json"


def open_work(output: Path, identity: dict[str, Any]) -> Path:
    """The folder to build ``output`` in; called by the main process.

    What an interrupted command of the same ``identity`` left there is kept, all else removed.
    """
    work = work_folder(output)
    phases = work / PHASES
    marker = phases / IDENTITY
    if work.exists() and not (marker.is_file() and read_json(marker) == identity):
        shutil.rmtree(work)
    write_json(marker, identity)
    for leftover in work.iterdir():
        if leftover.is_file():
            leftover.unlink()
        elif leftover != phases:
            shutil.rmtree(leftover)
    for leftover in phases.iterdir():
        if leftover.is_dir() and not (leftover / MANIFEST).is_file():
            shutil.rmtree(leftover)
    return work


@contextmanager
def own_folder(building: Path) -> Iterator[Path]:
    """Where this process's method writes: the folder that becomes the checkpoint, or one that is thrown away."""
    if is_main():
        yield building
        return
    with TemporaryDirectory(prefix="clmoe-") as scratch:
        yield Path(scratch)


def remove_phases(output: Path) -> None:
    """A published checkpoint needs them no more."""
    phases = output / PHASES
    if phases.exists():
        shutil.rmtree(phases)
