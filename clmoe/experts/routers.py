"""Routers over LoRA experts: per-token instance routers in a bank, and fixed per-task gates."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from clmoe.errors import ClmoeError
from clmoe.experts.routing import NEWEST_ROUTER, RouterOutput, RouteSelection, current_routing


def rows_of(x: Tensor) -> Tensor:
    """``[..., n] -> [N, n]``."""
    return x.reshape(-1, x.shape[-1])


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` in float32 (CL-MoE eq. 5), without keeping a float32 copy of a 16-bit ``x``.

    ``x [..., din]`` any float dtype, ``weight [E, din]`` float32 -> ``[..., E]`` float32.
    """
    return _RouterLogits.apply(x, weight)


class _RouterLogits(torch.autograd.Function):
    """Keeps ``x`` as it came, which the experts keep anyway."""

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


def gate_from_logits(logits: Tensor, top_k: int | None) -> Tensor:
    """Softmax over all experts, or over the ``top_k`` largest logits with zeros elsewhere (LLaVA-CMoE eq. 1).

    ``logits [..., E]`` float32 -> gate ``[..., E]`` that sums to 1. Ties go to the lower index.
    """
    if top_k is None or top_k >= logits.shape[-1]:
        return logits.softmax(-1)
    order = logits.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
    kept = torch.full_like(logits, float("-inf")).scatter(-1, order, logits.gather(-1, order))
    return kept.softmax(-1)


class InstanceRouter(nn.Module):
    """Linear router on each token: logits over ``E`` experts, in float32."""

    weight: Tensor

    def __init__(self, weight: Tensor, frozen: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        if frozen:
            self.freeze()

    @staticmethod
    def fresh(din: int, experts: int, generator: torch.Generator) -> Tensor:
        """Uniform in +-1/sqrt(din), as ``nn.Linear`` starts; ``[experts, din]``."""
        return (torch.rand(experts, din, generator=generator) * 2 - 1) / din**0.5

    @property
    def span(self) -> int:
        """Number of experts this router chooses among: those that existed when its task ended."""
        return self.weight.shape[0]

    def freeze(self) -> None:
        """Turn the weight into a buffer, bit for bit."""
        if isinstance(self.weight, nn.Parameter):
            weight = self.weight.detach().clone()
            del self.weight
            self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., din]`` any float dtype -> logits ``[..., E]`` float32."""
        with torch.autocast(x.device.type, enabled=False):
            return router_logits(x, self.weight)


class TaskRouter(nn.Module):
    """One fixed gate per task, derived from what the instance router did on it (CL-MoE eq. 7).

    ``gates [N, E]`` float32, a persistent buffer: row ``t`` belongs to task ``t``. None before the first task ends.
    """

    gates: Tensor | None

    def __init__(self, gates: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("gates", gates)

    def append(self, gate: Tensor) -> None:
        """Add the next task's gate ``[E]``."""
        row = gate.float().unsqueeze(0)
        self.gates = row if self.gates is None else torch.cat([self.gates, row.to(self.gates)])

    def forward(self, task: Tensor) -> Tensor:
        """``task [B]`` int64 -> gates ``[B, 1, E]``, one for all tokens of a sample."""
        if self.gates is None:
            raise RuntimeError("a task was selected but this layer has no task gates")
        return self.gates[task].unsqueeze(1)


class RouterBank(nn.Module):
    """All routers of one layer: instance routers, oldest first, and the task router.

    A sample uses the instance router that the batch's ``RouteSelection`` names (the newest by default), mixed with its
    task's gate where a task is named: ``beta * G_I(x) + (1 - beta) * G_T(task)`` (CL-MoE eq. 8). Samples of one batch
    may use different routers; each sees only the experts its router spans.

    Without instance routers the gate is fixed: 1 for every expert, or with ``pick`` ``task`` for those of one owner.

    Attributes:
        owners: owner task of each of the layer's experts, oldest first.
    """

    def __init__(self, name: str, top_k: int | None, owners: Sequence[int] = (), pick: str = "sum") -> None:
        super().__init__()
        self.name, self.top_k, self.owners, self.pick = name, top_k, list(owners), pick
        self.instance = nn.ModuleList()
        self.task = TaskRouter()

    def append(self, weight: Tensor, frozen: bool = False) -> None:
        """Add an instance router ``weight [E, din]``."""
        self.instance.append(InstanceRouter(weight, frozen))

    def freeze(self) -> None:
        for router in self.instance:
            cast(InstanceRouter, router).freeze()

    def forward(self, x: Tensor) -> Tensor:
        """The experts' weights for every token, ``[B, T, e]`` float32, ``e`` the widest span in use; ``x [B, T, din]``.

        Raises:
            ClmoeError: a sample's task owns no experts (``pick`` ``task``).
        """
        active = current_routing()
        selection = NEWEST_ROUTER if active is None else active.selection
        if not len(self.instance):
            return self._fixed(x, selection)
        if len(self.instance) == 1 or selection.router is None:
            logits = self.instance[-1](x)
            gate = gate_from_logits(logits, self.top_k)
        else:
            logits, gate = self._mixed(x, selection)
        weights = gate
        if selection.task is not None and selection.beta != 1:
            weights = selection.beta * gate + (1 - selection.beta) * self.task(selection.task)
        if active is not None and active.trace is not None:
            active.trace.recorded[self.name] = RouterOutput(logits, gate, weights)
        return weights

    def _fixed(self, x: Tensor, selection: RouteSelection) -> Tensor:
        """The gate ``[B, T, E]`` without routers: ones, or one-hot by the owner of each expert."""
        gate = x.new_ones((*x.shape[:-1], len(self.owners)), dtype=torch.float32)
        if self.pick == "sum":
            return gate
        if selection.router is None:
            gate[..., : -self.owners.count(self.owners[-1])] = 0
            return gate
        if not torch.compiler.is_compiling() and (unknown := selection.by_router.keys() - set(self.owners)):
            raise ClmoeError(f"{self.name}: no experts of task {min(unknown)}, only of {sorted(set(self.owners))}")
        for expert, owner in enumerate(self.owners):
            gate[..., expert] = (selection.router == owner).unsqueeze(1)
        return gate

    def _mixed(self, x: Tensor, selection: RouteSelection) -> tuple[Tensor, Tensor]:
        """Route each sample with its own router; narrower gates are padded with zeros."""
        routers = cast(list[InstanceRouter], list(self.instance))
        graph = torch.compiler.is_compiling()  # its shapes cannot depend on the routing: every router on every sample
        used = range(len(routers)) if graph else list(selection.by_router)
        if len(used) == 1:
            logits = routers[used[0]](x)
            return logits, gate_from_logits(logits, self.top_k)
        width = max(routers[i].span for i in used)
        logits = x.new_full((*x.shape[:-1], width), float("-inf"), dtype=torch.float32)
        gate = torch.zeros_like(logits)
        for i in used:
            rows = slice(None) if graph else selection.by_router[i]
            answer, missing = routers[i](x[rows]), (0, width - routers[i].span)
            mine = (pad(answer, missing, value=float("-inf")), pad(gate_from_logits(answer, self.top_k), missing))
            if graph:
                here = (selection.router == i).view(-1, 1, 1)  # type: ignore[union-attr]
                logits, gate = torch.where(here, mine[0], logits), torch.where(here, mine[1], gate)
            else:
                logits[rows], gate[rows] = mine
        return logits, gate
