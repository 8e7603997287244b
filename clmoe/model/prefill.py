"""Read prompts into a cache, the prefix that several of them share once.

Letters: B rows, G groups of rows that share a prefix, P and S tokens of the longest prefix and of the longest rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LlavaForConditionalGeneration

from clmoe.model.cache import empty_cache, with_room
from clmoe.model.llava import FeatureKind, position_ids, prompt_feature
from clmoe.model.routing import NEWEST_ROUTER, RouteSelection, routing


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
        """``[B, P + S]`` int64: a row's padding lies before its prefix and before its rest."""
        return torch.cat([self.prefixes["attention_mask"][self.group], self.rests["attention_mask"]], dim=1)


@dataclass(frozen=True)
class Prefill:
    """Prompts that have been read.

    Attributes:
        hidden: ``[B, D]``, the last token's state after the final norm.
        cache: keys and values of all rows.
        attention_mask: ``[B, T]`` int64, which of the cache's positions are tokens.
        next_position: ``[B]`` int64 of each row's next token.
    """

    hidden: Tensor
    cache: Cache
    attention_mask: Tensor
    next_position: Tensor


@torch.no_grad()
def prefill(
    llava: LlavaForConditionalGeneration,
    prompts: dict[str, Tensor] | SharedPrompts,
    selection: RouteSelection,
    room: int,
) -> Prefill:
    """Read a left-padded batch of prompts; ``selection`` has a row for each of them, ``room`` is for tokens to come."""
    if isinstance(prompts, SharedPrompts):
        output, mask = _read_shared(llava, prompts, selection, room), prompts.attention_mask
    else:
        mask = prompts["attention_mask"]
        with routing(selection):
            cache = empty_cache(len(llava.model.language_model.layers), room)
            output = llava.model(**prompts, position_ids=position_ids(mask), past_key_values=cache, use_cache=True)
    return Prefill(output.last_hidden_state[:, -1], output.past_key_values, mask, mask.sum(1))


@torch.no_grad()
def shared_prompt_features(
    llava: LlavaForConditionalGeneration, prompts: SharedPrompts, kind: FeatureKind = "last"
) -> Tensor:
    """As ``last_prompt_features``, ``[B, D]`` float32, of prompts that share prefixes."""
    return prompt_feature(_read_shared(llava, prompts, NEWEST_ROUTER, 0, output_hidden_states=kind == "pooled"), kind)


def _read_shared(
    llava: LlavaForConditionalGeneration, prompts: SharedPrompts, selection: RouteSelection, room: int, **wanted: Any
) -> Any:
    """The model's output for the rests, each behind a copy of its prefix's keys and values."""
    prefixes, rests, mask = prompts.prefixes, prompts.rests, prompts.attention_mask
    with routing(selection.rows(prompts.first)):
        read = llava.model(**prefixes, position_ids=position_ids(prefixes["attention_mask"]), use_cache=True)
    cache = with_room(read.past_key_values, rests["input_ids"].shape[1] + room, prompts.group)
    positions = position_ids(mask)[:, prefixes["input_ids"].shape[1] :]
    with routing(selection):
        return llava.model(
            input_ids=rests["input_ids"],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **wanted,
        )
