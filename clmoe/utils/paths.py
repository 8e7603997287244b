"""Where the shipped configurations and the embedded base are. All other paths are relative to the user's folder."""

import os
from collections.abc import Iterable
from pathlib import Path

from clmoe.errors import ClmoeError
from clmoe.utils.names import unknown

MANIFEST = "manifest.json"  # in every checkpoint
EMBEDDED_BASE = "playground/base"  # a model path that is a name, unless the user's folder holds one


def shipped_root() -> Path:
    """The folder that holds ``configs`` and ``playground/base``: the package in a wheel, else the checkout."""
    package = Path(__file__).resolve().parents[1]
    return package if (package / "configs").is_dir() else package.parent


def known_configs(kind: str, ending: str = ".yaml") -> list[str]:
    """Names of the files in ``configs/<kind>``, sorted."""
    return sorted(path.stem for path in (shipped_root() / "configs" / kind).glob(f"*{ending}"))


def find_config(kind: str, name: str, ending: str = ".yaml") -> Path:
    """``("methods", "clmoe")`` -> ``configs/methods/clmoe.yaml``; the path of such a file is returned as it is.

    Raises ClmoeError, naming the nearest known name, if there is no such file.
    """
    if name.endswith((ending, ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ClmoeError(f"{path}: no such file")
        return path
    path = shipped_root() / "configs" / kind / f"{name}{ending}"
    if not path.is_file():
        message = unknown(kind.removesuffix("s"), name, known_configs(kind, ending))
        raise ClmoeError(message + f", or the path of a {ending} file")
    return path


def check_target(
    option: str, target: Path, files: Iterable[Path] = (), folders: Iterable[Path] = (), *, file: bool = False
) -> None:
    """Raise ClmoeError unless a command can write ``target``, a folder or a ``file``, without harming any input.

    It must not be one of ``files`` or the folder that holds one, must not be or lie in one of ``folders``, and must not
    lie in a checkpoint. The nearest folder that exists must be writable.
    """
    real = target.expanduser().resolve()
    for read in files:
        same = real.exists() and read.exists() and real.samefile(read)
        if same or real in (read.resolve(), read.resolve().parent):
            raise ClmoeError(f"{option} {target} would overwrite {read} or files beside it, which are read")
    for folder in [path.resolve() for path in folders]:
        if real == folder or folder in real.parents:
            raise ClmoeError(f"{option} {target} lies in {folder}, which is read: choose another place")
    for parent in real.parents:
        if (parent / MANIFEST).is_file():
            raise ClmoeError(f"{option} {target} lies in the checkpoint {parent}: choose another place")
    there = next(path for path in (real.parent, *real.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ClmoeError(f"{option} {target} cannot be written: {there} is not a writable folder")
    if real.exists() and (real.is_dir() == file or not os.access(real, os.W_OK)):
        raise ClmoeError(f"{option} {target} cannot be written: not a {'file' if file else 'folder'}, or read-only")


def is_hub_name(path: str) -> bool:
    """Whether it has the form ``owner/name``; the hub need not know it."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def resolve_model_path(path: str) -> str:
    """A model folder, the embedded base, or a name that the hub may know. Raises ClmoeError if it can be none."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if path == EMBEDDED_BASE:
        return str(shipped_root() / path)
    if not is_hub_name(path):
        raise ClmoeError(f"no such folder, and {unknown('model', path, known_configs('models'))}")
    return path
