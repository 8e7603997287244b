"""Batches for a loaded base: of training records, and of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from clmoe.data.collate import PromptDataset, TrainDataset, collate_prompts, collate_train
from clmoe.data.images import read_pixels
from clmoe.data.permutation import epoch_permutation
from clmoe.data.records import Question, TrainRecord
from clmoe.model.llava import LoadedBase
from clmoe.utils.processes import in_order

R = TypeVar("R")


def sample_records(records: Sequence[TrainRecord], samples: int, seed: int) -> list[TrainRecord]:
    """At most ``samples`` records, drawn without replacement."""
    return [records[i] for i in epoch_permutation(seed, 0, len(records))[:samples]]


def train_dataset(base: LoadedBase, records: Sequence[TrainRecord], image_root: Path, max_length: int) -> TrainDataset:
    """Records as training items for this base; of several processes all must call it."""
    read = _kept_features(base, (record.image for record in records), image_root)
    return TrainDataset(
        records, image_root, base.tokenizer, base.image_processor, base.image_token_count, max_length, read
    )


def prompt_dataset(base: LoadedBase, questions: Sequence[Question], image_root: Path) -> PromptDataset:
    """Questions as prompts for this base; of several processes all must call it."""
    read = _kept_features(base, (question.image for question in questions), image_root)
    return PromptDataset(questions, image_root, base.tokenizer, base.image_processor, base.image_token_count, read)


def _kept_features(base: LoadedBase, images: Iterable[str | None], image_root: Path) -> Callable[[Path], Tensor] | None:
    """What reads an image's features instead of its pixels, where the base keeps them; all of ``images`` have some."""
    if base.vision is None:
        return None
    paths = (image_root / image for image in images if image is not None)
    base.vision.fill(base.model.model.vision_tower, paths, partial(read_pixels, image_processor=base.image_processor))
    return base.vision.read


def to_device(batch: dict[str, Tensor], base: LoadedBase) -> dict[str, Tensor]:
    """Move a batch; pixels take the base's dtype."""
    return {
        key: value.to(base.device, base.model.dtype if value.is_floating_point() else value.dtype)
        for key, value in batch.items()
    }


def over_train_batches(
    base: LoadedBase, dataset: TrainDataset, size: int, compute: Callable[[dict[str, Tensor]], R]
) -> list[R]:
    """``compute`` of right-padded batches of whole records on the model's device, in order, shared by the processes."""
    return _over_batches(base, dataset, size, collate_train, compute)


def over_prompt_batches(
    base: LoadedBase, dataset: PromptDataset, size: int, compute: Callable[[dict[str, Tensor]], R]
) -> list[R]:
    """``compute`` of left-padded batches of prompts on the model's device, in order, shared by the processes."""
    return _over_batches(base, dataset, size, collate_prompts, compute)


def _over_batches(
    base: LoadedBase,
    dataset: Any,
    size: int,
    collate: Callable[[list[Any], int], dict[str, Tensor]],
    compute: Callable[[dict[str, Tensor]], R],
) -> list[R]:
    def one(start: int) -> R:
        items = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
        return compute(to_device(collate(items, base.tokenizer.pad_token_id), base))

    return in_order(range(0, len(dataset), size), one)


def first_questions(records: Sequence[TrainRecord]) -> list[Question]:
    """The first turn of each record as a question: the prompt whose feature locates the task."""
    return [Question(record.id, record.image, record.turns[0].question, "", {}) for record in records]
