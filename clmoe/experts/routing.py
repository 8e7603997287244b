"""Routing as data: what steers the routers of one forward pass, and what they answered.

A ``RouteSelection`` travels with the batch and a ``RouteTrace`` with one forward; both are installed by
``routing(...)`` around the call, because ``LlamaMLP`` takes no further arguments. Layers hold no routing
state, so an activation checkpoint that recomputes later sees what its own forward saw (``checkpoint_contexts``).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from threading import local
from typing import Literal

import torch
from torch import Tensor

RouterChoice = Literal["located", "oracle", "last", "random"]


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
        """The routers in use, each with the rows ``[b]`` int64 of its samples.

        Read from the device once for all layers and steps: every look at it waits for what the device is doing.
        """
        assert self.router is not None
        rows: dict[int, list[int]] = {}
        for row, router in enumerate(self.router.tolist()):
            rows.setdefault(router, []).append(row)
        return {router: torch.tensor(rows[router], device=self.router.device) for router in sorted(rows)}

    def rows(self, index: Tensor) -> "RouteSelection":
        """The selection of the samples ``index [b]`` of this batch."""

        def pick(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[index]

        return RouteSelection(pick(self.router), pick(self.task), self.beta)

    def keys(self, samples: int) -> list[tuple[int, ...]]:
        """For each of ``samples`` a value that is equal for samples that are routed alike."""
        chosen = [values.tolist() for values in (self.router, self.task) if values is not None]
        return list(zip(*chosen, strict=True)) if chosen else [()] * samples


@dataclass(frozen=True)
class RouterOutput:
    """One router's answer, each ``[B, T, e]`` float32.

    Attributes:
        logits, gate: of the instance router.
        weights: what the experts are mixed with: the gate, or its mix with the task router's.
    """

    logits: Tensor
    gate: Tensor
    weights: Tensor


@dataclass
class RouteTrace:
    """What each router answered in one forward pass, by router name; assigned, never accumulated.

    Attributes:
        recorded: as computed; the layers write here.
        layout: from the layout that was computed to that of the batch's samples, ``[G, L, ...]`` -> ``[B, T, ...]``;
            None where they are the same.
    """

    recorded: dict[str, RouterOutput] = field(default_factory=dict)
    layout: Callable[[Tensor], Tensor] | None = None

    @property
    def outputs(self) -> dict[str, RouterOutput]:
        """The answers in the layout of the samples, so that means over a sample's tokens are its own."""
        if self.layout is None:
            return self.recorded
        return {
            name: RouterOutput(self.layout(output.logits), self.layout(output.gate), self.layout(output.weights))
            for name, output in self.recorded.items()
        }


@dataclass(frozen=True)
class Routing:
    selection: RouteSelection
    trace: RouteTrace | None


class _Current(local):
    """The installed routing, per thread; of the ways to have that, the one that torch.compile reads and guards."""

    routing: Routing | None = None


_current = _Current()
NEWEST_ROUTER = RouteSelection()


@contextmanager
def routing(selection: RouteSelection, trace: RouteTrace | None = None) -> Iterator[None]:
    """Install a selection (and a trace) for the forward passes inside the block."""
    before, _current.routing = _current.routing, Routing(selection, trace)
    try:
        yield
    finally:
        _current.routing = before


def current_routing() -> Routing | None:
    """The routing installed by the innermost ``routing`` block, or None."""
    return _current.routing


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """``context_fn`` of ``torch.utils.checkpoint``: recompute under the routing of the first forward.

    The recomputation leaves the trace alone: its tensors belong to the first forward's graph.
    """
    active = _current.routing
    return nullcontext(), routing(NEWEST_ROUTER if active is None else active.selection)
