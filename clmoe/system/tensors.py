"""Tensors on disk: safetensors and nothing else, so that no file we read can run code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from clmoe.errors import ClmoeError

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU.

    Raises:
        ClmoeError: no safetensors file, or a damaged one; it is named.
    """
    from safetensors.torch import load_file

    with _reading(path):
        return load_file(path)


def load_arrays(path: Path) -> dict[str, ndarray]:
    """As ``load_tensors``, without torch."""
    from safetensors.numpy import load_file

    with _reading(path):
        return load_file(path)


def each_tensor(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file, one tensor in memory at a time. Raises as ``load_tensors``."""
    from safetensors import safe_open

    with _reading(path), safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no mapping
            yield name, file.get_tensor(name)


def tensor_names(path: Path) -> set[str]:
    """Names in a file's header. Raises as ``load_tensors``."""
    from safetensors import safe_open

    with _reading(path), safe_open(path, "np") as file:
        return set(file.keys())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ClmoeError(f"{path}: cannot be read as safetensors ({error}); restore it or make it anew") from error


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file. Of several metadata keys the order would be random: give one at most.

    Raises:
        ClmoeError: it cannot be written.
    """
    from safetensors.torch import save_file

    with writing(path):
        save_file(tensors, path, metadata=metadata)


def replace_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """As ``save_tensors``, in a folder that is made; the file appears whole or not at all, also if several write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_tensors(tensors, partial)
    partial.replace(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what a failure to write means: a full disk costs what was being written, nothing that is finished.

    Raises:
        ClmoeError: the block could not write.
    """
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ClmoeError(
            f"{path}: cannot be written ({error}). What was finished before is whole: make room and give the same "
            "command again"
        ) from error
