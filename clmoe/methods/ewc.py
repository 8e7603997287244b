"""EWC (PNAS 2017, online form ICML 2018): weights that mattered to old tasks, by their Fisher information, are held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clmoe.methods.importance import HeldByImportance, ImportanceOptions

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Options(ImportanceOptions):
    """EWC's own choices; see ``ImportanceOptions``.

    Attributes:
        weight: lambda of the penalty ``lambda / 2 * F (theta - theta*)^2``; depends on the scale of the task's
            gradients, so that no value of a paper carries over.
    """

    weight: float = 1e3


class Ewc(HeldByImportance):
    """The diagonal of the empirical Fisher information: squared gradients of the true answer's log-likelihood."""

    Options = Options
    factor = 0.5

    def measure(self, logits: Tensor, targets: Tensor) -> Tensor:
        """``log p(answer | question)``: the sum over the answer's tokens."""
        from torch.nn.functional import cross_entropy

        return -cross_entropy(logits, targets, reduction="sum")

    def fold(self, gradient: Tensor) -> Tensor:
        return gradient.square()


METHOD: Any = Ewc
