"""Small files, written whole or not at all, and the lock of a run folder."""

import csv
import hashlib
import io
import json
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from clmoe.errors import ClmoeError
from clmoe.utils.processes import from_main, is_main

LOCK = ".lock"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Hex digest of a JSON value; the order of an object's keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def flush(path: Path) -> None:
    """Force a file or folder entry to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, the same bytes for equal values."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Raises ValueError for NaN and infinity, which JSON does not have."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Replace a file's content atomically; a file that already holds it stays as it is."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    partial.replace(path)


def append_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Add JSON values to a file, one per line; a last line that a crash cut off is left alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file that ``append_json_lines`` wrote, without the lines that a crash cut off."""
    values = []
    for line in path.read_bytes().split(b"\n"):
        try:
            values.append(json.loads(line))
        except ValueError:  # cut, perhaps within a character
            continue
    return values


def read_json(path: Path) -> Any:
    """A JSON file of ours. Raises ClmoeError, naming the file, if it is unreadable or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ClmoeError(f"{path}: cannot be read: {error}") from error


def read_csv(path: Path) -> list[tuple[int, list[str]]]:
    """Line number and stripped cells of every row that is not blank. Raises ClmoeError for an unreadable file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            table = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ClmoeError(f"{path}: cannot be read as CSV ({error})") from error
    return [(line, cells) for line, cells in table if any(cells)]


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV with Unix line ends."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run folder for one command at a time, in the main process; the system releases it however that ends.

    A new folder is removed if nothing was written in it. Raises ClmoeError, naming the holder, if it is in use.
    """
    new = not run.exists()
    lock, holder = FileLock(run / LOCK, timeout=0), run / f"{LOCK}.holder"

    def acquire() -> None:
        run.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            who = holder.read_text(encoding="utf-8") if holder.is_file() else "another command"
            raise ClmoeError(f"{run} is in use by {who}: wait for it, or choose another folder") from error
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")

    from_main(acquire)
    try:
        yield
    finally:
        if is_main():
            holder.unlink(missing_ok=True)
            (run / LOCK).unlink(missing_ok=True)
            lock.release()
            if new and not any(run.iterdir()):
                run.rmdir()
