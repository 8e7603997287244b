"""The same mixture of experts, computed for the picked experts of each token only; for large banks on a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

# where measured (docs/performance.md): below any of these, gathering rows expert by expert costs more than it saves
LEAST_RANK, LEAST_RATIO, LEAST_WORK = 256, 4, 2_000_000


def sparse_pays(x: Tensor, A: Tensor, B: Tensor, experts: int, picked: int | None) -> bool:
    """Whether at most ``picked`` of the ``experts`` per token are few enough, and their products large enough.

    Of ``x [..., din]``, ``A [E*r, din]``, ``B [dout, E*r]`` only the shapes count: total rank, experts per picked one,
    and multiplications with one expert if all tokens picked it. Never on a GPU, where the groups' sizes would have to
    be waited for and nothing was measured, and never in a compiled graph, whose shapes cannot depend on the routing.
    """
    if picked is None or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    rank = A.shape[0]
    work = x.numel() // x.shape[-1] * rank // experts * (x.shape[-1] + B.shape[0])
    return rank >= LEAST_RANK and experts >= LEAST_RATIO * picked and work >= LEAST_WORK


def rows_of(x: Tensor) -> Tensor:
    """``[..., n] -> [N, n]``."""
    return x.reshape(-1, x.shape[-1])


class AddPicked(torch.autograd.Function):
    """Arguments and result of the packed form's function; experts of weight 0 get no gradient through the gate.

    A softmax over the picked experts passes none on to the others either (LLaVA-CMoE eq. 1), so that all gradients
    behind it are the packed form's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        A: Tensor,
        B: Tensor,
        out: Tensor,
        frozen: Tensor | None,
        frozen_rank: int,
        g: Tensor | None,
        u: Tensor | None,
    ) -> Tensor:
        x_rows, gate, out_rows = rows_of(x), rows_of(weights), rows_of(out)
        tokens, counts = _by_expert(gate)
        rank = A.shape[0] // gate.shape[1]
        S = x.new_empty(tokens.shape[0], rank)
        for expert, (rows, part) in enumerate(zip(tokens.split(counts), S.split(counts), strict=True)):
            if len(rows):
                ranks = slice(expert * rank, (expert + 1) * rank)
                torch.mm(x_rows[rows], A[ranks].t(), out=part)
                out_rows.index_add_(0, rows, (part * gate[rows, expert, None]) @ B[:, ranks].t())
        ctx.frozen_rank, ctx.counts = frozen_rank, counts
        ctx.save_for_backward(x if g is None else None, S, tokens, weights, A, B, frozen, g, u)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, S, tokens, weights, A, B, frozen, g, u = ctx.saved_tensors
        x_rows, gate, d_rows, rank = (
            rows_of(silu(g) * u if x is None else x),
            rows_of(weights),
            rows_of(d_out),
            S.shape[1],
        )
        d_x = torch.zeros_like(x_rows) if frozen is None else d_rows @ frozen
        d_gate, d_A, d_B = (torch.zeros_like(tensor) for tensor in (gate, A, B))
        new_A, new_B = ctx.needs_input_grad[2:4]
        for expert, (rows, part) in enumerate(zip(tokens.split(ctx.counts), S.split(ctx.counts), strict=True)):
            if not len(rows):
                continue
            ranks = slice(expert * rank, (expert + 1) * rank)
            weight, d_here = gate[rows, expert, None], d_rows[rows]
            d_gated = d_here @ B[:, ranks]
            d_S = d_gated * weight
            d_gate[rows, expert] = (d_gated * part).sum(-1)
            if ctx.needs_input_grad[0]:
                d_x.index_add_(0, rows, d_S @ A[ranks])
            if ranks.start >= ctx.frozen_rank:
                if new_A:
                    d_A[ranks] = d_S.t() @ x_rows[rows]
                if new_B:
                    d_B[:, ranks] = d_here.t() @ (part * weight)
        d_x = d_x.view(*d_out.shape[:-1], A.shape[1])
        return d_x, d_gate.view_as(weights), d_A, d_B, d_out, None, None, None, None


def _by_expert(gate: Tensor) -> tuple[Tensor, list[int]]:
    """The tokens of the first expert, of the second ...: one tensor, and how many are whose. ``gate [N, E]``."""
    experts, tokens = gate.t().nonzero(as_tuple=True)
    return tokens, experts.bincount(minlength=gate.shape[1]).tolist()
