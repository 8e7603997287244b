"""Batches for a loaded base: training records, prompts, and what a question's router choice needs to know."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clmoe.data.collate import PromptDataset, TrainDataset, collate_prompts, collate_train
from clmoe.data.permutation import epoch_permutation
from clmoe.data.records import Question, TrainRecord
from clmoe.errors import ClmoeError
from clmoe.model.llava import LoadedBase
from clmoe.model.routing import RouterChoice


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


@dataclass(frozen=True)
class PromptBatch:
    """A left-padded batch of questions as a method's ``selection`` sees it.

    Attributes:
        inputs: ``input_ids``, ``attention_mask`` ``[B, T]`` and ``pixel_values`` on the model's device.
        question_ids: of the rows.
        task_index: the questions' true task, counted in training order; None if it was never trained.
        seed: of the random router.
    """

    inputs: dict[str, Tensor]
    question_ids: list[str]
    task_index: int | None
    seed: int

    def known_task(self, router: RouterChoice, tasks: int) -> Tensor | None:
        """Task of each row ``[B]`` int64 where ``router`` says it without looking at the sample, else None.

        Raises:
            ClmoeError: the oracle is asked for a task that was never trained.
        """
        rows = len(self.question_ids)
        if router == "located":
            return None
        if router == "last":
            return torch.full((rows,), tasks - 1)
        if router == "random":
            return torch.tensor([_draw(self.seed, name, tasks) for name in self.question_ids])
        if self.task_index is None or self.task_index >= tasks:
            raise ClmoeError("--router oracle: this checkpoint was not trained on that task; use --router located")
        return torch.full((rows,), self.task_index)


def _draw(seed: int, name: str, tasks: int) -> int:
    """A task drawn from the seed and the question, whatever batch the question is in."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") % tasks
