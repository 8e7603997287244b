"""Where the shipped configurations and the embedded base are. All other paths count from the user's folder."""

from pathlib import Path

from clmoe.errors import ClmoeError
from clmoe.utils.names import unknown

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


def resolve_model_path(path: str) -> str:
    """A model folder, the embedded base, or a name that the hub may know. Raises ClmoeError if it can be none."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if path == EMBEDDED_BASE:
        return str(shipped_root() / path)
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ClmoeError(f"no such folder, and {unknown('model', path, known_configs('models'))}")
    return path
