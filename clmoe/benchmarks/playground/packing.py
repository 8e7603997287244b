"""Several independent questions about one image in one sequence.

The system sentence and the image are computed once; each turn sees them and itself, at the positions it would
have as the only turn. So every answer has to come from the image, at a fraction of the cost of one row each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from clmoe.data.prompts import Encoded, encode_training
from clmoe.data.records import TrainRecord, Turn

MAX_LENGTH = 1024


@dataclass(frozen=True)
class PackedBatch:
    """B rows of T tokens.

    input_ids, positions, targets, turn_of: [B, T] int64. `targets` holds the *next* token where an answer is
    to be predicted, else -100. `turn_of` is 0 in the shared beginning and in padding, 1.. in the turns.
    is_image: [B, T] bool. mask: [B, 1, T, T] bool, true where a token may be seen.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    turn_of: Tensor
    is_image: Tensor
    mask: Tensor


class TurnPacker:
    """Packs rows of (question, answer) pairs; encodes through the library's own conversation template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.image_tokens = image_tokens
        self._cache: dict[tuple[str, str], Encoded] = {}
        self._start = self._start_length()

    def _encode(self, question: str, answer: str) -> Encoded:
        pair = (question, answer)
        if pair not in self._cache:
            record = TrainRecord("mixture", "in memory", (Turn(question, answer),))
            self._cache[pair] = encode_training(record, self.tokenizer, self.image_tokens, MAX_LENGTH)
        return self._cache[pair]

    def _start_length(self) -> int:
        """Number of tokens up to and including the image: the same for every turn."""
        ids, _ = self._encode("?", "-")
        return len(ids) - ids[::-1].index(self.tokenizer.image_token_id)

    def pack(self, rows: Sequence[Sequence[tuple[str, str]]], budget: int) -> PackedBatch:
        """One row per image: its turns in order, as many (one at least) as `budget` tokens hold."""
        packed = [self._pack_row(turns, budget) for turns in rows]
        longest = max(len(ids) for ids, *_ in packed)
        pads = (self.tokenizer.pad_token_id, 0, -100, -1)
        input_ids, positions, targets, turn_of = (
            torch.tensor([row[part] + [pads[part]] * (longest - len(row[part])) for row in packed]) for part in range(4)
        )
        order = torch.arange(longest)
        causal = order[:, None] >= order[None, :]
        seen = (turn_of[:, None, :] == 0) | (turn_of[:, None, :] == turn_of[:, :, None])
        return PackedBatch(
            input_ids=input_ids,
            positions=positions,
            targets=targets,
            turn_of=turn_of.clamp(min=0),
            is_image=input_ids == self.tokenizer.image_token_id,
            mask=(seen & causal)[:, None],
        )

    def _pack_row(
        self, turns: Sequence[tuple[str, str]], budget: int
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        start = self._start
        ids = list(self._encode(*turns[0])[0][:start])
        positions, targets, turn_of = list(range(start)), [-100] * start, [0] * start
        for number, turn in enumerate(turns, 1):
            turn_ids, labels = self._encode(*turn)
            length = len(turn_ids) - start
            if number > 1 and len(ids) + length > budget:
                break
            ids += turn_ids[start:]
            positions += range(start, start + length)
            targets += [*labels[start + 1 :], -100]
            turn_of += [number] * length
        return ids, positions, targets, turn_of
