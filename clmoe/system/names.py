"""Error texts that name the nearest known name."""

import difflib
from collections.abc import Iterable


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """``what 'nmae' is unknown; did you mean 'name'? (known: ...)``."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{what} {name!r} is unknown{hint} (known: {', '.join(names)})"
