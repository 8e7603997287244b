"""What EWC and MAS share: weights that mattered to old tasks are held in place.

Both add ``factor * weight * sum_k I_k (theta - theta_k)^2`` to the loss. ``theta_k`` are the weights at the end of an
old task, and ``I_k >= 0`` says how much each mattered to it, which the two measure differently.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from peft import PeftModel
from torch import Tensor

from clmoe.bases.inputs import to_device, train_dataset
from clmoe.data.batches import collate_train, sample_records
from clmoe.data.records import TrainRecord
from clmoe.experts.forward import adapted_base, answer_logits, answer_tokens
from clmoe.experts.routing import RouteTrace
from clmoe.methods.base import TaskContext
from clmoe.methods.lora import Lora
from clmoe.utils.processes import count, rank, summed
from clmoe.utils.schema import NotNegative, Share, Steps
from clmoe.utils.tensors import load_tensors, save_tensors, trainable

STATE = "importance.safetensors"


@dataclass(frozen=True)
class ImportanceOptions:
    """Choices of a method that penalises changes to important weights.

    Attributes:
        weight: lambda, the strength of the penalty.
        anchors: one penalty around the newest weights with all tasks' importance (``online``), or one per task.
        decay: with ``online``, share of the older tasks' importance that remains when a task ends; 1 is the plain sum.
        samples: training records that a task's importance is measured on.
    """

    weight: NotNegative = 1.0
    anchors: Literal["online", "per_task"] = "online"
    decay: Share = 1.0
    samples: Steps = 500


class HeldByImportance(Lora):
    """LoRA with this file's penalty; ``factor`` is part of the method's formula."""

    factor: ClassVar[float] = 1.0

    def measure(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The scalar of one sample whose gradient says what matters; logits ``[n, V]``, correct tokens ``[n]``."""
        raise NotImplementedError

    def fold(self, gradient: Tensor) -> Tensor:
        """Turn a sample's gradient into importance, before the mean over the samples."""
        raise NotImplementedError

    def begin_task(self, context: TaskContext) -> None:
        """Read importance and anchors from the parent's file."""
        state = {} if context.previous is None else load_tensors(context.previous / STATE)
        state = {name: tensor.to(context.base.device) for name, tensor in state.items()}
        self._held = [
            (name, importance, state[f"{task}.anchor.{name}"])
            for (task, kind, name), importance in ((key.split(".", 2), value) for key, value in state.items())
            if kind == "importance"
        ]

    def extra_loss(self, model: PeftModel, trace: RouteTrace, batch: dict[str, Tensor]) -> Tensor | None:
        """The penalty, the same for every batch."""
        if not self._held:
            return None
        now = dict(model.named_parameters())
        pulls = [(importance * (now[name] - anchor).square()).sum() for name, importance, anchor in self._held]
        return self.factor * self.options.weight * torch.stack(pulls).sum()

    def end_task(self, context: TaskContext) -> None:
        """Measure the importance of the trained weights and store it with them."""
        records = sample_records(context.records, self.options.samples, context.config.seed)
        newest = self.importance(context, records)
        state = {} if context.previous is None else load_tensors(context.previous / STATE)
        if self.options.anchors == "online":
            for (_, kind, name), old in ((key.split(".", 2), value) for key, value in state.items()):
                if kind == "importance":
                    newest[name] = newest[name] + self.options.decay * old
            state = {}
        for name, parameter in trainable(context.model).items():
            state[f"{context.index}.importance.{name}"] = newest[name]
            state[f"{context.index}.anchor.{name}"] = parameter.detach().cpu().contiguous()
        save_tensors(state, context.work / STATE)

    def importance(self, context: TaskContext, records: Sequence[TrainRecord]) -> dict[str, Tensor]:
        """The folded gradient of each record, averaged over ``records``: float32 on the CPU, by parameter.

        Takes one record at a time, as the square of a mean is not the mean square. Sums in float64 hide how the records
        are split over processes.
        """
        adapted, base = adapted_base(context.model.eval()), context.base
        parameters = trainable(context.model)
        totals = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        dataset = train_dataset(base, records, context.image_root, context.config.training.max_length)
        for row in range(rank(), len(dataset), count()):
            batch = to_device(collate_train([dataset[row]], base.tokenizer.pad_token_id), base)
            value = self.measure(answer_logits(adapted, batch), answer_tokens(batch["labels"]))
            # a record without an image gives a tuned projector none
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(totals.values(), gradients, strict=True):
                if gradient is not None:
                    total += self.fold(gradient.double())
        return {name: (summed(total) / len(dataset)).float().cpu() for name, total in totals.items()}
