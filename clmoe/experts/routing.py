"""Routing as data, installed around a forward pass because ``LlamaMLP`` takes no further arguments; and the routers."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from threading import local
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from clmoe.errors import ClmoeError

SHARES = "shares"  # in ``RouteSelection.kept``: what a guide finds, used as ``weights``
LETTER_ROUTER = -1  # in place of a task: experts that do not answer questions but say whose they are


@dataclass(frozen=True)
class RouteSelection:
    """How the samples of one batch are routed; holds for a whole generation.

    Attributes:
        router: ``[B]`` int64, index into each layer's router bank, without routers a task; None uses the newest.
        task: ``[B]`` int64, row of the task router to mix in; None uses the instance router alone.
        beta: weight of the instance router in the mix (CL-MoE eq. 8); 1 is the instance router alone.
        weights: ``[B, N]`` float32, without routers: the weight of each task's experts, instead of one task's alone.
        whole: a gate looks at a sample's whole prompt, so no two samples share a prefix.
        asked: ``[B, T]`` bool: the tokens of this pass that belong to the first prompt; None outside such passes.
        kept: what routers, by name, and a guide found in the pass with ``asked``, kept for all layers and the tokens
            that follow; None keeps nothing.
    """

    router: Tensor | None = None
    task: Tensor | None = None
    beta: float = 1.0
    weights: Tensor | None = None
    whole: bool = False
    asked: Tensor | None = None
    kept: dict[str, Tensor] | None = None

    @cached_property
    def by_router(self) -> dict[int, Tensor]:
        """The routers in use, each with the rows ``[b]`` int64 of its samples; waits for the device, so cached."""
        assert self.router is not None
        routers, device = self.router.tolist(), self.router.device
        return {
            router: torch.tensor([row for row, own in enumerate(routers) if own == router], device=device)
            for router in sorted(set(routers))
        }

    def rows(self, index: Tensor) -> "RouteSelection":
        """The selection of the samples ``index [b]`` of this batch."""
        parts = (self.router, self.task, self.weights)
        router, task, weights = (None if values is None else values[index] for values in parts)
        return RouteSelection(router, task, self.beta, weights, self.whole)

    def keys(self, samples: int) -> list[tuple[Any, ...]]:
        """One key per sample; samples that are routed alike have equal keys."""
        if self.whole:
            return [(row,) for row in range(samples)]
        chosen = [values.tolist() for values in (self.router, self.task) if values is not None]
        if self.weights is not None:
            chosen.append([tuple(row) for row in self.weights.tolist()])
        return list(zip(*chosen, strict=True)) if chosen else [()] * samples


class RouterOutput(NamedTuple):
    """``[B, T, e]`` float32 each: the instance router's ``logits`` and ``gate``, and the experts' ``weights``."""

    logits: Tensor
    gate: Tensor
    weights: Tensor


@dataclass
class RouteTrace:
    """What each router answered in its last forward pass, by name; the routers write here.

    ``real [B, T]`` bool: which tokens of the batch are not padding; None if all are real.
    """

    outputs: dict[str, RouterOutput] = field(default_factory=dict)
    real: Tensor | None = None


Installed = tuple[RouteSelection, RouteTrace | None]


class _Current(local):
    """The installed routing of this thread."""

    routing: Installed | None = None


class _Latest:
    """The routing that any thread installed last, which compiled layers read.

    torch before 2.13 compiles a thread's own attributes in as constants, without a guard. So threads that share a
    compiled model must take turns.
    """

    routing: Installed | None = None


_current, _latest = _Current(), _Latest()
NEWEST_ROUTER = RouteSelection()


@contextmanager
def routing(selection: RouteSelection, trace: RouteTrace | None = None) -> Iterator[None]:
    """Install a selection (and a trace) for the forward passes inside the block."""
    before = _current.routing, _latest.routing
    _current.routing = _latest.routing = (selection, trace)
    try:
        yield
    finally:
        _current.routing, _latest.routing = before


def reading(asked: Tensor) -> AbstractContextManager[None]:
    """The installed routing, for a pass in which the tokens ``asked [B, T]`` bool belong to the first prompt."""
    selection, trace = current_routing() or (NEWEST_ROUTER, None)
    return routing(replace(selection, asked=asked, kept={} if selection.kept is None else selection.kept), trace)


def current_routing() -> Installed | None:
    """What the innermost ``routing`` block installed."""
    return _latest.routing if torch.compiler.is_compiling() else _current.routing


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """``context_fn`` of ``torch.utils.checkpoint``: recompute under the first forward's routing, without its trace."""
    selection, _ = _current.routing or (NEWEST_ROUTER, None)
    return nullcontext(), routing(selection)


# ---- Routers


def rows_of(x: Tensor) -> Tensor:
    """``[..., n] -> [N, n]``."""
    return x.reshape(-1, x.shape[-1])


