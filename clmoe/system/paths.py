"""Where the repository's configurations and files are."""

from pathlib import Path
from typing import Literal, overload

from clmoe.errors import ClmoeError
from clmoe.system.names import unknown_name

REPOSITORY = Path(__file__).resolve().parents[2]


@overload
def find_config(kind: str, name: str, missing_ok: Literal[False] = False) -> Path: ...
@overload
def find_config(kind: str, name: str, missing_ok: Literal[True]) -> Path | None: ...
def find_config(kind: str, name: str, missing_ok: bool = False) -> Path | None:
    """``("methods", "clmoe")`` -> ``configs/methods/clmoe.yaml``; an existing path is taken as it is.

    Raises:
        ClmoeError: neither a path nor a known name, unless ``missing_ok``.
    """
    folder = REPOSITORY / "configs" / kind
    for candidate in (Path(name), folder / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    if missing_ok:
        return None
    known = [path.stem for path in folder.glob("*.yaml")]
    raise ClmoeError(unknown_name(f"configs/{kind}:", name, known) + ", and no file of that path exists")


def resolve_model_path(path: str) -> str:
    """A model folder relative to the working directory or the repository, else the name itself (a hub name)."""
    for candidate in (Path(path), REPOSITORY / path):
        if candidate.is_dir():
            return str(candidate)
    return path
