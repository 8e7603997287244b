"""Weights of a model that is larger than memory should hold twice: read and written one piece at a time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clmoe.convert.pickles import SHARD_LIMIT, unpickled
from clmoe.errors import ClmoeError
from clmoe.utils.files import flush, read_json, write_json
from clmoe.utils.tensors import each_tensor, save_tensors, tensor_names

if TYPE_CHECKING:
    from torch import Size, Tensor

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 << 30
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")
"""What older versions of transformers saved besides the weights; it follows from the configuration."""

_SETS = ((INDEX, "model.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model.bin"))


@dataclass(frozen=True)
class Weights:
    """Files that hold tensors under another project's names.

    Attributes:
        files: in the order in which they are read.
        listed: the names in them, from headers and index.
        where: folder or file that errors name.
    """

    files: list[Path]
    listed: set[str]
    where: Path


def open_weights(folder: Path, scratch: Path, stack: ExitStack) -> Weights:
    """A model folder's weights; safetensors are preferred where both kinds are there.

    Raises:
        ClmoeError: none, an index that names a file which is missing, or as ``unpickled``.
    """
    for index, single in _SETS:
        if (folder / index).is_file():
            return _indexed(folder, index)
        if (folder / single).is_file():
            return open_file(folder / single, SHARD_LIMIT, scratch, stack)
    raise ClmoeError(f"{folder}: no weights: expected {' or '.join(name for pair in _SETS for name in pair)}")


def open_file(path: Path, limit: int, scratch: Path, stack: ExitStack) -> Weights:
    """One file of weights; a pickled one is read now and what it held stays in ``scratch`` as long as ``stack`` does.

    Raises:
        ClmoeError: as ``unpickled`` and ``load_tensors``.
    """
    files = [path] if path.suffix == ".safetensors" else stack.enter_context(unpickled(path, scratch, limit))
    return Weights(files, set().union(*(tensor_names(file) for file in files)), path)


def _indexed(folder: Path, index: str) -> Weights:
    try:
        names: dict[str, str] = dict(read_json(folder / index)["weight_map"])
        files = [folder / name for name in sorted(set(names.values()))]
    except (KeyError, TypeError, ValueError) as error:
        raise ClmoeError(f"{folder / index}: no index of weights: {error!r}") from error
    for path in files:
        if path.parent != folder or not path.is_file():
            raise ClmoeError(f"{folder / index} names {path.name}, which is not there: bring all shards to {folder}")
    if index != INDEX:
        return Weights(files, set(names), folder)
    return Weights(files, set().union(*(tensor_names(path) for path in files)), folder)


def tensors_of(path: Path, scratch: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of one file, pickled or not. Raises ClmoeError as ``unpickled`` and ``load_tensors``."""
    if path.suffix == ".safetensors":
        yield from each_tensor(path)
        return
    with unpickled(path, scratch, SHARD_LIMIT) as files:
        for file in files:
            yield from each_tensor(file)


def check_names(found: set[str], wanted: set[str], ignored: re.Pattern[str] | None, where: Path) -> None:
    """``found`` is ``wanted``, neither more nor less, ``ignored`` names aside.

    Raises:
        ClmoeError: it is not; the first tensor is named.
    """
    missing = sorted(wanted - found)
    if missing:
        raise ClmoeError(f"{where}: lacks {len(missing)} tensors, {missing[0]} first")
    unknown = sorted(name for name in found - wanted if ignored is None or not ignored.search(name))
    if unknown:
        raise ClmoeError(f"{where}: {len(unknown)} tensors that this format does not have, {unknown[0]} first")


class ShardWriter:
    """Writes a model's tensors into ``model-*.safetensors`` of about 2 GiB, whatever order they come in.

    Attributes:
        wanted: name -> shape of every tensor that the model needs.
    """

    def __init__(self, folder: Path, wanted: dict[str, Size]) -> None:
        self.folder, self.wanted = folder, wanted
        self._shard: dict[str, Tensor] = {}
        self._size = 0
        self._files: list[Path] = []
        self._written: dict[str, tuple[int, str]] = {}

    def add(self, name: str, tensor: Tensor, origin: str) -> None:
        """Take a tensor, bit for bit. ``origin`` says in errors where it comes from.

        Raises:
            ClmoeError: twice the same, another shape than the model needs, or no floating-point numbers.
        """
        if name in self._written or name in self._shard:
            raise ClmoeError(f"{origin}: {name} was there before: two files hold the same tensor")
        if tensor.shape != self.wanted[name]:
            raise ClmoeError(f"{origin}: shape {list(tensor.shape)}, the model needs {list(self.wanted[name])}")
        if not tensor.is_floating_point():
            raise ClmoeError(f"{origin}: {tensor.dtype} is no weight; expected 16- or 32-bit floating point")
        self._shard[name] = tensor.contiguous()
        self._size += tensor.nbytes
        if self._size >= SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._shard:
            return
        path = self.folder / f"part-{len(self._files):05}.safetensors"
        save_tensors(self._shard, path, {"format": "pt"})
        flush(path)
        for name, tensor in self._shard.items():
            self._written[name] = (len(self._files), digest(tensor))
        self._files.append(path)
        self._shard, self._size = {}, 0

    def finish(self) -> None:
        """Name the files as transformers does, write the index, and read everything back.

        Raises:
            ClmoeError: a tensor never came, or is not on disk as it was given.
        """
        self._flush()
        missing = sorted(self.wanted.keys() - self._written.keys())
        if missing:
            raise ClmoeError(f"{self.folder}: {len(missing)} tensors were not written, {missing[0]} first")
        total = len(self._files)
        names = [f"model-{n:05}-of-{total:05}.safetensors" for n in range(1, total + 1)]
        self._files = [path.rename(self.folder / name) for path, name in zip(self._files, names, strict=True)]
        size = sum(path.stat().st_size for path in self._files)
        placed = {name: names[number] for name, (number, _) in self._written.items()}
        write_json(self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": placed})
        self._verify()

    def _verify(self) -> None:
        left = dict(self._written)
        for number, path in enumerate(self._files):
            for name, tensor in each_tensor(path):
                if left.pop(name, None) != (number, digest(tensor)):
                    raise ClmoeError(f"{path}: {name} is not as it was written: check the disk and convert again")
        if left:
            raise ClmoeError(f"{self.folder}: {sorted(left)[0]} is not on disk: check it and convert again")


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes."""
    import torch

    content = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    content.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


@dataclass(frozen=True)
class Copy:
    """Copies one set of weights under new names.

    Attributes:
        names: source name -> name in the written model; all must be there.
        ignored: further source names that may be there and are left out.
        change: what a tensor becomes, given its new name and where it comes from; None leaves all as they are.
    """

    weights: Weights
    names: dict[str, str]
    ignored: re.Pattern[str] = BUFFERS
    change: Callable[[str, Tensor, str], Tensor] | None = None

    def check(self) -> None:
        """Compare the listed names. Raises ClmoeError as ``check_names``."""
        check_names(self.weights.listed, set(self.names), self.ignored, self.weights.where)

    def run(self, writer: ShardWriter, scratch: Path) -> None:
        """Copy all. Raises ClmoeError as ``check_names`` (an index may lie), ``ShardWriter.add`` and ``unpickled``."""
        found = set()
        for path in self.weights.files:
            for name, tensor in tensors_of(path, scratch):
                found.add(name)
                if name in self.names:
                    target, origin = self.names[name], f"{self.weights.where}: {name}"
                    writer.add(target, tensor if self.change is None else self.change(target, tensor, origin), origin)
        check_names(found, set(self.names), self.ignored, self.weights.where)
