"""Which commit and which command made a result."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path


def provenance() -> dict[str, str | None]:
    """``commit``: of the checkout this package lies in, ``+`` behind it where files differ from it, None outside of one
    or without git; ``command``: the line this process was started with.
    """
    return {"commit": _commit(Path(__file__).resolve().parents[2]), "command": shlex.join(_command())}


def _command() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _commit(checkout: Path) -> str | None:
    if not (checkout / ".git").exists():
        return None
    commit = _git(checkout, "rev-parse", "--short=12", "HEAD")
    changed = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changed is None else commit + ("+" if changed else "")


def _git(checkout: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
