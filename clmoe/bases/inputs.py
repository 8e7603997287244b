"""Batches on a base's device, and what the prompts of one image share, which is read once.

LLaVA's prompt puts the system sentence and image first, so under causal attention their states do not depend on the
question. Notation: B rows, G groups of rows with a common prefix, P and S tokens of the longest prefix and rest.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clmoe.bases.llava import UNCUT, LoadedBase, vision_tower_of
from clmoe.data.batches import PromptDataset, PromptItem, TrainDataset, collate_prompts, collate_train
from clmoe.data.prompts import IGNORE
from clmoe.data.records import Question, TrainRecord, Turn
from clmoe.errors import ClmoeError
from clmoe.utils.files import json_sha256
from clmoe.utils.processes import in_order

R = TypeVar("R")
Compute = Callable[[dict[str, Tensor]], R]

WORTHWHILE = 0.75
"""Prefixes are shared if that reads at most this share of the tokens of whole prompts."""


def train_dataset(
    base: LoadedBase,
    records: Sequence[TrainRecord],
    image_root: Path,
    max_length: int,
    rows: Iterable[int] | None = None,
) -> TrainDataset:
    """Records as training items for this base; all processes must call it. Only ``rows`` (default all) will be read."""
    read = records if rows is None else (records[row] for row in rows)
    _fill_cache(base, (record.image for record in read), image_root)
    return TrainDataset(records, image_root, base.encoder, max_length)


def prompt_dataset(base: LoadedBase, questions: Sequence[Question], image_root: Path) -> PromptDataset:
    """Questions as prompts for this base; all processes must call it."""
    _fill_cache(base, (question.image for question in questions), image_root)
    return PromptDataset(questions, image_root, base.encoder)


@dataclass(frozen=True)
class AnswersFit:
    """How many of a record's answer tokens ``max_length`` tokens hold; see ``clmoe.data.records.Fits``."""

    encoder: LoadedBase
    max_length: int

    @cached_property
    def key(self) -> str:
        if self.encoder.chat is not None:
            return json_sha256([self.encoder.made_by, self.max_length])
        vocabulary = self.encoder.tokenizer.backend_tokenizer.to_str()
        return json_sha256([vocabulary, self.encoder.image_token_count, self.max_length])

    def __call__(self, record: TrainRecord, image_root: Path) -> tuple[int, int]:
        return self.encoder.answer_tokens(record, image_root, self.max_length)


def answer_letters(base: LoadedBase, count: int) -> dict[str, int]:
    """The first ``count`` letters, then digits, that are a single token as an answer of this base, with that token.

    Raises ClmoeError if there are fewer.
    """
    found: dict[str, int] = {}
    for letter in (*ascii_uppercase, *ascii_lowercase, *digits):
        labels = base.train_item(TrainRecord("", None, (Turn("", letter),)), None, UNCUT).labels
        tokens = labels[labels != IGNORE].tolist()
        if len(tokens) == 2 and len(found) < count:  # the other one ends the answer
            found[letter] = tokens[0]
    if len(found) < count:
        raise ClmoeError(f"tokenizer: {count} tasks need as many single-token letters, but it has {len(found)}")
    return found


def _fill_cache(base: LoadedBase, images: Iterable[str | None], image_root: Path) -> None:
    if base.vision is not None:
        paths = (image_root / image for image in images if image is not None)
        base.vision.fill(vision_tower_of(base.model), paths, base.read_pixels)


def to_device(batch: dict[str, Tensor], base: LoadedBase) -> dict[str, Tensor]:
    """Move a batch to the base's device; pixels take the base's dtype."""
    return {k: v.to(base.device, base.dtype if v.is_floating_point() else v.dtype) for k, v in batch.items()}


