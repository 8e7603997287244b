"""What a model says at the answers' tokens: the places where the cross-entropy and the methods' own losses look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from clmoe.data.prompts import IGNORE
from clmoe.model.packed import PackedRows

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from clmoe.model.routing import RouteTrace

CHUNK = 1024  # tokens of answers; their logits over LLaMA's 32,000 words take 131 MB
INPUTS = ("input_ids", "attention_mask", "pixel_values")


def answered(labels: Tensor) -> Tensor:
    """``labels [B, T]`` -> ``[B, T-1]`` bool: the positions that predict a token of an answer. N of them are true."""
    return labels[:, 1:] != IGNORE


def answer_tokens(labels: Tensor) -> Tensor:
    """The right tokens, ``[N]`` int64, row by row."""
    return labels[:, 1:][answered(labels)]


def answer_rows(labels: Tensor) -> Tensor:
    """``[N]`` int64: which row of the batch each of the answers' tokens belongs to."""
    return answered(labels).nonzero()[:, 0]


def answer_states(
    llava: LlavaForConditionalGeneration,
    batch: dict[str, Tensor],
    weights: dict[str, Tensor] | None = None,
    trace: RouteTrace | None = None,
) -> Tensor:
    """States ``[N, D]`` after the final norm that predict the answers' tokens of a right-padded batch of whole records.

    Args:
        batch: ``input_ids``, ``attention_mask``, ``labels`` (each ``[B, T]`` int64), maybe ``pixel_values``; where it
            holds the keys of ``collate_packed`` too, the packed rows are computed, and the states are the same.
        weights: take, in this pass alone, the place of the parameters of ``llava.model`` with these names.
        trace: of the routing in force; its ``outputs`` have the shape of the records, packed or not.
    """
    rows = PackedRows.of(batch)
    inputs: dict[str, Any] = {name: batch[name] for name in INPUTS if name in batch} | {"use_cache": False}
    if rows is not None:
        inputs |= rows.inputs(llava.dtype)
    output = llava.model(**inputs) if weights is None else functional_call(llava.model, weights, kwargs=inputs)
    wanted = answered(batch["labels"])
    if rows is None:
        return output.last_hidden_state[:, :-1][wanted]
    if trace is not None:
        trace.layout = rows.unpacked
    return output.last_hidden_state.flatten(0, 1)[rows.places[:, :-1][wanted]]


def answer_logits(
    llava: LlavaForConditionalGeneration, batch: dict[str, Tensor], weights: dict[str, Tensor] | None = None
) -> Tensor:
    """Logits ``[N, V]`` float32 for the answers' tokens; arguments as for ``answer_states``."""
    return llava.lm_head(answer_states(llava, batch, weights)).float()


def answer_loss(head: nn.Module, states: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the cross-entropies of ``tokens [N]`` under the head's logits of ``states [N, D]``, in float32.

    More than ``CHUNK`` tokens are taken in pieces whose logits are made again in the backward pass, so that no more
    than ``[CHUNK, V]`` of them exist at a time.
    """

    def piece(states: Tensor, tokens: Tensor) -> Tensor:
        return cross_entropy(head(states).float(), tokens, reduction="sum")

    if len(states) <= CHUNK:
        return piece(states, tokens)
    pieces = zip(states.split(CHUNK), tokens.split(CHUNK), strict=True)
    return torch.stack([checkpoint(piece, *pair, use_reentrant=False) for pair in pieces]).sum()


def mean_over_samples(values: Tensor, labels: Tensor) -> Tensor:
    """``values [N]``, one for each token of the answers: averaged over every sample's tokens, then over the samples.

    A batch that is cut in parts gives the same, as long as the parts are weighted by their numbers of samples.
    """
    rows, samples = answer_rows(labels), len(labels)
    tokens = torch.bincount(rows, minlength=samples)
    return (values / tokens[rows]).sum() / samples
