"""Error texts that name the nearest known name."""

import difflib
import hashlib
from collections.abc import Iterable


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """An error text for a name that does not exist: the nearest known one, and all of them."""
    options = sorted(known)
    lower = {option.lower(): option for option in options}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    guess = f" Did you mean {lower[near[0]]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{guess} Known: {', '.join(options) or 'none'}"


def derived_seed(seed: int, name: str) -> int:
    """A seed below 2**56 that depends on the run's seed and a name, not on the order in which things happen."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
