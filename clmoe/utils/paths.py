"""Where the repository's configurations and files are."""

from pathlib import Path

from clmoe.errors import ClmoeError
from clmoe.utils.names import unknown


def checkouts() -> list[Path]:
    """Folders that hold ``configs``: the checkout that this package lies in, the current folder."""
    folders = (Path(__file__).resolve().parents[2], Path.cwd().resolve())
    return [folder for folder in folders if (folder / "configs" / "benchmarks").is_dir()]


def repository_root() -> Path:
    """The checkout that this package lies in, else the current folder.

    Raises:
        ClmoeError: neither holds ``configs``.
    """
    found = checkouts()
    if found:
        return found[0]
    raise ClmoeError("no folder configs/benchmarks found; run from the clmoe checkout, or give the path of a YAML file")


def known_configs(kind: str, ending: str = ".yaml") -> list[str]:
    """Names of the files in ``configs/<kind>``, sorted."""
    return sorted(path.stem for path in (repository_root() / "configs" / kind).glob(f"*{ending}"))


def find_config(kind: str, name: str, ending: str = ".yaml") -> Path:
    """``("methods", "clmoe")`` -> ``configs/methods/clmoe.yaml``; the path of such a file is taken as it is.

    Raises:
        ClmoeError: no such file, or no such name; the nearest known one is named.
    """
    if name.endswith((ending, ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ClmoeError(f"{path}: no such file")
        return path
    path = repository_root() / "configs" / kind / f"{name}{ending}"
    if not path.is_file():
        message = unknown(kind.removesuffix("s"), name, known_configs(kind, ending))
        raise ClmoeError(message + f", or the path of a {ending} file")
    return path


def resolve_model_path(path: str) -> str:
    """A model folder relative to the current folder or the repository, else the name itself (a hub name).

    Raises:
        ClmoeError: something that can only be a folder and does not exist.
    """
    for candidate in (Path(path).expanduser(), repository_root() / path):
        if candidate.is_dir():
            return str(candidate)
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ClmoeError(f"model {path}: no such folder")
    return path
