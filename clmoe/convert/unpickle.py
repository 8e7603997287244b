"""Reads one pickled file of tensors and writes safetensors. Runs alone, in a process of its own (see pickles.py).

Imports nothing of clmoe: the process is started isolated, without this project on its path. It prints one line of
JSON: ``{"error": null}``, or what is wrong with the file.
"""

import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

DTYPES = ("float16", "bfloat16", "float32", "int64")  # the last for CLIP's position_ids
CHUNK = 1 << 30


def check_archive(path: Path) -> bool:
    """Whether it is torch's zip format, which can be mapped into memory; the older format is one stream.

    Raises:
        ValueError: compressed members, behind which a small file could hold a huge one.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        packed = [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"its member {packed[0]} is compressed, which torch never does")
    return True


def check_tensors(content: Any, limit: int) -> None:
    """A flat mapping of plain dense tensors of the allowed dtypes, not larger than ``limit`` bytes together.

    Raises:
        ValueError: anything else; the entry is named.
    """
    import torch

    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a mapping of names to tensors")
    total = 0
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"entry {name!r} is a {type(tensor).__name__}, not a tensor")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout != torch.strided or dtype not in DTYPES:
            raise ValueError(f"tensor {name} is {dtype} ({tensor.layout}); allowed are dense {', '.join(DTYPES)}")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"tensor {name} claims {tensor.nbytes} bytes and has fewer")
        total += tensor.nbytes
    if total > limit:
        raise ValueError(f"its tensors take {total} bytes; at most {limit} are accepted")


def write_chunks(content: dict[str, Any], folder: Path) -> None:
    """``0000.safetensors`` and so on, of about ``CHUNK`` bytes each, so that memory holds one of them at a time."""
    from safetensors.torch import save_file

    chunk: dict[str, Any] = {}
    number = size = 0
    names = list(content)
    for position, name in enumerate(names):
        chunk[name] = content.pop(name).detach().contiguous().clone()
        size += chunk[name].nbytes
        if size >= CHUNK or position == len(names) - 1:
            save_file(chunk, folder / f"{number:04}.safetensors")
            chunk, size, number = {}, 0, number + 1


def convert(path: Path, folder: Path, limit: int) -> None:
    """``weights_only`` admits tensors and containers; a pickle that names anything else is refused before it is run."""
    import torch

    mapped = check_archive(path)
    content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    check_tensors(content, limit)
    write_chunks(dict(content), folder)


def reason(error: Exception) -> str:
    """One line; torch's own message explains at length how to switch the protection off."""
    told = str(error).strip()
    refused = re.search(r"GLOBAL ([\w.]+)", told)
    if refused:
        return f"it asks for {refused[1]}, which is no tensor; nothing of it was run"
    if "weights_only" in told:
        detail = re.search(r"(WeightsUnpickler error: [^\n]*)", told)
        return "torch does not take it for weights" + (f" ({detail[1].strip()})" if detail else "")
    lines = told.splitlines() or [type(error).__name__]
    return lines[0][:300]


if __name__ == "__main__":
    problem = None
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    except Exception as error:  # whatever a strange file makes torch raise
        problem = reason(error)
    print(json.dumps({"error": problem}))
