"""MAS (ECCV 2018): a weight's importance is how much the model's output moves with it; no labels are needed."""

from dataclasses import dataclass

from torch import Tensor

from clmoe.methods.importance import HeldByImportance, ImportanceOptions
from clmoe.utils.schema import NotNegative


@dataclass(frozen=True)
class MasOptions(ImportanceOptions):
    """MAS's own choices; see ``ImportanceOptions``.

    Attributes:
        weight: lambda in ``lambda * Omega (theta - theta*)^2``; the authors' 1 does not fit logits of another scale.
    """

    weight: NotNegative = 1e-4


class Mas(HeldByImportance):
    """Importance without labels: how much a weight moves the squared length of the logits."""

    Options = MasOptions

    def measure(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Squared L2 norm of the logits over all positions that predict the answer, whose tokens are not used."""
        return logits.square().sum()

    def fold(self, gradient: Tensor) -> Tensor:
        return gradient.abs()


METHODS = {"mas": Mas}
