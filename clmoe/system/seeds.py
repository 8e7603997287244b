"""Seeds that follow from the run's seed and a name, not from the order in which things happen."""

import hashlib


def derived_seed(seed: int, name: str) -> int:
    """A seed below 2**56 for ``name``."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
