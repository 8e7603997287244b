"""The locator's feature on a task's training prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clmoe.data.batches import first_questions, prompt_batches, prompt_dataset, sample_records
from clmoe.model.locator import base_features

if TYPE_CHECKING:
    from torch import Tensor

    from clmoe.methods.context import TaskContext


def training_features(context: TaskContext, samples: int) -> Tensor:
    """Features ``[M, D]`` float32 on the CPU of the first prompt of at most ``samples`` records."""
    base, config = context.base, context.config
    questions = first_questions(sample_records(context.records, samples, config.seed))
    dataset = prompt_dataset(base, questions, context.image_root)
    return base_features(context.model, prompt_batches(base, dataset, config.evaluation.batch_size))
