"""Pickled weights (``*.bin``), read by an isolated child process that hands over safetensors.

A pickle is a program. The child loads it with ``weights_only``, which runs none of it; should that ever fail, it is
another process, started isolated with an empty environment in an empty folder, and nothing it says is unpickled
here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from clmoe.errors import ClmoeError

CHILD = Path(__file__).with_name("unpickle.py")
GIB = 1 << 30
SHARD_LIMIT = 24 * GIB
"""Largest accepted file of a model; the shards on the hub have 10 GB."""
PROJECTOR_LIMIT = 1 * GIB
"""LLaVA-1.5-13B's projector has 63 MB in 16 bits."""
ADAPTER_LIMIT = 8 * GIB
"""CoIN's adapter of a 13B model on all linears has 2 GB in 32 bits."""


@contextmanager
def unpickled(path: Path, scratch: Path, limit: int) -> Iterator[list[Path]]:
    """The tensors of a pickled file as safetensors files, which exist inside the block only.

    Args:
        scratch: folder on a disk with room for one more copy of the file.
        limit: most bytes that the file and its tensors may have.

    Raises:
        ClmoeError: missing or too large, no mapping of names to tensors, a dtype that is not allowed, or a pickle
            that asks for anything but tensors. The file and the entry are named.
    """
    if not path.is_file():
        raise ClmoeError(f"{path}: no such file")
    size = path.stat().st_size
    if size > limit:
        raise ClmoeError(f"{path}: {size} bytes; at most {limit} are accepted for such a file")
    with TemporaryDirectory(dir=scratch, prefix=".unpickled-") as folder:
        problem = _run_child(path, folder, limit)
        if problem is not None:
            raise ClmoeError(f"{path}: refused: {problem}")
        yield sorted(Path(folder).glob("*.safetensors"))


def _run_child(path: Path, folder: str, limit: int) -> str | None:
    """What is wrong with the file, None if nothing is."""
    command = [sys.executable, "-I", str(CHILD), str(path.resolve()), folder, str(limit)]
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    child = subprocess.run(
        command,
        cwd=folder,
        env={**kept, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return json.loads(child.stdout.splitlines()[-1])["error"]
    except (IndexError, ValueError, KeyError, TypeError):
        told = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return f"the process that read it ended with code {child.returncode}: {told}"
