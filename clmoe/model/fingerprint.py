"""Identity of a frozen base; free of torch, so that verbs can compare before loading anything."""

import hashlib
from pathlib import Path

from clmoe.errors import ClmoeError

_SAMPLE = 1 << 20
_SAMPLES_PER_FILE = 16


def base_fingerprint(folder: str) -> str:
    """sha256 over ``config.json`` and every weight file's name, size and sixteen evenly spaced MiB.

    Two bases that differ in training differ everywhere, so the sample finds it without reading 14 GB; a base of up
    to 16 MiB a file is covered whole. A hub name is its own fingerprint.
    """
    root = Path(folder)
    if not root.is_dir():
        return hashlib.sha256(folder.encode()).hexdigest()
    weights = sorted(root.glob("*.safetensors"))
    if not weights or not (root / "config.json").is_file():
        raise ClmoeError(f"model {folder}: expected config.json and *.safetensors in it (transformers' format)")
    digest = hashlib.sha256((root / "config.json").read_bytes())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for k in range(_SAMPLES_PER_FILE):
                file.seek(max(0, size - _SAMPLE) * k // (_SAMPLES_PER_FILE - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