class RouterLogits(torch.autograd.Function):
    """``x [..., din] W^T [din, E]`` in float32 (CL-MoE eq. 5). Keeps ``x`` as it came, as the experts do anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x.float(), weight.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = (d_logits @ weight.float()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = (rows_of(d_logits).t() @ rows_of(x).float()).to(weight.dtype)
        return d_x, d_weight


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """``RouterLogits``, without an autograd function where nothing needs a gradient."""
    with torch.autocast(x.device.type, enabled=False):
        return RouterLogits.apply(x, weight) if torch.is_grad_enabled() else linear(x.float(), weight.float())


def uniform(rows: int, din: int, generator: torch.Generator) -> Tensor:
    """``[rows, din]`` float32, uniform in +-1/sqrt(din), as ``nn.Linear`` starts."""
    return (torch.rand(rows, din, generator=generator) * 2 - 1) / din**0.5


def gate_from_logits(logits: Tensor, top_k: int | None) -> Tensor:
    """Softmax of ``[..., E]``, or of the ``top_k`` largest (LLaVA-CMoE eq. 1); ties go to the lower index."""
    if top_k is None or top_k >= logits.shape[-1]:
        return logits.softmax(-1)
    order = logits.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
    return torch.full_like(logits, float("-inf")).scatter(-1, order, logits.gather(-1, order)).softmax(-1)


class InstanceRouter(nn.Module):
    """Linear router on each token, over the ``E`` experts that existed when its task ended. ``weight [E, din]``."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    @classmethod
    def fresh(cls, din: int, experts: int, generator: torch.Generator) -> "InstanceRouter":
        """Uniform in +-1/sqrt(din), as ``nn.Linear`` starts."""
        return cls(uniform(experts, din, generator))

    def freeze(self) -> None:
        """Turn the weight into a buffer, bit for bit."""
        if isinstance(self.weight, nn.Parameter):
            weight = self.weight.detach().clone()
            del self.weight
            self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., din]`` any float dtype -> logits ``[..., E]`` float32."""
        return router_logits(x, self.weight)


class TaskRouter(nn.Module):
    """One fixed gate per task (CL-MoE eq. 7): ``gates [N, E]`` float32, a buffer; None before the first task ends."""

    gates: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gates", None)

    def append(self, gate: Tensor) -> None:
        """Add the next task's gate ``[E]``."""
        row = gate.float().unsqueeze(0)
        self.gates = row if self.gates is None else torch.cat([self.gates, row.to(self.gates)])


class RouterBank(nn.Module):
    """All routers of one layer: instance routers, oldest first, and the task router.

    A sample uses the instance router that the current ``RouteSelection`` names, mixed with its task's gate if a task is
    named: ``beta * G_I(x) + (1 - beta) * G_T(task)`` (CL-MoE eq. 8). Without instance routers, the gate is 1 for every
    expert; with ``pick`` ``task``, it is 1 for those of one of the ``owners``, which are the experts' tasks, or each
    expert has its task's weight in the selection's ``weights``.
    """

    def __init__(self, name: str, top_k: int | None, owners: Sequence[int] = (), pick: str = "sum") -> None:
        super().__init__()
        self.name, self.top_k, self.owners, self.pick = name, top_k, list(owners), pick
        self.instance = nn.ModuleList()
        self.task = TaskRouter()
        self.guide: nn.Module | None = None  # serves all banks, kept in one of them

    parts: ClassVar[int] = 1  # groups that the experts are cut into, each with its own routers

    def forward(self, x: Tensor, experts: Any = None) -> Tensor:
        """The experts' weights for every token, ``[B, T, e]`` float32, ``e`` the widest in use; ``x [B, T, din]``.

        ``experts``, those of the one linear that this bank serves, are for gates that look at the experts' outputs.
        """
        selection, trace = current_routing() or (NEWEST_ROUTER, None)
        if not len(self.instance):
            return self._fixed(x, selection)
        if len(self.instance) == 1 or selection.router is None:
            logits, gate = self._own(x, -1)
        else:
            logits, gate = self._mixed(x, selection, selection.router)
        weights = gate
        if selection.task is not None and selection.beta != 1:
            fixed = self.task.gates[selection.task].unsqueeze(1)  # type: ignore[index]
            weights = selection.beta * gate + (1 - selection.beta) * fixed
        if trace is not None:
            trace.outputs[self.name] = RouterOutput(logits, gate, weights)
        return weights

    def _own(self, x: Tensor, router: int) -> tuple[Tensor, Tensor]:
        logits = self.instance[router](x)
        return logits, gate_from_logits(logits, self.top_k)

    def _fixed(self, x: Tensor, selection: RouteSelection) -> Tensor:
        """The gate ``[B, T, E]`` without routers."""
        gate = x.new_ones((*x.shape[:-1], len(self.owners)), dtype=torch.float32)
        if self.pick == "sum":
            return gate
        shares = (selection.kept or {}).get(SHARES, selection.weights)
        if shares is not None:
            return gate * shares[:, self.owners].unsqueeze(1)
        known, router = set(self.owners), selection.router
        looks = router is not None and not torch.compiler.is_compiling()
        if looks and (unknown := selection.by_router.keys() - known):
            raise ClmoeError(f"{self.name}: no experts of task {min(unknown)}, only of {sorted(known)}")
        chosen = self.owners[-1] if router is None else router.unsqueeze(1)
        for expert, owner in enumerate(self.owners):
            gate[..., expert] = chosen == owner
        return gate

    def _mixed(self, x: Tensor, selection: RouteSelection, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and gate, each sample by its own router; narrower ones are padded."""
        graph = torch.compiler.is_compiling()  # its shapes cannot depend on the routing: all routers see all samples
        used = range(len(self.instance)) if graph else list(selection.by_router)
        if len(used) == 1:
            return self._own(x, used[0])
        width = max(len(cast(Tensor, self.instance[i].weight)) for i in used)
        logits = x.new_full((*x.shape[:-1], width), float("-inf"), dtype=torch.float32)
        gate = torch.zeros_like(logits)
        for i in used:
            rows = slice(None) if graph else selection.by_router[i]
            own_logits, own_gate = self._own(x[rows], i)
            missing = (0, width - own_gate.shape[-1])
            mine = (pad(own_logits, missing, value=float("-inf")), pad(own_gate, missing))
            if graph:
                here = (chosen == i).view(-1, 1, 1)
                logits, gate = torch.where(here, mine[0], logits), torch.where(here, mine[1], gate)
            else:
                logits[rows], gate[rows] = mine
        return logits, gate
