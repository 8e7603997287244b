"""LwF (ECCV 2016): on the new task's data the model keeps answering as it did before the task."""

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import kl_div

from clmoe.experts.forward import adapted_base, answer_logits, mean_over_samples
from clmoe.experts.routing import RouteTrace
from clmoe.methods.base import TaskContext
from clmoe.methods.lora import Lora
from clmoe.utils.schema import NotNegative, Positive
from clmoe.utils.tensors import trainable

ADAPTED = "base_model.model.model."  # prefix of the names of a PeftModel's parameters inside the base's ``model``


@dataclass(frozen=True)
class Options:
    """LwF's own choices.

    Attributes:
        weight: weight of the distillation loss, lambda_o.
        temperature: temperature of both distributions, 2.
    """

    weight: NotNegative = 1.0
    temperature: Positive = 2.0


def divergence(before: Tensor, now: Tensor, temperature: float) -> Tensor:
    """``KL(before || now)`` of the softened distributions of each row of logits ``[N, V]``: ``[N]``."""
    before, now = ((logits / temperature).log_softmax(-1) for logits in (before, now))
    return kl_div(now, before, reduction="none", log_target=True).sum(-1)


class LwF(Lora):
    """LoRA that is held to its parent's answers; the parent is a few tensors on the same frozen base."""

    Options = Options
    reads_logits = True

    def begin_task(self, context: TaskContext) -> None:
        """Before the first step the weights are those of the parent's file, bit for bit: keep them."""
        self._parent: dict[str, Tensor] = {}
        if context.previous is not None:
            trained = trainable(context.model).items()
            self._parent = {name.removeprefix(ADAPTED): p.detach().clone() for name, p in trained}

    def extra_loss(self, model: PeftModel, trace: RouteTrace, batch: dict[str, Tensor]) -> Tensor | None:
        """A second pass without gradient, with the parent's tensors in place of the live ones and dropout off."""
        if not self._parent:
            return None
        adapted = adapted_base(model)
        training = adapted.training
        with torch.no_grad():
            before = answer_logits(adapted.eval(), batch, self._parent)
        adapted.train(training)
        distances = divergence(before, batch["logits"], self.options.temperature)
        return self.options.weight * mean_over_samples(distances, batch["labels"])


METHODS = {"lwf": LwF}
