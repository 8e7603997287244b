"""Which commit and which command made a result."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path


def provenance() -> dict[str, str | None]:
    """Which checkout this package lies in, and how this process was started.

    ``commit``: with ``+`` behind it where files differ from it, the documentation apart, into which results are
    written; None outside of a checkout or without git. ``command``: the line.
    """
    return {"commit": _commit(Path(__file__).resolve().parents[2]), "command": shlex.join(_command())}


def _command() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _commit(checkout: Path) -> str | None:
    if not (checkout / ".git").exists():
        return None
    commit = _git(checkout, "rev-parse", "--short=12", "HEAD")
    changed = _git(checkout, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs")
    return None if commit is None or changed is None else commit + ("+" if changed else "")


def _git(checkout: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
