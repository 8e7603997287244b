"""Short names of a model's blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.(.+))?$")


def block_names(blocks: Sequence[str]) -> dict[str, str]:
    """Module names -> short names such as "layer 3", layers in their order, each name once.

    What follows the layer's number is kept where layers have several blocks; a name without layer stays.
    """
    found = {name: _LAYER.search(name) for name in dict.fromkeys(blocks)}
    rests = {name[: match.start(1)] + "#" + (match[2] or "") for name, match in found.items() if match}
    keys: dict[str, tuple[int, str]] = {}
    short: dict[str, str] = {}
    for name, match in found.items():
        keys[name] = (int(match[1]), name) if match else (-1, name)
        short[name] = f"layer {match[1]}" if match else name
        if match and len(rests) > 1:
            short[name] = f"layer {match[1]} {match[2] or ''}".strip()
    if len(set(short.values())) < len(short):  # e.g. layers of two towers
        short = {name: name for name in short}
    return {name: short[name] for name in sorted(short, key=keys.__getitem__)}
