"""RegLoRA (SEFE, ICML 2025): the entries of the weight updates that mattered most to old tasks are kept near zero.

With ``dW_t = B_t A_t`` the update of task ``t``, which trains on a base that holds all older updates:

- after task ``t``: ``M_t`` holds the largest entries of ``|dW_t|`` in each linear, a share ``top`` of them.
- task ``t`` is trained with ``L = L_CE + lambda * mean over linears of mean over (i, j) in M_1 u .. u M_{t-1} of
  |(B_t A_t)_ij|``; LoRA's factor ``s`` is not part of the penalty.

SEFE's other half, answer-style diversification, rewrites a task's data: ``training.asd``, see ``clmoe.data.styles``.
The released code appends ``M_t`` to the list of the older ones, so an entry of several tasks counts several times in
the mean: ``variant: released``.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from peft import PeftModel
from torch import Tensor

from clmoe.experts.layer import experts_by_linear
from clmoe.experts.routing import RouteTrace
from clmoe.methods.base import TaskContext
from clmoe.methods.olora import AddedLora
from clmoe.utils.schema import NotNegative, Range
from clmoe.utils.tensors import load_tensors, save_tensors

STATE = "key_elements.safetensors"


@dataclass(frozen=True)
class Options:
    """RegLoRA's own choices.

    Attributes:
        weight: lambda, 2500.
        top: share of each linear's entries that a task adds to the key elements, 2 %.
        variant: an entry counts once (``published``) or once for each of its tasks (``released``).
    """

    weight: NotNegative = 2.5e3
    top: Annotated[float, Range(0, 1, "low")] = 0.02
    variant: Literal["published", "released"] = "published"


class RegLora(AddedLora):
    """A LoRA for each task, added up; the penalty keeps the new one off the older ones' key elements."""

    Options = Options

    def begin_task(self, context: TaskContext) -> None:
        """Add the task's LoRA, and read the key elements of the older ones."""
        super().begin_task(context)
        stored = {} if context.previous is None else load_tensors(context.previous / STATE)
        self._keys = {name: keys.to(context.base.device).long() for name, keys in stored.items()}

    def extra_loss(self, model: PeftModel, trace: RouteTrace, batch: dict[str, Tensor]) -> Tensor | None:
        """The penalty, the same for every batch."""
        if not self._keys:
            return None
        linears = experts_by_linear(model)
        means = [key_mean(linears[n].A, linears[n].B, keys) for n, keys in self._keys.items()]  # type: ignore[arg-type]
        penalty = torch.stack(means).mean()
        self.log("penalty", penalty)
        return self.options.weight * penalty

    def end_task(self, context: TaskContext) -> None:
        """Add the task's key elements to the older tasks'."""
        stored = {} if context.previous is None else load_tensors(context.previous / STATE)
        found = {}
        for name, experts in experts_by_linear(context.model).items():
            A, B = (factor.detach() for factor in (experts.A, experts.B))  # type: ignore[union-attr]
            found[name] = torch.cat(
                [stored.get(name, torch.empty(0, dtype=torch.int32)), key_elements(A, B, self.options.top)]
            )
        if self.options.variant == "published":
            found = {name: keys.unique() for name, keys in found.items()}
        save_tensors(found, context.work / STATE)


def key_elements(A: Tensor, B: Tensor, top: float) -> Tensor:
    """Positions of the largest entries in the flattened ``B A``, at least one: sorted int32, on the CPU.

    ``A [r, din]``, ``B [dout, r]``; ``top`` is the share to take.
    """
    size = (B @ A).abs().flatten()
    return size.topk(max(1, int(top * len(size)))).indices.sort().values.int().cpu()


def key_mean(A: Tensor, B: Tensor, keys: Tensor) -> Tensor:
    """Mean of ``|(B A)_ij|`` over ``keys``, int64 positions in the flattened product."""
    return (B @ A).flatten()[keys].abs().mean()


METHODS = {"reglora": RegLora}
