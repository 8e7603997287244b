"""Batches on a base's device, and what the prompts of one image have in common, read once.

LLaVA's prompt puts system sentence and image first, so under causal attention the states of these tokens do not depend
on the question. Letters: B rows, G groups of rows with a common prefix, P and S tokens of the longest prefix and rest.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from clmoe.bases.llava import LoadedBase, vision_tower_of
from clmoe.data.batches import (
    PromptDataset,
    PromptItem,
    TrainDataset,
    collate_prompts,
    collate_train,
    common_prefix,
)
from clmoe.data.records import Question, TrainRecord
from clmoe.utils.processes import in_order

R = TypeVar("R")
Compute = Callable[[dict[str, Tensor]], R]

WORTHWHILE = 0.75
"""Prefixes are shared if this reads at most this share of the tokens that whole prompts would take."""


def train_dataset(base: LoadedBase, records: Sequence[TrainRecord], image_root: Path, max_length: int) -> TrainDataset:
    """Records as training items for this base; all processes must call it."""
    _fill_cache(base, (record.image for record in records), image_root)
    return TrainDataset(records, image_root, base.encoder, max_length)


def prompt_dataset(base: LoadedBase, questions: Sequence[Question], image_root: Path) -> PromptDataset:
    """Questions as prompts for this base; all processes must call it."""
    _fill_cache(base, (question.image for question in questions), image_root)
    return PromptDataset(questions, image_root, base.encoder)


def _fill_cache(base: LoadedBase, images: Iterable[str | None], image_root: Path) -> None:
    """Compute the image features that the base keeps, if it keeps any."""
    if base.vision is not None:
        paths = (image_root / image for image in images if image is not None)
        base.vision.fill(vision_tower_of(base.model), paths, base.read_pixels)


def to_device(batch: dict[str, Tensor], base: LoadedBase) -> dict[str, Tensor]:
    """Move a batch to the base's device; pixels take the base's dtype."""
    return {
        key: value.to(base.device, base.dtype if value.is_floating_point() else value.dtype)
        for key, value in batch.items()
    }


def over_train_batches(base: LoadedBase, dataset: TrainDataset, size: int, compute: Compute[R]) -> list[R]:
    """``compute`` of right-padded batches of whole records, in order; the processes share the work."""
    return _over_batches(base, dataset, size, collate_train, compute)


def over_prompt_batches(base: LoadedBase, dataset: PromptDataset, size: int, compute: Compute[R]) -> list[R]:
    """``compute`` of left-padded batches of prompts, in order; the processes share the work."""
    return _over_batches(base, dataset, size, collate_prompts, compute)


def _over_batches(
    base: LoadedBase, dataset: Any, size: int, collate: Callable[..., dict[str, Tensor]], compute: Compute[R]
) -> list[R]:
    def one(start: int) -> R:
        items = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
        return compute(to_device(collate(items, base.tokenizer.pad_token_id), base))

    return in_order(range(0, len(dataset), size), one)


# ---- Shared prefixes


@dataclass(frozen=True)
class SharedPrompts:
    """A batch of prompts in two parts.

    Attributes:
        prefixes: what is read once for each group, left-padded: ``input_ids`` and ``attention_mask [G, P]`` int64, and
            ``pixel_values [I, 3, H, W]`` of the groups that have an image, in order.
        rests: what follows, left-padded: ``input_ids`` and ``attention_mask [B, S]`` int64; every row has a token.
        group: ``[B]`` int64, each row's prefix.
        first: ``[G]`` int64, the first row of each group.
    """

    prefixes: dict[str, Tensor]
    rests: dict[str, Tensor]
    group: Tensor
    first: Tensor

    @property
    def attention_mask(self) -> Tensor:
        """``[B, P + S]`` int64: a row has padding before its prefix and before its rest."""
        return torch.cat([self.prefixes["attention_mask"][self.group], self.rests["attention_mask"]], dim=1)


def image_order(images: Sequence[str | None], lengths: Sequence[int] | None = None) -> list[int]:
    """An order of rows in which those of one image are neighbours, a pure function of its arguments.

    If no image occurs twice, it is the order of length with rows without image last, or without ``lengths`` the given
    one.

    Args:
        images: each row's image, None for a row without one.
        lengths: images are ordered by their longest row, so that a batch holds rows of similar length.
    """
    rows: dict[Hashable, list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(row if image is None else image, []).append(row)
    if lengths is None:
        return [row for together in rows.values() for row in together]
    sorted_rows = [sorted(together, key=lambda row: (lengths[row], row)) for together in rows.values()]
    sorted_rows.sort(key=lambda together: (images[together[0]] is None, lengths[together[-1]], together[0]))
    return [row for together in sorted_rows for row in together]


def read_prompts(dataset: PromptDataset, rows: Sequence[int]) -> list[PromptItem]:
    """Prompts of ``rows``; those of one image, which is read once, hold the same tensor."""
    pixels: dict[str, Tensor | None] = {}
    items = []
    for row in rows:
        image = dataset.questions[row].image
        item = PromptItem(dataset.input_ids(row), pixels[image]) if image in pixels else dataset[row]
        if image is not None:
            pixels[image] = item.pixel_values
        items.append(item)
    return items


def prompt_inputs(
    base: LoadedBase, items: Sequence[PromptItem], routes: Sequence[Hashable]
) -> dict[str, Tensor] | SharedPrompts:
    """A batch on the base's device; prompts of one image and route share their prefix if that is worthwhile."""
    pad = base.tokenizer.pad_token_id
    shared = share_prefixes(items, routes, pad, base.tokenizer.image_token_id)
    if shared is None:
        return to_device(collate_prompts(items, pad), base)
    return SharedPrompts(
        to_device(shared.prefixes, base),
        to_device(shared.rests, base),
        shared.group.to(base.device),
        shared.first.to(base.device),
    )


