"""DGG (CVPR 2026): the way back to the weights that the old tasks ended in approximates their gradients.

With ``theta*_{t-1}`` the weights at the end of the previous task, ``g`` the gradient of a batch of new and replayed
records, and ``b ~ Bernoulli(alpha)`` drawn in every step:

    g_old = theta - theta*_{t-1},  shortened to the length of g if it is longer
    g <- g + b g_old

We know the paper only second-hand, from notes on it, and its code is not available to us. Two choices are therefore
ours: lengths are taken over all weights as one vector, and old records are mixed into the batches as in ``replay``.
"""

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from clmoe.methods.base import TaskContext
from clmoe.methods.replay import Replay, ReplayOptions
from clmoe.utils.names import derived_seed
from clmoe.utils.schema import Share, Steps
from clmoe.utils.tensors import trainable


@dataclass(frozen=True)
class Options(ReplayOptions):
    """DGG's own choices; see ``ReplayOptions``.

    Attributes:
        per_task: training records kept of each past task; 2,000 on UCIT.
        alpha: share of the steps that are guided; 0.2 on VQA v2, 0.05 to 0.1 on UCIT.
    """

    per_task: Steps = 2000
    alpha: Share = 0.1


class Dgg(Replay):
    """Replay with some steps pulled back towards the old weights."""

    Options = Options
    needs_gradients = True

    def begin_task(self, context: TaskContext) -> None:
        """Keep the parent's weights, which the model holds before the first step."""
        self._task, self._optimum = context.task, dict[str, Tensor]()
        if context.previous is not None:
            self._optimum = {name: p.detach().clone() for name, p in trainable(context.model).items()}

    @torch.no_grad()
    def change_gradients(self, model: PeftModel, gradients: dict[str, Tensor], step: int) -> None:
        """Add the guidance in a share ``alpha`` of the steps."""
        if not self._optimum:
            return
        generator = torch.Generator().manual_seed(derived_seed(self.config.seed, f"dgg:{self._task}:{step}"))
        guided = float(torch.rand(1, generator=generator)) < self.options.alpha
        self.log("guided", float(guided))
        if guided:
            now = trainable(model)
            guide(list(gradients.values()), [now[name] - self._optimum[name] for name in gradients])


def guide(gradients: list[Tensor], away: list[Tensor]) -> None:
    """Add ``away`` in place, shortened to the gradients' length if it is longer; each list of tensors is one vector."""
    length, limit = (torch.stack([part.norm() for part in parts]).norm() for parts in (away, gradients))
    factor = torch.where(length > limit, limit / length, 1.0)
    for gradient, part in zip(gradients, away, strict=True):
        gradient += factor * part


METHODS = {"dgg": Dgg}
