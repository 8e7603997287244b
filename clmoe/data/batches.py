"""From records to batches: datasets that make one item at a time, collation, and sampling.

Items hold tensors only and nothing random is drawn here, so a batch does not depend on the number of loader workers.
Letters: B records, T tokens of the longest record, I images of H x W pixels.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from clmoe.data.prompts import IGNORE
from clmoe.data.records import Question, TrainRecord
from clmoe.errors import ClmoeError

Item = TypeVar("Item", bound="PromptItem")


class Encoder(Protocol):
    """Turns records into a base's inputs; ``read_image`` gives what the makers of items take as an image."""

    def read_image(self, path: Path) -> Any: ...
    def train_item(self, record: TrainRecord, image: Any, max_length: int) -> "TrainItem": ...
    def prompt_item(self, question: Question, image: Any) -> "PromptItem": ...
    def check_fit(self, record: TrainRecord, max_length: int) -> None:
        """Raise ClmoeError if the tokenizer fits no record; images are not read."""


@dataclass(frozen=True, slots=True)
class PromptItem:
    """One text with its image.

    Attributes:
        input_ids: [T] int64.
        pixel_values: [3, H, W] float32, or kept features [P, D], for LLaVA-1.5; None for text only and other bases.
        extra: other inputs of the model by name: ``*token_type_ids`` [T] int64, and those of the image, whose first
            dimension counts images or their parts.
    """

    input_ids: Tensor
    pixel_values: Tensor | None
    extra: dict[str, Tensor] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True, slots=True)
class TrainItem(PromptItem):
    """A ``PromptItem`` with labels: [T] int64."""

    labels: Tensor


# ---- Datasets


class _Items(Dataset[Item]):
    """Rows as items: text is tokenised and images are read on access. Subclasses make the item for one row."""

    def __init__(self, rows: Sequence[Any], image_root: Path, encoder: Encoder) -> None:
        self.rows, self.image_root, self.encoder = rows, Path(image_root), encoder

    def item(self, row: Any, image: Any) -> Item:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """A batch's items, as the loader asks for them. Each image is read once, and its items share the tensor."""
        images: dict[str | None, Any] = {None: None}
        items = []
        for row in (self.rows[index] for index in indices):
            if row.image not in images:
                images[row.image] = self.encoder.read_image(self.image_root / row.image)
            items.append(self.item(row, images[row.image]))
        return items


class TrainDataset(_Items[TrainItem]):
    """Training records as items. Raises ClmoeError at once for none, or if the first does not fit the tokenizer."""

    def __init__(self, records: Sequence[TrainRecord], image_root: Path, encoder: Encoder, max_length: int) -> None:
        if not records:
            raise ClmoeError("there are no training records; expected at least one")
        super().__init__(records, image_root, encoder)
        self.max_length = max_length
        encoder.check_fit(records[0], max_length)

    def item(self, row: TrainRecord, image: Any) -> TrainItem:
        return self.encoder.train_item(row, image, self.max_length)


class PromptDataset(_Items[PromptItem]):
    """Questions as prompts; images are preprocessed exactly as in training."""

    def item(self, row: Question, image: Any) -> PromptItem:
        return self.encoder.prompt_item(row, image)


class NumberedDataset(Dataset[tuple[int, TrainItem]]):
    """A dataset's items with their places in it."""

    def __init__(self, dataset: TrainDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, TrainItem]] | ClmoeError:
        """The items, or what is wrong with one of them: raised in a data worker, it would arrive as a traceback."""
        try:
            return list(zip(indices, self.dataset.__getitems__(indices), strict=True))
        except ClmoeError as error:
            return ClmoeError(str(error))


# ---- Collation

ERROR = "error"


def collate_train(items: Sequence[TrainItem], pad_id: int) -> dict[str, Tensor]:
    """A training batch, padded on the right.

    ``input_ids``, ``attention_mask`` (1 = token) and ``labels`` (padding is -100) are ``[B, T]`` int64, ``pixel_values
    [I, 3, H, W]`` float32 (or kept features ``[I, P, D]``) of the records that have an image; absent if none has. From
    ``extra``, ``*token_type_ids`` become ``[B, T]``, 0 in padding and where a record has none; image inputs are
    concatenated, and if their other dimensions differ, all are padded with 0 to the largest.
    """
    return _collate(items, pad_id, "right") | {"labels": _pad([item.labels for item in items], IGNORE, "right")}


def collate_numbered(items: Sequence[tuple[int, TrainItem]] | ClmoeError, pad_id: int) -> dict[str, Any]:
    """Like ``collate_train``, with the items' places in their dataset as ``rows [B]`` int64.

    An error instead of items becomes a batch that ``readable`` raises.
    """
    if isinstance(items, ClmoeError):
        return {ERROR: items}
    return collate_train([item for _, item in items], pad_id) | {"rows": torch.tensor([row for row, _ in items])}


def collate_prompts(items: Sequence[PromptItem], pad_id: int) -> dict[str, Tensor]:
    """A batch to generate from, padded on the left; keys and shapes as in ``collate_train``, without labels."""
    return _collate(items, pad_id, "left")


def readable(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same batches. Raises the error that ``collate_numbered`` passed on."""
    for batch in batches:
        if ERROR in batch:
            raise batch[ERROR]
        yield batch


def _collate(items: Sequence[PromptItem], pad_id: int, side: str) -> dict[str, Tensor]:
    ids = [item.input_ids for item in items]
    pixels = [item.pixel_values for item in items if item.pixel_values is not None]
    batch = {"input_ids": _pad(ids, pad_id, side), "attention_mask": _pad([*map(torch.ones_like, ids)], 0, side)}
    batch |= {"pixel_values": torch.stack(pixels)} if pixels else {}
    for name in sorted({name for item in items for name in item.extra}):
        if name.endswith("token_type_ids"):
            rows = [item.extra.get(name, torch.zeros_like(item.input_ids)) for item in items]
            batch[name] = _pad(rows, 0, side)
        else:
            batch[name] = _joined([item.extra[name] for item in items if name in item.extra])
    return batch


def _pad(rows: list[Tensor], value: int, side: str) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def _joined(parts: list[Tensor]) -> Tensor:
    """``[n_i, ...]`` one after the other, padded with 0 to the largest of each later dimension."""
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    joined = parts[0].new_zeros(sum(map(len, parts)), *largest)
    row = 0
    for part in parts:
        joined[(slice(row, row + len(part)), *(slice(size) for size in part.shape[1:]))] = part
        row += len(part)
    return joined


# ---- Sampling


def epoch_permutation(seed: int, epoch: int, records: int) -> np.ndarray:
    """The order of one epoch, ``[records]`` int64: a pure function of its arguments, the one source of sample order."""
    return np.random.default_rng([seed, epoch]).permutation(records)


def sample_records(records: Sequence[TrainRecord], samples: int, seed: int) -> list[TrainRecord]:
    """At most ``samples`` records, drawn without replacement; masked ones among them are left out."""
    drawn = (records[i] for i in epoch_permutation(seed, 0, len(records))[:samples])
    return [record for record in drawn if not record.masked]


def first_questions(records: Sequence[TrainRecord]) -> list[Question]:
    """The first turn of each record as a question: the prompt whose feature locates the task."""
    return [Question(record.id, record.image, record.turns[0].question, "", {}) for record in records]