def share_prefixes(
    items: Sequence[PromptItem], routes: Sequence[Hashable], pad_id: int, image_token: int
) -> SharedPrompts | None:
    """Split prompts into common prefixes and rests; None if that would save little.

    Rows share a prefix if they hold the same ``pixel_values`` tensor (or none) and have equal ``routes``: a router
    chosen for the whole sample changes the prefix's states. The prefix ends before the first token that differs
    between them; a row that is alone is cut after its image.
    """
    members: dict[Hashable, list[int]] = {}
    for row, (item, route) in enumerate(zip(items, routes, strict=True)):
        members.setdefault((None if item.pixel_values is None else id(item.pixel_values), route), []).append(row)
    if len(members) == len(items):
        return None
    prefixes, rests = [], [torch.empty(0, dtype=torch.int64)] * len(items)
    group = torch.zeros(len(items), dtype=torch.int64)
    for number, rows in enumerate(members.values()):
        ids = [items[row].input_ids for row in rows]
        # every row keeps at least one token to itself
        shared = min(common_prefix(ids), min(map(len, ids)) - 1)
        length = shared if len(rows) > 1 else _after_image(ids[0], image_token)
        prefixes.append(PromptItem(ids[0][:length], items[rows[0]].pixel_values))
        for row, whole in zip(rows, ids, strict=True):
            rests[row], group[row] = whole[length:], number
    read = len(prefixes) * max(len(p.input_ids) for p in prefixes) + len(items) * max(map(len, rests))
    if read > WORTHWHILE * len(items) * max(len(item.input_ids) for item in items):
        return None
    return SharedPrompts(
        collate_prompts(prefixes, pad_id),
        collate_prompts([PromptItem(rest, None) for rest in rests], pad_id),
        group,
        torch.tensor([rows[0] for rows in members.values()]),
    )


def _after_image(ids: Tensor, image_token: int) -> int:
    """Position after the last image token; half of a text without image, which only needs to be cut in two."""
    found = (ids == image_token).nonzero()
    return int(found[-1]) + 1 if len(found) else len(ids) // 2
