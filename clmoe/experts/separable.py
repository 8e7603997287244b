"""SMoLoRA's gates (ICCV 2025): one expert from each half of a linear's serves a sample; tokens weight the two."""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from clmoe.experts.routing import (
    NEWEST_ROUTER,
    InstanceRouter,
    RouterBank,
    RouterOutput,
    RouteSelection,
    current_routing,
    router_logits,
    uniform,
)


def best(logits: Tensor, trains: bool) -> Tensor:
    """One-hot of the largest of ``[..., e]``, ties to the lower index; with the softmax's gradient if it ``trains``."""
    first = logits.argsort(dim=-1, descending=True, stable=True)[..., :1]
    chosen = torch.zeros_like(logits).scatter(-1, first, 1.0)
    shares = logits.softmax(-1) if trains else chosen
    return chosen + (shares - shares.detach())


class SeparableBank(RouterBank):
    """The routers of a linear ``din -> dout``; half of its experts see (VU), the other half follow instructions (IF).

    The instance router ``[E/2, din]`` picks one expert by the mean of ``x`` over the sample's prompt. ``instruction``
    ``[E/2, width]`` picks the other by the ``embedding [width]`` of the task that trains; else the row of ``task`` for
    the sample's task gives it. ``fusion [2, dout]`` scores the outputs of the two. ``clmoe/methods/smolora.py`` has the
    equations.
    """

    parts: ClassVar[int] = 2

    def __init__(
        self, name: str, owners: Sequence[int], dout: int, width: int, scaling: float, generator: torch.Generator
    ) -> None:
        super().__init__(name, None, owners)
        self.each, self.scaling = len(owners) // 2, scaling
        self.instruction = InstanceRouter.fresh(width, self.each, generator)
        self.fusion = nn.Parameter(uniform(2, dout, generator))
        self.embedding: Tensor | None = None

    def forward(self, x: Tensor, experts: Any = None) -> Tensor:
        """``[B, T, E]`` float32: one expert of each half per sample, and the fusion's weights of the two per token."""
        selection, trace = current_routing() or (NEWEST_ROUTER, None)
        seen = self._seen(x, selection)
        picks = torch.cat([seen, self._followed(selection).expand_as(seen)], -1).unsqueeze(1)  # [B, 1, E]
        A, B = (factor.float() for factor in experts.packed())
        scored = self.fusion.repeat_interleave(B.shape[1] // 2, 0).t() * B  # each half's own score of each rank
        V = torch.einsum("er,erd->ed", scored.sum(0).view(2 * self.each, -1), A.view(2 * self.each, -1, A.shape[1]))
        scores = self.scaling * router_logits(x, V)  # of fusion_k . B_i A_i x, without [..., dout] tensors
        halves = (picks * scores).unflatten(-1, (2, self.each)).sum(-1)
        weights = picks * halves.softmax(-1).repeat_interleave(self.each, -1)
        if trace is not None:
            trace.outputs[self.name] = RouterOutput(scores, picks.expand_as(weights), weights)
        return weights

    def _seen(self, x: Tensor, selection: RouteSelection) -> Tensor:
        """The pick ``[B, E/2]`` of the seeing half; tokens after the prompt keep the prompt's."""
        asked, kept = selection.asked, selection.kept
        if asked is None and kept and self.name in kept:
            return kept[self.name]
        mask = x.new_ones(x.shape[:-1], dtype=torch.float32) if asked is None else asked.float()
        shares = mask / mask.sum(1, keepdim=True).clamp(min=1)
        logits = self.instance[0]((shares.unsqueeze(1) @ x.float()).squeeze(1))
        chosen = best(logits, cast(Tensor, self.instance[0].weight).requires_grad)
        if asked is not None and kept is not None:
            kept[self.name] = chosen.detach()
        return chosen

    def _followed(self, selection: RouteSelection) -> Tensor:
        """The pick ``[B or 1, E/2]`` of the following half."""
        if self.embedding is not None:
            return best(self.instruction(self.embedding.unsqueeze(0)), self.instruction.weight.requires_grad)
        if self.task.gates is None:  # nothing has been learned yet
            return best(self.fusion.new_zeros(1, self.each), trains=False)
        gates = self.task.gates[:, self.each :]
        return gates[-1:] if selection.task is None else gates[selection.task]
