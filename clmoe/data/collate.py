"""Datasets that read one item at a time, and the functions that make batches of items.

Items hold tensors only and nothing random is drawn, so a batch does not depend on the number of loader
workers. Letters: B rows, T tokens of the longest row, I rows that have an image, H and W the vision tower's
input size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from clmoe.data.images import read_pixels
from clmoe.data.prompts import IGNORE, encode_prompt, encode_training
from clmoe.data.records import Question, TrainRecord
from clmoe.errors import ClmoeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class TrainItem:
    """input_ids and labels: [T] int64; pixel_values: [3, H, W] float32, kept features [P, D], or None for text only."""

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None


@dataclass(frozen=True, slots=True)
class PromptItem:
    """input_ids: [T] int64; pixel_values: [3, H, W] float32, kept features [P, D], or None for text only."""

    input_ids: Tensor
    pixel_values: Tensor | None


def collate_train(items: Sequence[TrainItem], pad_id: int) -> dict[str, Tensor]:
    """A training batch, padded at the right.

    Returns input_ids, attention_mask (1 = token, 0 = padding) and labels (padding is -100), all [B, T] int64,
    and pixel_values [I, 3, H, W] float32 (or kept features [I, P, D]) of the rows that have an image, in row
    order; the key is absent if no row has one.
    """
    batch = _pad([item.input_ids for item in items], pad_id, left=False)
    batch["labels"] = _pad([item.labels for item in items], IGNORE, left=False)["input_ids"]
    return batch | _stack_pixels([item.pixel_values for item in items])


def collate_numbered(
    items: Sequence[tuple[int, TrainItem]],
    pad_id: int,
    collate: Callable[[Sequence[TrainItem], int], dict[str, Tensor]] = collate_train,
) -> dict[str, Tensor]:
    """As ``collate``, with the items' places in their dataset as rows [B] int64."""
    return collate([item for _, item in items], pad_id) | {"rows": torch.tensor([row for row, _ in items])}


def collate_prompts(items: Sequence[PromptItem], pad_id: int) -> dict[str, Tensor]:
    """A batch to generate from, padded at the left; keys and shapes as in collate_train, without labels."""
    batch = _pad([item.input_ids for item in items], pad_id, left=True)
    return batch | _stack_pixels([item.pixel_values for item in items])


class TrainDataset(Dataset[TrainItem]):
    """Training records as items. Images are decoded and text is tokenised on access.

    read_image reads an image file as pixel_values; None decodes and preprocesses it.

    Raises ClmoeError at once if there are no records or the tokenizer does not fit the template (the first
    record is encoded as a trial), and on access for a bad image or a record whose answer lies beyond
    max_length.
    """

    def __init__(
        self,
        records: Sequence[TrainRecord],
        image_root: Path,
        tokenizer: PreTrainedTokenizerFast,
        image_processor: Any,
        image_token_count: int,
        max_length: int,
        read_image: Callable[[Path], Tensor] | None = None,
    ) -> None:
        if not records:
            raise ClmoeError("there are no training records; expected at least one")
        self.records, self.image_root = records, Path(image_root)
        self.tokenizer, self.read_image = tokenizer, read_image or partial(read_pixels, image_processor=image_processor)
        self.image_token_count, self.max_length = image_token_count, max_length
        encode_training(records[0], tokenizer, image_token_count, max_length)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> TrainItem:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[TrainItem]:
        """What the loader asks for: a batch. Its items of one image, read once, hold the same tensor."""
        images = {index: self.records[index].image for index in indices}
        read: dict[str | None, Tensor | None] = {None: None}
        for image in images.values():
            if image is not None and image not in read:
                read[image] = self.read_image(self.image_root / image)
        return [self._item(index, read[images[index]]) for index in indices]

    def _item(self, index: int, pixels: Tensor | None) -> TrainItem:
        encoded = encode_training(self.records[index], self.tokenizer, self.image_token_count, self.max_length)
        return TrainItem(torch.tensor(encoded.input_ids), torch.tensor(encoded.labels), pixels)


class NumberedDataset(Dataset[tuple[int, TrainItem]]):
    """A dataset's items with their places in it."""

    def __init__(self, dataset: TrainDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, TrainItem]:
        return index, self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, TrainItem]]:
        """A batch; items of one image hold the same tensor, see ``TrainDataset``."""
        return list(zip(indices, self.dataset.__getitems__(indices), strict=True))


class PromptDataset(Dataset[PromptItem]):
    """Questions as prompts to answer; the image goes through the same preprocessing as in training, see there."""

    def __init__(
        self,
        questions: Sequence[Question],
        image_root: Path,
        tokenizer: PreTrainedTokenizerFast,
        image_processor: Any,
        image_token_count: int,
        read_image: Callable[[Path], Tensor] | None = None,
    ) -> None:
        self.questions, self.image_root = questions, Path(image_root)
        self.tokenizer, self.read_image = tokenizer, read_image or partial(read_pixels, image_processor=image_processor)
        self.image_token_count = image_token_count

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> PromptItem:
        image = self.questions[index].image
        return PromptItem(self.input_ids(index), None if image is None else self.read_image(self.image_root / image))

    def input_ids(self, index: int) -> Tensor:
        """The prompt's tokens ``[T]`` int64, without reading its image."""
        question = self.questions[index]
        has_image = question.image is not None
        return torch.tensor(encode_prompt(question.text, has_image, self.tokenizer, self.image_token_count))


def _pad(rows: list[Tensor], value: int, left: bool) -> dict[str, Tensor]:
    """Rows [T_i] int64 -> input_ids and attention_mask [B, T] int64."""
    length = max(len(row) for row in rows)
    padded = torch.full((len(rows), length), value, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for number, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        padded[number, where] = row
        mask[number, where] = 1
    return {"input_ids": padded, "attention_mask": mask}


def _stack_pixels(pixels: list[Tensor | None]) -> dict[str, Tensor]:
    present = [value for value in pixels if value is not None]
    return {"pixel_values": torch.stack(present)} if present else {}
