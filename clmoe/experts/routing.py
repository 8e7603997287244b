"""Routing as data: what steers the routers of one forward pass, and what they answered.

``routing(...)`` installs it around the call, because ``LlamaMLP`` takes no further arguments. Layers hold none of it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from threading import local
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class RouteSelection:
    """How the samples of one batch are routed; lives through a whole generation.

    Attributes:
        router: ``[B]`` int64, index into each layer's router bank, or with ``pick`` ``task`` the owner of the experts;
            None uses the newest.
        task: ``[B]`` int64, row of the task router to mix in; None uses the instance router alone.
        beta: weight of the instance router in the mix (CL-MoE eq. 8); 1 is the instance router alone.
    """

    router: Tensor | None = None
    task: Tensor | None = None
    beta: float = 1.0

    @cached_property
    def by_router(self) -> dict[int, Tensor]:
        """The routers in use, each with the rows ``[b]`` int64 of its samples; waits for the device, so only once."""
        assert self.router is not None
        routers, device = self.router.tolist(), self.router.device
        return {
            router: torch.tensor([row for row, own in enumerate(routers) if own == router], device=device)
            for router in sorted(set(routers))
        }

    def rows(self, index: Tensor) -> "RouteSelection":
        """The selection of the samples ``index [b]`` of this batch."""
        router, task = (None if values is None else values[index] for values in (self.router, self.task))
        return RouteSelection(router, task, self.beta)

    def keys(self, samples: int) -> list[tuple[int, ...]]:
        """One key per sample; samples that are routed alike have equal keys."""
        chosen = [values.tolist() for values in (self.router, self.task) if values is not None]
        return list(zip(*chosen, strict=True)) if chosen else [()] * samples


class RouterOutput(NamedTuple):
    """One router's answer, each ``[B, T, e]`` float32.

    ``logits`` and ``gate`` are the instance router's. ``weights`` mix the experts: the gate, or its mix with the task
    router's.
    """

    logits: Tensor
    gate: Tensor
    weights: Tensor


@dataclass
class RouteTrace:
    """What each router answered in its last forward pass, by router name; the layers write here."""

    outputs: dict[str, RouterOutput] = field(default_factory=dict)


class _Current(local):
    """The installed routing of this thread, in a form that torch.compile can read and guard."""

    routing: tuple[RouteSelection, RouteTrace | None] | None = None


_current = _Current()
NEWEST_ROUTER = RouteSelection()


@contextmanager
def routing(selection: RouteSelection, trace: RouteTrace | None = None) -> Iterator[None]:
    """Install a selection (and a trace) for the forward passes inside the block."""
    before, _current.routing = _current.routing, (selection, trace)
    try:
        yield
    finally:
        _current.routing = before


def current_routing() -> tuple[RouteSelection, RouteTrace | None] | None:
    """What the innermost ``routing`` block installed, or None."""
    return _current.routing


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """``context_fn`` of ``torch.utils.checkpoint``: recompute under the first forward's routing, without its trace."""
    selection, _ = _current.routing or (NEWEST_ROUTER, None)
    return nullcontext(), routing(selection)
