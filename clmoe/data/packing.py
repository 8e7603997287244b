"""Training records of one image as one row: what they share once, then each record's own rest.

LLaVA's prompt puts system sentence and image first, so under causal attention the states of these tokens are the same
in all records of an image (Prefix Grouper, arXiv 2506.05433). Letters: B records, T tokens of the longest one, G rows,
L tokens of the longest row.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from clmoe.data.collate import TrainItem, collate_train
from clmoe.data.records import TrainRecord

PREFIX, PADDING = 0, -1


def image_groups(records: Sequence[TrainRecord]) -> tuple[tuple[int, ...], ...]:
    """Rows of equal image together, in order of first appearance; a row without image is alone.

    Where a record occurs several times (a replayed memory, a union's passes), its n-th occurrence is in its image's
    n-th group: otherwise whole batches would repeat one record.
    """
    groups: dict[Hashable, list[int]] = {}
    seen: Counter[bytes] = Counter()
    for row, record in enumerate(records):
        if record.image is None:
            groups[row] = [row]
            continue
        content = hashlib.blake2b(repr(record).encode(), digest_size=16).digest()
        groups.setdefault((record.image, seen[content]), []).append(row)
        seen[content] += 1
    return tuple(map(tuple, groups.values()))


def collate_packed(items: Sequence[TrainItem], pad_id: int) -> dict[str, Tensor]:
    """A training batch as of ``collate_train``, and the packed rows that it is computed from.

    Items that hold the same ``pixel_values`` tensor share a row. Besides ``input_ids``, ``attention_mask`` and ``labels
    [B, T]`` it holds, all int64,

    - ``packed_ids [G, L]``: a prefix and the rests of a row's records, one after the other, padded at the right;
    - ``packed_positions [G, L]``: each token's position in its own record;
    - ``packed_segments [G, L]``: 0 in the prefix, n in the n-th rest, -1 in the padding;
    - ``places [B, T]``: where each record's token lies, ``row * L + column``; 0 for padding;

    and ``pixel_values [I, 3, H, W]`` once for each row that has an image.
    """
    members: dict[Hashable, list[int]] = {}
    for number, item in enumerate(items):
        members.setdefault(number if item.pixel_values is None else ("image", id(item.pixel_values)), []).append(number)
    rows = [_row([items[n].input_ids for n in numbers]) for numbers in members.values()]
    length = max(len(ids) for ids, _, _, _ in rows)
    batch = collate_train([TrainItem(item.input_ids, item.labels, None) for item in items], pad_id)
    places = torch.zeros_like(batch["input_ids"])
    for row, (numbers, (_, _, _, columns)) in enumerate(zip(members.values(), rows, strict=True)):
        for number, column in zip(numbers, columns, strict=True):
            places[number, : len(column)] = row * length + column
    pixels = [items[numbers[0]].pixel_values for numbers in members.values()]
    present = [value for value in pixels if value is not None]
    return (
        batch
        | {
            "packed_ids": _pad([ids for ids, _, _, _ in rows], length, pad_id),
            "packed_positions": _pad([positions for _, positions, _, _ in rows], length, 0),
            "packed_segments": _pad([segments for _, _, segments, _ in rows], length, PADDING),
            "places": places,
        }
        | ({"pixel_values": torch.stack(present)} if present else {})
    )


def _row(ids: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Ids, positions and segments ``[l]`` of one row, and for each record the columns of its tokens."""
    prefix = common_prefix(ids)
    shared = torch.arange(prefix)
    tokens, positions = [ids[0][:prefix]], [shared]
    segments, columns = [torch.full((prefix,), PREFIX)], []
    start = prefix
    for number, whole in enumerate(ids, 1):
        rest = len(whole) - prefix
        tokens.append(whole[prefix:])
        positions.append(torch.arange(prefix, len(whole)))
        segments.append(torch.full((rest,), number))
        columns.append(torch.cat([shared, torch.arange(start, start + rest)]))
        start += rest
    return torch.cat(tokens), torch.cat(positions), torch.cat(segments), columns


def common_prefix(ids: list[Tensor]) -> int:
    """How many tokens come before the first that differs between rows ``[T]`` int64; all of a row that is alone."""
    shortest = min(map(len, ids))
    same = torch.stack([row[:shortest] == ids[0][:shortest] for row in ids]).all(0)
    return int(same.cumprod(0).sum())


def _pad(rows: list[Tensor], length: int, value: int) -> Tensor:
    return torch.stack([torch.cat([row, row.new_full((length - len(row),), value)]) for row in rows])
