"""Questions of one image side by side, and what their prompts have in common read once.

LLaVA's prompt puts system sentence and image first, so under causal attention the states of these tokens do not depend
on the question.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from clmoe.data.batches import to_device
from clmoe.data.collate import PromptDataset, PromptItem, collate_prompts
from clmoe.data.packing import common_prefix
from clmoe.model.llava import LoadedBase
from clmoe.model.prefill import SharedPrompts

# Two passes are worth it where they read at most this share of the tokens that one pass over whole prompts reads.
WORTHWHILE = 0.75


def image_order(images: Sequence[str | None], lengths: Sequence[int] | None = None) -> list[int]:
    """An order of rows in which those of one image are neighbours, a pure function of its arguments.

    Where no image comes twice it is the order of length, rows without image last, or without ``lengths`` the given one.

    Args:
        images: each row's image; None has none and is a neighbour of nobody.
        lengths: images are ordered by their longest row, so that a batch holds rows of like length.
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
    """Prompts of ``rows``; an image that several of them show is read once, and they hold the same tensor."""
    pixels: dict[str, Tensor | None] = {}
    items = []
    for row in rows:
        image = dataset.questions[row].image
        if image is None or image not in pixels:
            item = dataset[row]
        else:
            item = PromptItem(dataset.input_ids(row), pixels[image])
        if image is not None:
            pixels[image] = item.pixel_values
        items.append(item)
    return items


def prompt_inputs(
    base: LoadedBase, items: Sequence[PromptItem], routes: Sequence[Hashable]
) -> dict[str, Tensor] | SharedPrompts:
    """A batch on the model's device; prompts of one image and route share their prefix where that is worthwhile."""
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
    """Split prompts into what they share and the rest; None where that would save little.

    Rows share a prefix when they hold the same ``pixel_values`` tensor (or none) and have equal ``routes``: a router
    chosen for the whole sample changes the prefix's states. It ends before the first token that differs between them;
    a row that is alone shares nothing and is cut behind its image.
    """
    members: dict[Hashable, list[int]] = {}
    for row, (item, route) in enumerate(zip(items, routes, strict=True)):
        key = None if item.pixel_values is None else id(item.pixel_values)
        members.setdefault((key, route), []).append(row)
    if len(members) == len(items):
        return None
    prefixes, rests = [], [torch.empty(0, dtype=torch.int64)] * len(items)
    group = torch.zeros(len(items), dtype=torch.int64)
    for number, rows in enumerate(members.values()):
        ids = [items[row].input_ids for row in rows]
        # every row keeps at least one token to itself
        shared = min(common_prefix(ids), min(map(len, ids)) - 1)
        length = shared if len(rows) > 1 else _behind_image(ids[0], image_token)
        prefixes.append(PromptItem(ids[0][:length], items[rows[0]].pixel_values))
        for row, whole in zip(rows, ids, strict=True):
            rests[row] = whole[length:]
            group[row] = number
    read = len(prefixes) * max(len(p.input_ids) for p in prefixes) + len(items) * max(map(len, rests))
    if read > WORTHWHILE * len(items) * max(len(item.input_ids) for item in items):
        return None
    return SharedPrompts(
        collate_prompts(prefixes, pad_id),
        collate_prompts([PromptItem(rest, None) for rest in rests], pad_id),
        group,
        torch.tensor([rows[0] for rows in members.values()]),
    )


def _behind_image(ids: Tensor, image_token: int) -> int:
    """Position after the last image token, of a text half of it: it only serves to cut a lone row in two."""
    found = (ids == image_token).nonzero()
    return int(found[-1]) + 1 if len(found) else len(ids) // 2
