"""SIGTERM, as schedulers send it before they take a machine away: save what can be saved, then leave."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from clmoe.errors import Interrupted

EXIT_CODE = 75
"""Of a command that was told to stop and that goes on when it is given again (EX_TEMPFAIL of sysexits.h)."""


class _Asked:
    """Whether the signal came, and whether someone is waiting to hear of it."""

    def __init__(self) -> None:
        self.now, self.deferred = False, False


_asked = _Asked()


def _handle(number: int, frame: FrameType | None) -> None:
    _asked.now = True
    if not _asked.deferred:
        raise Interrupted("stopped by SIGTERM")


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises ``Interrupted``, or waits for the end of a ``deferred`` block."""
    before: Any = signal.signal(signal.SIGTERM, _handle)
    _asked.now = False
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def deferred() -> Iterator[_Asked]:
    """Within the block SIGTERM only sets ``now``; the block looks at it and raises ``Interrupted`` when it suits.

    Raises:
        Interrupted: at the block's end, if the signal came after its last look.
    """
    _asked.deferred = True
    try:
        yield _asked
    finally:
        _asked.deferred = False
    if _asked.now:
        raise Interrupted("stopped by SIGTERM")
