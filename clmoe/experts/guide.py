"""ProgLoRA's attention over tasks (Findings of ACL 2025): how much each task's LoRA counts for a sample."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from clmoe.experts.routing import InstanceRouter, router_logits, uniform


class Guide(nn.Module):
    """A key for each task, oldest first, and an MLP from embeddings to queries, all of one ``width``.

    ``widths`` is ``(width, hidden)``; the MLP narrows to ``hidden`` and ends with a layer norm. ``key [n, width]``
    trains, ``frozen_key`` is a buffer, or None if no key is frozen.
    """

    frozen_key: Tensor | None

    def __init__(self, widths: Sequence[int], frozen: int, count: int, generator: torch.Generator) -> None:
        super().__init__()
        width, hidden = widths
        sizes = (width, hidden), (hidden, width)
        self.mlp = nn.ModuleList(InstanceRouter.fresh(din, dout, generator) for din, dout in sizes)
        self.norm = nn.LayerNorm(width)
        keys = uniform(frozen + count, width, generator)
        self.register_buffer("frozen_key", keys[:frozen] if frozen else None)
        self.key = nn.Parameter(keys[frozen:])

    @property
    def keys(self) -> Tensor:
        """``[N, width]`` float32."""
        return self.key if self.frozen_key is None else torch.cat([self.frozen_key, self.key])

    def begin(self, generator: torch.Generator) -> None:
        """Freeze all keys, bit for bit, and add a fresh one for the next task."""
        self.frozen_key = self.keys.detach().clone()
        self.key = nn.Parameter(uniform(1, self.key.shape[1], generator).to(self.key))

    def forward(self, embeddings: Tensor, asked: Tensor) -> Tensor:
        """``softmax(k . MLP(max over tokens) / sqrt(width))``, ``[B, N]`` float32.

        ``embeddings [B, T, width]`` of any float dtype; ``asked [B, T]`` bool: the tokens that count, at least one.
        """
        largest = embeddings.float().masked_fill(~asked.unsqueeze(-1), -torch.inf).amax(1)
        narrow, wide = cast(list[InstanceRouter], list(self.mlp))
        norm = self.norm.weight.float(), self.norm.bias.float()
        query = layer_norm(silu(wide(narrow(largest))), self.norm.normalized_shape, *norm, self.norm.eps)
        return (router_logits(query, self.keys) / query.shape[1] ** 0.5).softmax(-1)
