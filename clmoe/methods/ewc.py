"""EWC (PNAS 2017; its online form ICML 2018): a weight's importance is its Fisher information."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from clmoe.methods.importance import HeldByImportance, ImportanceOptions
from clmoe.utils.schema import NotNegative


@dataclass(frozen=True)
class EwcOptions(ImportanceOptions):
    """EWC's own choices; see ``ImportanceOptions``.

    Attributes:
        weight: lambda in ``lambda / 2 * F (theta - theta*)^2``; no paper's value fits gradients of another scale.
    """

    weight: NotNegative = 1e3


class Ewc(HeldByImportance):
    """The diagonal of the empirical Fisher information: squared gradients of the true answer's log-likelihood."""

    Options = EwcOptions
    factor = 0.5

    def measure(self, logits: Tensor, targets: Tensor) -> Tensor:
        """``log p(answer | question)``: the sum over the answer's tokens."""
        return -cross_entropy(logits, targets, reduction="sum")

    def fold(self, gradient: Tensor) -> Tensor:
        return gradient.square()


METHODS = {"ewc": Ewc}
