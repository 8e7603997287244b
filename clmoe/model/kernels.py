"""A mixture of LoRA experts on one frozen linear, computed packed; and the loop that defines it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, cat
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu

from clmoe.model.backend import uses_fused
from clmoe.model.sparse import AddPicked, rows_of, sparse_pays


def packed_experts(
    x: Tensor,
    gate: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    out: Tensor,
    frozen_rank: int = 0,
    product: tuple[Tensor, Tensor] | None = None,
    picked: int | None = None,
    frozen: Tensor | None = None,
) -> Tensor:
    """Add the gated sum of all experts to ``out``, in place, with two matrix products.

    ``out + scaling * sum_i gate_i * B_i A_i x`` (CL-MoE eq. 3, LLaVA-CMoE eq. 2). The gate scales the
    rank-sized product ``A x``, so no ``[..., dout]`` tensor per expert exists, and its gradient is an inner
    product of rank-sized tensors.

    Args:
        x: ``[..., din]``, the (dropped-out) input of the linear.
        gate: ``[..., E]`` gate weights, float32; cast to ``x``'s dtype here.
        A: ``[E*r, din]`` packed down-projections.
        B: ``[dout, E*r]`` packed up-projections.
        scaling: the factor ``s``.
        out: ``[..., dout]``, the frozen linear's output; it is used up.
        frozen_rank: of the ranks, the first so many belong to frozen experts, whose gradients are not computed.
        product: ``(g, u)`` with ``x = silu(g) * u``: the backward pass makes ``x`` again from what the product keeps
            anyway, instead of keeping it.
        picked: at most so many experts of a token have a weight, the others' being 0 and without a gradient of their
            own, as under top-k routing; where ``sparse_pays`` only these are computed. None promises nothing.
        frozen: ``W0 [dout, din]``, the weight that made ``out`` from this ``x`` outside autograd: the backward pass
            makes its part of ``x``'s gradient and adds the experts' to it. None where ``out`` has its own graph.

    Returns:
        ``out``, changed.
    """
    weights = (gate * scaling).to(x.dtype)
    A, B = A.to(x.dtype), B.to(x.dtype)
    form = AddPicked if sparse_pays(x, A, B, weights.shape[-1], picked) else _AddExperts
    return form.apply(x, weights, A, B, out.contiguous(), frozen, frozen_rank, *(product or (None, None)))


class _AddExperts(torch.autograd.Function):
    """Keeps ``x`` (or what it is made of), ``A x`` and the gate; torch's own graph would keep the gated ``A x`` too."""

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
        product = _passes(x, A, weights)[0]
        S, gated = product(rows_of(x), A, rows_of(weights))
        rows_of(out).addmm_(gated, B.t())
        ctx.frozen_rank = frozen_rank
        ctx.save_for_backward(x if g is None else None, S, weights, A, B, frozen, g, u)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, S, weights, A, B, frozen, g, u = ctx.saved_tensors
        d_rows, first = rows_of(d_out), ctx.frozen_rank
        gradients = _passes(d_out, A, weights)[1]
        d_S, gated, d_weights = gradients(d_rows, B, S, rows_of(weights))
        d_x = d_A = d_B = None
        if ctx.needs_input_grad[0]:
            d_x = d_S @ A if frozen is None else (d_rows @ frozen).addmm_(d_S, A)
            d_x = d_x.view(*d_out.shape[:-1], A.shape[1])
        if ctx.needs_input_grad[2]:
            d_new = d_S[:, first:].t() @ rows_of(silu(g) * u if x is None else x)
            d_A = cat([A.new_zeros(first, A.shape[1]), d_new]) if first else d_new
        if ctx.needs_input_grad[3]:
            d_new = d_rows.t() @ gated[:, first:]
            d_B = cat([B.new_zeros(B.shape[0], first), d_new], dim=1) if first else d_new
        return d_x, d_weights.view_as(weights), d_A, d_B, d_out, None, None, None, None


def gated_product(x: Tensor, A: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``S = x A^T`` and its gated form. ``x [N, din]``, ``A [E*r, din]``, ``weights [N, E]`` -> two ``[N, E*r]``."""
    S = x @ A.t()
    return S, _gated(S, weights)


def gated_gradients(d_out: Tensor, B: Tensor, S: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward pass needs of ``d_out [N, dout]``: the gradient of ``S``, ``S`` gated, the gate's gradient.

    ``B [dout, E*r]``, ``S [N, E*r]``, ``weights [N, E]`` -> ``d_S [N, E*r]``, ``[N, E*r]``, ``[N, E]``.
    """
    d_S, gated = d_out @ B, torch.empty_like(S)
    by_rank = [tensor.view(*weights.shape, -1) for tensor in (d_S, S, gated)]  # [N, E, r]
    d_weights = torch.mul(by_rank[0], by_rank[1], out=by_rank[2]).sum(-1)
    torch.mul(by_rank[1], weights.unsqueeze(-1), out=by_rank[2])  # in the same memory: making it costs as much
    by_rank[0].mul_(weights.unsqueeze(-1))
    return d_S, gated, d_weights


def _passes(x: Tensor, A: Tensor, weights: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``gated_product`` and ``gated_gradients`` for tensors like these: the fused ones or the plain ones."""
    if uses_fused(x.device.type, x.dtype, A.shape[0] // weights.shape[-1]):
        return torch.ops.clmoe.gated_product, torch.ops.clmoe.gated_gradients
    return gated_product, gated_gradients


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` in float32, also of a 16-bit ``x [..., din]``, of which no float32 copy is kept.

    ``weight [E, din]`` float32 -> ``[..., E]`` float32 (CL-MoE eq. 5).
    """
    return _RouterLogits.apply(x, weight)


class _RouterLogits(torch.autograd.Function):
    """Keeps ``x`` as it came, which the experts keep anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x.float(), weight.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = (d_logits @ weight.float()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = (rows_of(d_logits).t() @ rows_of(x).float()).to(weight.dtype)
        return d_x, d_weight


def _gated(S: Tensor, weights: Tensor) -> Tensor:
    """Each expert's ranks of ``S [N, E*r]`` times its weight ``[N, E]``."""
    return (S.view(*weights.shape, -1) * weights.unsqueeze(-1)).view_as(S)


def loop_experts(x: Tensor, gate: Tensor, A: Tensor, B: Tensor, scaling: float, out: Tensor) -> Tensor:
    """The same sum, one expert after the other: the definition that tests and benchmarks compare with."""
    E = gate.shape[-1]
    r = A.shape[0] // E
    for i in range(E):
        A_i, B_i = A[i * r : (i + 1) * r].to(x.dtype), B[:, i * r : (i + 1) * r].to(x.dtype)
        out = out + scaling * gate[..., i : i + 1].to(x.dtype) * (x @ A_i.t() @ B_i.t())
    return out
