"""ProgLoRA's attention over tasks (Findings of ACL 2025): how much each task's LoRA counts for a sample."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from clmoe.experts.routing import InstanceRouter, uniform


class Guide(nn.Module):
    """A key of ``size`` for each task, oldest first, and an MLP from embeddings of ``width`` to queries.

    ``widths`` is ``(width, size)``. ``key [n, size]`` trains, ``frozen_key`` is a buffer, or None if no key is frozen.
    """

    frozen_key: Tensor | None

    def __init__(self, widths: Sequence[int], frozen: int, count: int, generator: torch.Generator) -> None:
        super().__init__()
        width, size = widths
        rows = [InstanceRouter.fresh(din, size, generator) for din in (width, size)]
        self.mlp = nn.ModuleList(rows)
        keys = uniform(frozen + count, size, generator)
        self.register_buffer("frozen_key", keys[:frozen] if frozen else None)
        self.key = nn.Parameter(keys[frozen:])

    @property
    def keys(self) -> Tensor:
        """``[N, size]`` float32."""
        return self.key if self.frozen_key is None else torch.cat([self.frozen_key, self.key])

    def begin(self, generator: torch.Generator) -> None:
        """Freeze all keys, bit for bit, and add a fresh one for the next task."""
        self.frozen_key = self.keys.detach().clone()
        self.key = nn.Parameter(uniform(1, self.key.shape[1], generator).to(self.key))

    def forward(self, embeddings: Tensor, asked: Tensor) -> Tensor:
        """``softmax(k . MLP(max over tokens) / sqrt(size))``, ``[B, N]`` float32.

        ``embeddings [B, T, width]`` of any float dtype; ``asked [B, T]`` bool: the tokens that count, at least one.
        """
        largest = embeddings.float().masked_fill(~asked.unsqueeze(-1), -torch.inf).amax(1)
        first, second = cast(list[InstanceRouter], list(self.mlp))
        query = second(relu(first(largest)))
        return (query @ self.keys.t() / self.key.shape[1] ** 0.5).softmax(-1)
