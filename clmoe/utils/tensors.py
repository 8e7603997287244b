"""Tensors on disk: safetensors and nothing else, so that no file that we read can run code."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clmoe.errors import ClmoeError


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU. Raises ClmoeError, naming it, if not safetensors, damaged, or not finite."""
    with _reading(path):
        tensors = load_file(path)
    refuse_infinite(tensors, path)
    return tensors


def refuse_infinite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ClmoeError, naming file and tensor, if a tensor that was read holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ClmoeError(f"{path}: {name} holds NaN or infinity, so every answer would be wrong: restore it")


def is_finite(tensor: Tensor) -> bool:
    """No element is NaN or infinite; one pass without a copy. Types below 16 bits are not checked."""
    if not tensor.is_floating_point() or tensor.itemsize < 2 or not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(tensor.detach().aminmax())).all())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bytes: tells -0.0 from 0.0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a, b = (tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(a, b)


def metadata(path: Path) -> dict[str, str]:
    """What ``save_tensors`` wrote besides tensors. Raises as ``load_tensors`` does."""
    with _reading(path), safe_open(path, "np") as file:
        return file.metadata() or {}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ClmoeError(f"{path}: cannot be read as safetensors ({error}); restore it or make it again") from error


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file. Give at most one metadata key: safetensors writes several in no fixed order."""
    with writing(path):
        save_file(tensors, path, metadata=metadata)


def replace_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """As ``save_tensors``, but makes the folder; the file appears whole or not at all, even if several write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_tensors(tensors, partial)
    partial.replace(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise ClmoeError if the block cannot write; a full disk costs nothing that is finished."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ClmoeError(
            f"{path}: cannot be written ({error}). What was finished before is whole: make room and run the same "
            "command again"
        ) from error


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_finite(values: Mapping[str, Tensor], when: str) -> None:
    """Raise ClmoeError, naming the first value that holds infinity or NaN, and ``when``: ``step 3``."""
    for name, value in values.items():
        if not is_finite(value):
            raise ClmoeError(
                f"{name} is not finite at {when}: lower training.learning_rate or check the data; the same command "
                "continues from the last saved state, if there is one"
            )
