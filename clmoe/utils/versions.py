"""The packages that clmoe needs, which versions were tested, and what is installed; imports none of them."""

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from typing import Literal

from packaging.requirements import Requirement

from clmoe.utils.paths import shipped_root

Edge = Literal["lowest", "highest"]


def requirements() -> Iterator[tuple[str, Requirement]]:
    """(extra or "", requirement) of this package: from the checkout's pyproject.toml, else as a wheel recorded them.

    What an editable installation recorded may be older than the file.
    """
    file = shipped_root() / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        for extra, lines in {"": project["dependencies"], **project["optional-dependencies"]}.items():
            yield from ((extra, Requirement(line)) for line in lines)
        return
    for line in metadata.requires("clmoe") or []:
        requirement = Requirement(line)
        extra = re.search(r'extra == "(.+?)"', str(requirement.marker))
        yield (extra[1] if extra else "", requirement)


def installed(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def tested(edge: Edge) -> dict[str, str]:
    """Package -> version of a set on which ``scripts/test_versions.sh`` ran: ``configs/versions/lowest.txt``."""
    lines = (shipped_root() / "configs" / "versions" / f"{edge}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@cache
def unfit(absent: bool = True) -> str | None:
    """Why clmoe cannot run on what is installed, and the command that fixes it; None if it can.

    Without ``absent``, missing packages do not count, for the parts that need none of them.
    """
    needed = [(requirement, installed(requirement.name)) for extra, requirement in requirements() if not extra]
    wrong = [
        (requirement, found)
        for requirement, found in needed
        if (absent if found is None else not requirement.specifier.contains(found, prereleases=True))
    ]
    if not wrong:
        return None
    found = ", ".join(f"{requirement} (found: {version or 'none'})" for requirement, version in wrong)
    fix = " ".join(f"'{requirement}'" for requirement, _ in wrong)
    return f"clmoe needs {found}: pip install {fix}; clmoe doctor shows what works without"
