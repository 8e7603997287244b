"""The language model on packed rows: records of one image share its tokens, and see nothing of one another.

Letters as in ``clmoe.data.packing``: B records of T tokens, G rows of L.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedRows:
    """The keys that ``collate_packed`` adds to a batch, see there."""

    packed_ids: Tensor
    packed_positions: Tensor
    packed_segments: Tensor
    places: Tensor

    @classmethod
    def of(cls, batch: dict[str, Tensor]) -> PackedRows | None:
        """Those of a batch; None where its records are not packed."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: batch[name] for name in names}) if "places" in batch else None

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What LLaVA's ``model`` takes instead of the records; ``dtype`` is the model's.

        Not for flash attention, which takes no such mask.
        """
        seen = block_mask(self.packed_segments)
        # additive, which both sdpa and eager attention take
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        return {"input_ids": self.packed_ids, "attention_mask": mask, "position_ids": self.packed_positions}

    def unpacked(self, values: Tensor) -> Tensor:
        """``[G, L, ...]`` -> ``[B, T, ...]``: a shared token's value for each of its records."""
        return values.flatten(0, 1)[self.places]


def block_mask(segments: Tensor) -> Tensor:
    """Which token sees which, ``[G, L]`` segments -> ``[G, 1, L, L]`` bool (query, key).

    A token sees the prefix and its own rest, up to itself; padding sees itself, so that its softmax exists.
    """
    length = segments.shape[1]
    query, key = segments.unsqueeze(2), segments.unsqueeze(1)
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=segments.device)
    return (causal & ((key == 0) | (key == query)) & (key >= 0) | itself).unsqueeze(1)
