"""Batches for a loaded base: of training records, and of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from clmoe.data.collate import PromptDataset, TrainDataset, collate_prompts, collate_train
from clmoe.data.permutation import epoch_permutation
from clmoe.data.records import Question, TrainRecord
from clmoe.model.llava import LoadedBase


def sample_records(records: Sequence[TrainRecord], samples: int, seed: int) -> list[TrainRecord]:
    """At most ``samples`` records, drawn without replacement."""
    return [records[i] for i in epoch_permutation(seed, 0, len(records))[:samples]]


def train_dataset(base: LoadedBase, records: Sequence[TrainRecord], image_root: Path, max_length: int) -> TrainDataset:
    """Records as training items for this base."""
    return TrainDataset(records, image_root, base.tokenizer, base.image_processor, base.image_token_count, max_length)


def prompt_dataset(base: LoadedBase, questions: Sequence[Question], image_root: Path) -> PromptDataset:
    """Questions as prompts for this base."""
    return PromptDataset(questions, image_root, base.tokenizer, base.image_processor, base.image_token_count)


def to_device(batch: dict[str, Tensor], base: LoadedBase) -> dict[str, Tensor]:
    """Move a batch; pixels take the base's dtype."""
    return {
        key: value.to(base.device, base.model.dtype if value.is_floating_point() else value.dtype)
        for key, value in batch.items()
    }


def train_batches(base: LoadedBase, dataset: TrainDataset, size: int) -> Iterator[dict[str, Tensor]]:
    """Right-padded batches of whole records, in order, on the model's device."""
    for start in range(0, len(dataset), size):
        items = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
        yield to_device(collate_train(items, base.tokenizer.pad_token_id), base)


def prompt_batches(base: LoadedBase, dataset: PromptDataset, size: int) -> Iterator[dict[str, Tensor]]:
    """Left-padded batches of prompts, in order, on the model's device."""
    for start in range(0, len(dataset), size):
        items = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
        yield to_device(collate_prompts(items, base.tokenizer.pad_token_id), base)


def first_questions(records: Sequence[TrainRecord]) -> list[Question]:
    """The first turn of each record as a question: the prompt whose feature locates the task."""
    return [Question(record.id, record.image, record.turns[0].question, "", {}) for record in records]