def positions(model: PreTrainedModel, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
    """Positions of left-padded prompts that skip padding, so that a padded row is computed like a lone one.

    ``[B, T]`` int64 for a ``mask [B, T]``; ``[3, B, T]`` if the family has its own for the tokens of an image
    (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    if "image_grid_thw" not in inputs:
        return (mask.cumsum(-1) - 1).clamp(min=0)
    names = [name for name in ("input_ids", "image_grid_thw", "mm_token_type_ids") if name in inputs]
    body: Any = model.base_model
    found, _ = body.get_rope_index(**{name: inputs[name] for name in names}, attention_mask=mask)
    return cast(Tensor, found)


def over_train_batches(base: LoadedBase, dataset: TrainDataset, size: int, compute: Compute[R]) -> list[R]:
    """Apply ``compute`` to right-padded batches of whole records, in order; the processes share the work."""

    def one(start: int) -> R:
        items = dataset.__getitems__(range(start, min(start + size, len(dataset))))
        return compute(to_device(collate_train(items, base.tokenizer.pad_token_id), base))

    return in_order(range(0, len(dataset), size), one)


# ---- Shared prefixes


@dataclass(frozen=True)
class SharedPrompts:
    """A batch of prompts in two parts, each with ``input_ids`` and ``attention_mask``, left-padded int64.

    Attributes:
        prefixes: ``[G, P]``, with ``pixel_values [I, 3, H, W]`` of the groups that have an image, in order.
        rests: ``[B, S]``; every row has a token.
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
    """An order of rows that puts those of one image side by side.

    Images come by first appearance or, with ``lengths``, all by length (an image by its longest row), None last.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, image in enumerate(images):
        groups.setdefault(row if image is None else image, []).append(row)
    ordered = list(groups.values())
    if lengths is not None:
        ordered = [sorted(rows, key=lambda row: (lengths[row], row)) for rows in ordered]
        ordered.sort(key=lambda rows: (images[rows[0]] is None, lengths[rows[-1]], rows[0]))
    return [row for rows in ordered for row in rows]


def prompt_inputs(
    base: LoadedBase, items: Sequence[PromptItem], routes: Sequence[Hashable]
) -> dict[str, Tensor] | SharedPrompts:
    """A batch on the base's device; LLaVA-1.5's is split into common prefixes and rests unless that would save little.

    Rows share a prefix if they hold the same ``pixel_values`` tensor (or none) and have equal ``routes``: another
    route changes its states. It ends before the first token that differs; a lone row is cut after its image.
    """
    pad = base.tokenizer.pad_token_id
    if not base.family.vicuna:
        return to_device(collate_prompts(items, pad), base)
    image_token = base.tokenizer.image_token_id
    members: dict[Hashable, list[int]] = {}
    for row, (item, route) in enumerate(zip(items, routes, strict=True)):
        members.setdefault((None if item.pixel_values is None else id(item.pixel_values), route), []).append(row)
    prefixes, rests = [], list(items)
    group = torch.zeros(len(items), dtype=torch.int64)
    for number, rows in enumerate(members.values()):
        ids = [items[row].input_ids for row in rows]
        most = min(map(len, ids)) - 1  # every row keeps at least one token to itself
        same = torch.stack([whole[:most] == ids[0][:most] for whole in ids]).all(0)
        length = int(same.cumprod(0).sum())
        if len(rows) == 1:  # a text without an image is cut anywhere
            image_at = (ids[0] == image_token).nonzero()
            length = int(image_at[-1]) + 1 if len(image_at) else len(ids[0]) // 2
        prefixes.append(PromptItem(ids[0][:length], items[rows[0]].pixel_values))
        for row, whole in zip(rows, ids, strict=True):
            rests[row], group[row] = PromptItem(whole[length:], None), number
    taken = [len(parts) * max(len(part.input_ids) for part in parts) for parts in (prefixes, rests, items)]
    if len(members) == len(items) or taken[0] + taken[1] > WORTHWHILE * taken[2]:
        return to_device(collate_prompts(items, pad), base)
    return SharedPrompts(
        to_device(collate_prompts(prefixes, pad), base),
        to_device(collate_prompts(rests, pad), base),
        group.to(base.device),
        torch.tensor([rows[0] for rows in members.values()], device=base.device),
    )
