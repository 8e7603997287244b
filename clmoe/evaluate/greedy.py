"""Greedy generation of a batch, with the margin by which each row's tokens won."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from clmoe.model.prefill import SharedPrompts, prefill
from clmoe.model.routing import RouteSelection, routing


@torch.no_grad()
def greedy(
    llava: LlavaForConditionalGeneration,
    prompts: dict[str, Tensor] | SharedPrompts,
    selection: RouteSelection,
    max_new_tokens: int,
    end: int,
    pad: int,
    watch: Callable[[Tensor], None] = lambda tokens: None,
) -> tuple[Tensor, Tensor]:
    """The likeliest token again and again, until every row has said ``end`` or ``max_new_tokens`` are said.

    Args:
        prompts: left-padded.
        watch: called with the tokens so far ``[B, t]`` before every further one.

    Returns:
        tokens ``[B, t]`` int64, ``pad`` behind a row's ``end``; and for each row ``[B]`` float32 on the CPU the
        smallest gap between the two best logits before its ``end``.
    """
    read = prefill(llava, prompts, selection, max_new_tokens)
    hidden, cache, mask, position = read.hidden, read.cache, read.attention_mask, read.next_position
    rows = len(hidden)
    tokens = mask.new_empty(rows, 0)
    finished = torch.zeros(rows, dtype=torch.bool, device=mask.device)
    margins = torch.full((rows,), float("inf"), device=mask.device)
    while True:
        logits = llava.lm_head(hidden.unsqueeze(1))[:, -1].float()
        best = logits.topk(2, dim=-1).values
        margins = torch.where(finished, margins, torch.minimum(margins, best[:, 0] - best[:, 1]))
        said = torch.where(finished, pad, logits.argmax(-1)).unsqueeze(1)
        tokens = torch.cat([tokens, said], dim=1)
        finished = finished | (said[:, 0] == end)
        if tokens.shape[1] == max_new_tokens or bool(finished.all()):
            return tokens, margins.cpu()
        watch(tokens)
        mask = torch.cat([mask, torch.ones_like(said)], dim=1)
        with routing(selection):
            output = llava.model(
                input_ids=said,
                attention_mask=mask,
                position_ids=position.unsqueeze(1),
                past_key_values=cache,
                use_cache=True,
            )
        hidden, position = output.last_hidden_state[:, -1], position + 1
