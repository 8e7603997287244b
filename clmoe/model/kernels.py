"""A mixture of LoRA experts on one frozen linear, computed packed; and the loop that defines it."""

import torch
from torch import Tensor


def packed_experts(x: Tensor, gate: Tensor, A: Tensor, B: Tensor, scaling: float, out: Tensor) -> Tensor:
    """Add the gated sum of all experts to ``out`` with two matrix products.

    ``out + scaling * sum_i gate_i * B_i A_i x`` (CL-MoE eq. 3, LLaVA-CMoE eq. 2). The gate scales the
    rank-sized product ``A x``, so no ``[..., dout]`` tensor per expert exists, and its gradient is an inner
    product of rank-sized tensors.

    Args:
        x: ``[..., din]``, the (dropped-out) input of the linear.
        gate: ``[..., E]`` gate weights, float32; cast to ``x``'s dtype here.
        A: ``[E*r, din]`` packed down-projections.
        B: ``[dout, E*r]`` packed up-projections.
        scaling: the factor ``s``.
        out: ``[..., dout]``, the frozen linear's output.

    Returns:
        ``[..., dout]`` in ``out``'s dtype.
    """
    din, E = x.shape[-1], gate.shape[-1]
    S = torch.mm(x.reshape(-1, din), A.to(x.dtype).t())
    weights = (gate * scaling).to(x.dtype).reshape(-1, E, 1)
    S = (S.view(-1, E, A.shape[0] // E) * weights).view_as(S)
    return torch.addmm(out.reshape(-1, out.shape[-1]), S, B.to(x.dtype).t()).view_as(out)


def loop_experts(x: Tensor, gate: Tensor, A: Tensor, B: Tensor, scaling: float, out: Tensor) -> Tensor:
    """The same sum, one expert after the other: the definition that tests and benchmarks compare with."""
    E = gate.shape[-1]
    r = A.shape[0] // E
    for i in range(E):
        A_i, B_i = A[i * r : (i + 1) * r].to(x.dtype), B[:, i * r : (i + 1) * r].to(x.dtype)
        out = out + scaling * gate[..., i : i + 1].to(x.dtype) * (x @ A_i.t() @ B_i.t())
    return out
