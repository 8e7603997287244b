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
from clmoe.utils.files import file_sha256, flush, json_text, write_json

FORMAT_VERSION = "1"
MANIFEST = "manifest.json"
CARD = "README.md"


def sealed_files(folder: Path) -> dict[str, Path]:
    """What a manifest answers for, by relative name: all but itself, the model card, and hidden files.

    The card is for readers and is written anew when scores are known; hidden files are what the hub and its downloads
    add (``.gitattributes``, ``.cache``).
    """
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    exempt = (MANIFEST, CARD)
    return {n: path for n, path in files.items() if n not in exempt and not any(p[0] == "." for p in Path(n).parts)}


def seal(folder: Path) -> None:
    """Write the manifest of a folder whose files are complete."""
    files = sealed_files(folder)
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
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        entries, version = manifest["files"], manifest["format_version"]
        if text != json_text(manifest):  # its own hash is the checkpoint's identity, so every byte counts
            raise ValueError("it is not as it was written")
    except (ValueError, KeyError, TypeError) as error:
        raise ClmoeError(f"{path} is damaged: {error}; train this task again or restore the folder") from error
    if version != FORMAT_VERSION:
        raise ClmoeError(f"{path}: format {version!r} is not {FORMAT_VERSION!r}, which this version of clmoe reads")
    present = sealed_files(folder).keys()
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
