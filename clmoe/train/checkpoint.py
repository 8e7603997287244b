"""One checkpoint is one folder, written atomically and trusted only with a valid manifest.

Files are collected in a sibling folder, flushed to disk, hashed into ``manifest.json`` (written last), and the
folder is renamed into place. A folder without a valid manifest does not exist for any reader. No file in it holds
a time, host or absolute path, so equal runs give equal bytes.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from clmoe.errors import ClmoeError
from clmoe.system.files import file_sha256, flush, write_json

FORMAT_VERSION = "1"
MANIFEST = "manifest.json"


def seal(folder: Path) -> None:
    """Write the manifest of a folder whose files are complete."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST}
    for path in files.values():
        flush(path)
    entries = {name: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for name, path in files.items()}
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "files": entries})
    flush(folder)


def verify(folder: Path) -> str:
    """Check every file of a sealed folder; return the manifest's own sha256, the checkpoint's identity.

    Raises:
        ClmoeError: no manifest, or a file that is missing, superfluous, truncated or altered; it is named.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ClmoeError(f"{folder} is not a finished checkpoint: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        entries, version = manifest["files"], manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ClmoeError(f"{path} is damaged: {error}; train this task again or restore the folder") from error
    if version != FORMAT_VERSION:
        raise ClmoeError(f"{path}: format {version!r} is not {FORMAT_VERSION!r}, which this version of clmoe reads")
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    if present != entries.keys():
        odd = sorted(present ^ entries.keys())[0]
        state = "is not in the manifest" if odd in present else "is missing"
        raise ClmoeError(f"{folder / odd} {state}: delete {folder} and train this task again, or restore the file")
    for name, entry in entries.items():
        if file_sha256(folder / name) != entry["sha256"]:
            raise ClmoeError(f"{folder / name} is damaged (its sha256 differs): restore it or train this task again")
    return file_sha256(path)


def is_complete(folder: Path) -> bool:
    """True for a sealed, undamaged folder, False where nothing was finished.

    Raises:
        ClmoeError: sealed, but damaged since.
    """
    if not (folder / MANIFEST).is_file():
        return False
    verify(folder)
    return True


def work_folder(target: Path) -> Path:
    """Where a checkpoint is built before it is renamed to ``target``."""
    return target.parent / f".{target.name}.partial"


def publish(work: Path, target: Path) -> None:
    """Seal ``work`` and rename it to ``target`` in one step."""
    seal(work)
    work.rename(target)
    flush(target.parent)


def build_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Create ``target`` through ``fill(folder)``, all or nothing; does nothing when it is complete."""
    if is_complete(target):
        return
    work = work_folder(target)
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    fill(work)
    publish(work, target)
