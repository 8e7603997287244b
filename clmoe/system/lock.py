"""One command at a time per run folder; the lock falls with the process that holds it, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clmoe.errors import ClmoeError
from clmoe.system.processes import from_main, is_main

LOCK = ".lock"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run folder; of several processes the main one does.

    Raises:
        ClmoeError: another command holds it; process and host are named.
    """
    handles: list[int] = []
    new = not run.exists()
    from_main(lambda: handles.append(_acquire(run / LOCK)))
    try:
        yield
    finally:
        if is_main():
            (run / LOCK).unlink(missing_ok=True)
            os.close(handles.pop())
            if new and not any(run.iterdir()):
                run.rmdir()  # a refused command leaves no trace


def _acquire(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 200).decode(errors="replace") or "another command"
            os.close(handle)
            raise ClmoeError(f"{path.parent} is in use by {holder}: wait for it, or choose another folder") from error
        if _is_still(path, handle):
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return handle
        os.close(handle)  # whoever held it removed the file before we got the lock


def _is_still(path: Path, handle: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False
