"""KeepLoRA (ICLR 2026): a task learns in directions that neither the pretrained weights nor older tasks use.

For each linear ``W [dout, din]``, with the rows of ``U [k, din]`` an orthonormal basis of the input directions to keep:

1. ``U`` starts as the right singular vectors of the pretrained ``W`` that hold ``weight_energy`` of its energy.
2. Before task ``t``: take ``G``, the mean gradient of ``W`` over a share of the task's records, and remove what lies in
   ``U``: ``G <- G - G U^T U``. ``A`` becomes its first ``r`` right singular vectors, and ``B = 0``.
3. Only ``B`` trains: ``W + s B A``, with the cross-entropy alone.
4. ``B A`` is merged into the weights; here, as in O-LoRA, it is frozen and added up.
5. After task ``t``: take ``G`` again, at the trained weights. Right singular vectors of ``G - G U^T U`` join ``U``
   until it holds ``gradient_energy`` of the energy of ``G``.

Gradients are held for ``blocks_per_pass`` blocks at a time, and the processes share the decompositions; the released
code holds the gradients of all blocks. It also leaves out the direction that takes step 1 past the threshold
(``options.variant=released``) and uses a random sketch in step 2.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clmoe.config import Config
from clmoe.errors import ClmoeError
from clmoe.experts.layer import expert_layers, experts_by_linear
from clmoe.methods.base import TaskContext
from clmoe.methods.frozen_gradients import frozen_gradients, weight
from clmoe.methods.olora import AddedLora
from clmoe.utils.processes import in_order
from clmoe.utils.schema import Count, InnerShare, Share
from clmoe.utils.tensors import load_tensors, save_tensors

STATE = "kept_directions.safetensors"


@dataclass(frozen=True)
class Options:
    """KeepLoRA's own choices.

    Attributes:
        weight_energy: share of a pretrained weight's energy that is kept, 0.6.
        gradient_energy: share of the energy of a task's gradient that is kept afterwards, 0.99.
        gradient_share: share of a task's records used for each gradient, evenly spaced, 0.2.
        variant: keep as many directions of ``W`` as hold the energy (``published``), or one fewer (``released``).
        blocks_per_pass: blocks whose gradients are held at once; each pass over the records computes this many.
    """

    weight_energy: InnerShare = 0.6
    gradient_energy: InnerShare = 0.99
    gradient_share: Share = 0.2
    variant: Literal["published", "released"] = "published"
    blocks_per_pass: Count = 8


class KeepLora(AddedLora):
    """A LoRA for each task, added up; its A is chosen from the task's gradient and does not train."""

    Options = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for bits in ("load_in_4bit", "load_in_8bit"):
            if getattr(config.model, bits):
                raise ClmoeError(f"{config.method} needs the gradients of the base's weights: set model.{bits}=false")
        self._kept: dict[str, Tensor] = {}  # of the task's start; the first task's would take as long again

    def rate_factor(self, name: str) -> float:
        return 0.0 if name.endswith(".A") else 1.0

    def begin_task(self, context: TaskContext) -> None:
        """Add the task's LoRA and choose its A."""
        super().begin_task(context)
        linears = self._linears = experts_by_linear(context.model)
        self._kept, rank = self._directions(context), self.config.adapter.rank
        for name, A in self._of_gradients(context, lambda name, G, U: free_directions(G, U, rank)):
            linears[name].A.data.copy_(A)  # type: ignore[union-attr]

    def state(self) -> dict[str, Tensor]:
        """A: processes other than those at the task's start would compute it with different rounding."""
        return {name: experts.A.data for name, experts in self._linears.items()}  # type: ignore[union-attr]

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, A in state.items():
            self._linears[name].A.data.copy_(A)  # type: ignore[union-attr]

    def end_task(self, context: TaskContext) -> None:
        """Add the trained task's directions to those that are kept."""
        self._kept = self._kept or self._directions(context)  # an earlier process may have begun the task
        energy = self.options.gradient_energy
        kept = dict(self._of_gradients(context, lambda name, G, U: extended(U, G, energy)))
        save_tensors({name: U.contiguous() for name, U in kept.items()}, context.work / STATE)

    def _directions(self, context: TaskContext) -> dict[str, Tensor]:
        """``U`` of every linear before this task, on the CPU."""
        if context.previous is not None:
            return load_tensors(context.previous / STATE)
        energy, last = self.options.weight_energy, -1 if self.options.variant == "released" else None
        layers = expert_layers(context.model)
        found = in_order(
            list(layers), lambda name: principal(weight(layers[name]).detach().float(), energy)[:last].cpu()
        )
        return dict(zip(layers, found, strict=True))

    def _of_gradients(
        self, context: TaskContext, compute: Callable[[str, Tensor, Tensor], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Every linear with ``compute(its name, G, U)``, on the CPU."""

        def one(item: tuple[str, Tensor]) -> Tensor:
            name, G = item
            return compute(name, G, self._kept[name].to(G)).cpu()

        for found in frozen_gradients(context, self.options.gradient_share, self.options.blocks_per_pass):
            yield from zip(found, in_order(list(found.items()), one), strict=True)


def principal(W: Tensor, energy: float) -> Tensor:
    """The fewest right singular vectors ``[k, din]`` of ``W`` that hold this share of ``|W|^2``."""
    return extended(W.new_zeros(0, W.shape[1]), W, energy)


def free_directions(G: Tensor, U: Tensor, rank: int) -> Tensor:
    """The first ``rank`` right singular vectors ``[rank, din]`` of ``G - G U^T U``; zeros if there are fewer."""
    _, S, V = torch.linalg.svd(G - (G @ U.t()) @ U, full_matrices=False)
    A = G.new_zeros(rank, G.shape[1])
    free = min(rank, int((torch.finfo(S.dtype).eps * max(G.shape) * G.norm() < S).sum()))
    A[:free] = V[:free]
    return A


def extended(U: Tensor, G: Tensor, energy: float) -> Tensor:
    """``U [k, din]`` and the fewest right singular vectors of ``G - G U^T U`` that make it hold ``energy`` of ``G``."""
    total = G.square().sum()
    _, S, V = torch.linalg.svd(G - (G @ U.t()) @ U, full_matrices=False)
    missing = S.square().sum() - torch.cat([S.new_zeros(1), S.square().cumsum(0)])  # with 0, 1, 2, ... of them
    added = int((missing > (1 - energy) * total).sum())
    return torch.cat([U, V[: min(added, U.shape[1] - len(U))]])


METHODS = {"keeplora": KeepLora}
