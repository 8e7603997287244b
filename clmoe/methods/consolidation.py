"""CL-MoE's MMoE: which experts a task consolidates, how strongly, and how old and new weights are mixed (eq. 9-11)."""

import torch
from torch import Tensor


def salient_experts(score: Tensor, top_k: int) -> set[int]:
    """The ``top_k`` experts with the largest score ``[E]``; ties go to the lower index."""
    return set(score.argsort(descending=True, stable=True)[:top_k].tolist())


def keep_weights(now: set[int], before: set[int], experts: int, gamma: float) -> Tensor:
    """The share each expert keeps, ``[E]`` float64 (CL-MoE eq. 10-11): ``1 - gamma`` if salient now but not before."""
    return torch.tensor([1 - gamma if i in now - before else gamma for i in range(experts)], dtype=torch.float64)


def mix(old: Tensor, new: Tensor, keep: Tensor) -> Tensor:
    """``keep * old + (1 - keep) * new`` in float64, rounded once; 0 and 1 copy the bits of one side."""
    mixed = (keep * old.double() + (1 - keep) * new.double()).to(old.dtype)
    keep = keep.expand_as(mixed)
    return torch.where(keep == 1, old, torch.where(keep == 0, new, mixed))


def consolidate_factors(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], keep: Tensor) -> tuple[Tensor, Tensor]:
    """Mix ``A [E*r, din]`` and ``B [dout, E*r]`` separately, as in the paper; ``keep [E]`` float64."""
    per_rank = keep.repeat_interleave(len(old[0]) // len(keep))
    return mix(old[0], new[0], per_rank.unsqueeze(1)), mix(old[1], new[1], per_rank.unsqueeze(0))


def factorise(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-``rank`` factors of ``left [dout, k] @ right [k, din]``, float64, without forming the product.

    ``A [rank, din] = sqrt(S) V^T``, ``B [dout, rank] = U sqrt(S)``; the largest entry of each column of U is positive.
    """
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right.t())
    U, S, Vh = torch.linalg.svd(R_left @ R_right.t())
    U, Vh = Q_left @ U[:, :rank], Vh[:rank] @ Q_right.t()
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(U)
    root = S[:rank].sqrt()
    return (root * sign.squeeze(0)).unsqueeze(1) * Vh, U * sign * root


def consolidate_delta(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], keep: Tensor) -> tuple[Tensor, Tensor]:
    """Mix each expert's product BA and reduce it to rank r by SVD in float64. Arguments: ``consolidate_factors``."""
    r = len(old[0]) // len(keep)
    A, B = old[0].clone(), old[1].clone()
    for i, weight in enumerate(keep.tolist()):
        rows = slice(i * r, (i + 1) * r)
        if weight == 1:
            continue
        if weight == 0:
            A[rows], B[:, rows] = new[0][rows], new[1][:, rows]
            continue
        left = torch.cat([weight * old[1][:, rows].double(), (1 - weight) * new[1][:, rows].double()], dim=1)
        A_i, B_i = factorise(left, torch.cat([old[0][rows], new[0][rows]]).double(), r)
        A[rows], B[:, rows] = A_i.to(A), B_i.to(B)
    return A, B
