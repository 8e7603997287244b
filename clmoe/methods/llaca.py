"""LLaCA (ICML 2025): each task ends with a moving average of its weights, whose pace follows from the gradients.

In the released code's form of the paper's rule, for each tensor ``theta_t`` after step ``t`` with the gradient ``L'_t``
of that step, and with ``|.|`` the sum of absolute values:

    alpha_t  = 2 (1 + |L'_t|) / (|theta_t - theta*_{t-1}| |L'_t - L'_{t-1}|),  ``fallback`` unless 0 < alpha_t < 1
    theta*_t = (1 - alpha_t) theta*_{t-1} + alpha_t theta_t

``1 - alpha_t`` is the paper's balance weight ``beta_t``. At the end of a task ``theta*`` replaces ``theta``.
The first task has no older weights to keep: it is plain LoRA, as in the released scripts. The average starts from the
weights that the task begins with; the released code starts it from those after the first step: ``variant: released``.
The paper's other half, which groups instructions and gives each group parameters of its own, is not implemented here.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor

from clmoe.methods.base import TaskContext
from clmoe.methods.lora import Lora
from clmoe.utils.schema import Inside
from clmoe.utils.tensors import trainable


@dataclass(frozen=True)
class Options:
    """LLaCA's own choices.

    Attributes:
        fallback: alpha where the rule gives no value between 0 and 1, 0.01.
        variant: the average starts before (``published``) or after (``released``) a task's first step.
    """

    fallback: Inside = 0.01
    variant: Literal["published", "released"] = "published"


class Llaca(Lora):
    """LoRA that trains freely but hands on the average."""

    Options = Options
    needs_gradients = True

    def begin_task(self, context: TaskContext) -> None:
        """Start the average."""
        self._averages, self._device = context.previous is not None, context.base.device
        start = self._averages and self.options.variant == "published"
        self._average = {n: p.detach().clone() for n, p in trainable(context.model).items()} if start else {}
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def after_step(self, model: PeftModel, step: int) -> None:
        """Update the average of every tensor."""
        if not self._averages:
            return
        paces = list[Tensor]()
        for name, theta in trainable(model).items():
            gradient = theta.grad
            assert gradient is not None
            average = self._average.setdefault(name, theta.detach().clone())
            paces.append(pace(theta, average, gradient, self._before.get(name), self.options.fallback))
            average.lerp_(theta, paces[-1])
            self._before[name] = gradient.clone()
        self.log("alpha", torch.stack(paces).mean())

    def state(self) -> dict[str, Tensor]:
        """The average and the last gradient."""
        kept = {"average": self._average, "gradient": self._before}
        return {f"{kind}.{name}": tensor for kind, tensors in kept.items() for name, tensor in tensors.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore both on the device of the weights."""
        for key, tensor in state.items():
            kind, name = key.split(".", 1)
            (self._average if kind == "average" else self._before)[name] = tensor.to(self._device)

    @torch.no_grad()
    def finish(self, model: PeftModel) -> None:
        """Replace the weights with the average."""
        for name, theta in trainable(model).items() if self._averages else ():
            theta.copy_(self._average[name])


def pace(theta: Tensor, average: Tensor, gradient: Tensor, before: Tensor | None, fallback: float) -> Tensor:
    """``alpha_t [] float32`` of one tensor; ``before`` is the previous step's gradient, None in a task's first step."""
    if before is None:
        return theta.new_full((), fallback)
    bend = (theta - average).abs().sum() * (gradient - before).abs().sum()
    alpha = 2 * (1 + gradient.abs().sum()) / bend  # infinite where nothing has moved
    return torch.where((alpha > 0) & (alpha < 1), alpha, fallback)


METHODS = {"llaca": Llaca}
