"""MAS (ECCV 2018): weights to which the model's output is sensitive on old tasks' questions are held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clmoe.methods.importance import HeldByImportance, ImportanceOptions

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Options(ImportanceOptions):
    """MAS's own choices; see ``ImportanceOptions``.

    Attributes:
        weight: lambda of the penalty ``lambda * Omega (theta - theta*)^2``; depends on the scale of the logits, so that
            the 1 of the authors' code does not carry over.
    """

    weight: float = 1e-4


class Mas(HeldByImportance):
    """Importance without labels: how much a weight moves the squared length of the logits."""

    Options = Options

    def measure(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Squared L2 norm of the logits, over all positions that predict the answer; the right tokens play no part."""
        return logits.square().sum()

    def fold(self, gradient: Tensor) -> Tensor:
        return gradient.abs()


METHOD: Any = Mas
