"""KeepLoRA (ICLR 2026): a task learns in directions that neither the pretrained weights nor older tasks use.

For each linear ``W [dout, din]``, with the rows of ``U [k, din]`` an orthonormal basis of the input directions to keep:

1. ``U`` starts as the right singular vectors of the pretrained ``W`` that hold ``weight_energy`` of its energy.
2. Before task ``t``: take ``G``, the mean gradient of ``W`` over a share of the task's records, and remove what lies in
   ``U``: ``G <- G - G U^T U``. ``A`` becomes its first ``r`` right singular vectors, and ``B = 0``.
3. Only ``B`` trains: ``W + s B A``, with the cross-entropy alone.
4. ``B A`` is merged into the weights; here, as in O-LoRA, it is frozen and added up.
5. After task ``t``: take ``G`` again, at the trained weights. Right singular vectors of ``G - G U^T U`` join ``U``
   until it holds ``gradient_energy`` of the energy of ``G``.

Gradients are held for ``blocks_per_pass`` blocks at a time; the released code holds those of all. It also leaves out
the direction that takes step 1 past the threshold (``options.variant=released``) and uses a random sketch in step 2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clmoe.bases.inputs import train_dataset
from clmoe.config import Config
from clmoe.errors import ClmoeError
from clmoe.experts.layer import ExpertLayer, expert_layers, experts_by_linear
from clmoe.methods.base import TaskContext, loss_gradients
from clmoe.methods.olora import AddedLora
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
        if config.model.load_in_4bit:
            raise ClmoeError(f"{config.method} needs the gradients of the base's weights: set model.load_in_4bit=false")

    def rate_factor(self, name: str) -> float:
        return 0.0 if name.endswith(".A") else 1.0

    def begin_task(self, context: TaskContext) -> None:
        """Add the task's LoRA and choose its A."""
        super().begin_task(context)
        kept = self._directions(context)
        linears = self._linears = experts_by_linear(context.model)
        for name, gradient in self._gradients(context):
            rank = len(linears[name].A)  # type: ignore[arg-type]
            linears[name].A.data.copy_(free_directions(gradient, kept[name], rank))  # type: ignore[union-attr]

    def state(self) -> dict[str, Tensor]:
        """A: processes other than those at the task's start would compute it with different rounding."""
        return {name: experts.A.data for name, experts in self._linears.items()}  # type: ignore[union-attr]

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, A in state.items():
            self._linears[name].A.data.copy_(A)  # type: ignore[union-attr]

    def end_task(self, context: TaskContext) -> None:
        """Add the trained task's directions to those that are kept."""
        kept = self._directions(context)
        for name, gradient in self._gradients(context):
            kept[name] = extended(kept[name], gradient, self.options.gradient_energy)
        save_tensors({name: U.cpu().contiguous() for name, U in kept.items()}, context.work / STATE)

    def _directions(self, context: TaskContext) -> dict[str, Tensor]:
        """``U`` of every linear before this task."""
        device = context.base.device
        if context.previous is not None:
            return {name: U.to(device) for name, U in load_tensors(context.previous / STATE).items()}
        energy, last = self.options.weight_energy, -1 if self.options.variant == "released" else None
        weights = {name: weight(layer).detach().float() for name, layer in expert_layers(context.model).items()}
        return {name: principal(W, energy)[:last] for name, W in weights.items()}

    def _gradients(self, context: TaskContext) -> Iterator[tuple[str, Tensor]]:
        """Yield linears and their mean gradients ``[dout, din]`` float32, a few blocks at a time."""
        training, layers = context.config.training, expert_layers(context.model)
        dataset = train_dataset(context.base, context.records, context.image_root, training.max_length)
        wanted = max(1, int(self.options.gradient_share * len(dataset)))
        rows = torch.linspace(0, len(dataset) - 1, wanted).long().tolist()
        blocks = list(dict.fromkeys(layer.block for layer in layers.values()))
        model, size = context.model.eval(), training.micro_batch_size or training.batch_size
        for start in range(0, len(blocks), self.options.blocks_per_pass):
            here = blocks[start : start + self.options.blocks_per_pass]
            group = {name: weight(layer) for name, layer in layers.items() if layer.block in here}
            for parameter in group.values():
                parameter.requires_grad_(True)
            try:
                found = loss_gradients(model, context.base, dataset, rows, list(group.values()), size, "sample")
            finally:
                for parameter in group.values():
                    parameter.requires_grad_(False)
            yield from zip(group, found, strict=True)


def weight(layer: ExpertLayer) -> Tensor:
    """The frozen weight of a patched linear, ``[dout, din]``."""
    return layer.base_layer.weight  # type: ignore[return-value]


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
