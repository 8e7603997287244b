"""A-GEM (ICLR 2019): to first order, no step raises the mean loss on a memory of the past tasks.

In the paper's notation, with ``g`` the gradient of the batch and ``g_ref`` that of records drawn from the memory:

- eq. 8: minimise ``|g - g~|^2`` subject to ``g~ . g_ref >= 0``.
- eq. 11, its solution: ``g~ = g - (g . g_ref) / (g_ref . g_ref) g_ref`` where ``g . g_ref < 0``, else ``g~ = g``.

``g`` and ``g_ref`` cover all weights that train, taken as one vector.
"""

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from clmoe.bases.inputs import train_dataset
from clmoe.methods.base import TaskContext, loss_gradients
from clmoe.methods.memory import MemoryOptions, Remembers, load_memory
from clmoe.utils.names import derived_seed
from clmoe.utils.schema import Count
from clmoe.utils.tensors import trainable


@dataclass(frozen=True)
class Options(MemoryOptions):
    """A-GEM's own choices; see ``MemoryOptions``.

    Attributes:
        reference_batch: memory records used for ``g_ref`` in each step; None takes training.batch_size.
    """

    reference_batch: Count | None = None


class AGem(Remembers):
    """LoRA whose gradient is projected where it would raise the memory's loss; it never trains on the memory."""

    Options = Options
    needs_gradients = True

    def begin_task(self, context: TaskContext) -> None:
        """Load the parent's memory."""
        records = [record for past in load_memory(context.previous) for record in past.records]
        length, self._base, self._task = context.config.training.max_length, context.base, context.task
        self._memory = train_dataset(context.base, records, context.data, length) if records else None

    def change_gradients(self, model: PeftModel, gradients: dict[str, Tensor], step: int) -> None:
        """Project ``g`` onto the half-space in which the memory's loss does not rise."""
        if self._memory is None:
            return
        training = self.config.training
        size = min(self.options.reference_batch or training.batch_size, len(self._memory))
        generator = torch.Generator().manual_seed(derived_seed(self.config.seed, f"agem:{self._task}:{step}"))
        rows = torch.randperm(len(self._memory), generator=generator)[:size].tolist()
        now = trainable(model)
        weights = [now[name] for name in gradients]
        micro = training.micro_batch_size or size
        reference = loss_gradients(model, self._base, self._memory, rows, weights, micro, "token")
        self.log("projected", float(project(list(gradients.values()), reference)))


def project(gradients: list[Tensor], reference: list[Tensor]) -> bool:
    """Apply eq. 11 in place, each list of tensors taken as one vector; return whether the two were in conflict."""
    along = sum((g * r).sum() for g, r in zip(gradients, reference, strict=True))
    length = sum(r.square().sum() for r in reference)
    if along >= 0:  # also where the memory's gradient vanishes
        return False
    for g, r in zip(gradients, reference, strict=True):
        g -= along / length * r
    return True


METHODS = {"agem": AGem}
