"""Passes over a task's training data after training: whole records for router statistics, prompts for the locator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clmoe.data.collate import PromptDataset, TrainDataset, collate_prompts, collate_train
from clmoe.data.records import Question, TrainRecord
from clmoe.model.llava import LoadedBase, last_prompt_features
from clmoe.train.order import epoch_permutation

if TYPE_CHECKING:
    from pathlib import Path

    from clmoe.methods.base import TaskContext


def sample_records(context: TaskContext, samples: int) -> list[TrainRecord]:
    """At most ``samples`` records, drawn without replacement from the config's seed."""
    order = epoch_permutation(context.config.seed, 0, len(context.records))
    return [context.records[i] for i in order[:samples]]


def train_dataset(base: LoadedBase, records: Sequence[TrainRecord], image_root: Path, max_length: int) -> TrainDataset:
    """Records as training items for this base."""
    return TrainDataset(
        records, image_root, base.tokenizer, base.image_processor, base.image_token_count, max_length
    )


def prompt_dataset(base: LoadedBase, questions: Sequence[Question], image_root: Path) -> PromptDataset:
    """Questions as prompts for this base."""
    return PromptDataset(questions, image_root, base.tokenizer, base.image_processor, base.image_token_count)


def to_device(batch: dict[str, Tensor], base: LoadedBase) -> dict[str, Tensor]:
    """Move a batch; pixels take the base's dtype."""
    return {
        key: value.to(base.device, base.model.dtype if value.is_floating_point() else value.dtype)
        for key, value in batch.items()
    }


def training_batches(context: TaskContext, records: Sequence[TrainRecord]) -> Iterator[dict[str, Tensor]]:
    """Right-padded batches of whole records, in order, on the model's device."""
    config, base = context.config, context.base
    dataset = train_dataset(base, records, context.image_root, config.training.max_length)
    size = config.evaluation.batch_size
    for start in range(0, len(dataset), size):
        items = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
        yield to_device(collate_train(items, base.tokenizer.pad_token_id), base)


def training_features(context: TaskContext, samples: int) -> Tensor:
    """The locator's feature of the first prompt of at most ``samples`` records: ``[M, D]`` float32 on the CPU."""
    config, base = context.config, context.base
    questions = [Question(r.id, r.image, r.turns[0].question, "", {}) for r in sample_records(context, samples)]
    dataset = prompt_dataset(base, questions, context.image_root)
    features = []
    size = config.evaluation.batch_size
    with context.model.disable_adapter():
        for start in range(0, len(dataset), size):
            items = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
            batch = to_device(collate_prompts(items, base.tokenizer.pad_token_id), base)
            features.append(last_prompt_features(context.model.get_base_model(), batch).cpu())  # type: ignore[arg-type]
    return torch.cat(features)
