"""Triton kernels of the expert layer: its two rank-sized passes, each with the gate applied where the product is made.

``gated_product`` and ``gated_gradients`` have the arguments and results of the plain ones in ``kernels.py``. The
first reads the layer's input and the second the gradient of its output, the two large tensors, once for every
``LARGEST_TILE`` ranks; everything else that they touch has the size of the ranks. The remaining products (onto the
output, of the input's and the experts' gradients) have no epilogue to gain from and stay with torch.

Columns of a tile are experts, each padded to a power of two, so that an expert's ranks lie in one tile and the gate's
gradient is summed there in float32, in a fixed order.

This module needs triton; ``backend.py`` decides when it is imported.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clmoe.errors import ClmoeError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_RANK = 512  # of one expert, which must fit into a tile
LARGEST_TILE = 128  # ranks of several experts in one tile
LEAST_TILE = 16  # tl.dot takes no smaller side
ACCUMULATORS, WARPS = 8192, 8  # float32 numbers of a program, 32 per thread: with 4 warps registers spill


def fits(dtype: torch.dtype, rank: int) -> bool:
    """Whether the kernels serve this input type and rank of one expert."""
    return dtype in DTYPES and rank <= LARGEST_RANK


@triton.jit
def _positions(tokens, experts, rank, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's first row, and of its rows, experts and packed ranks which they are and whether they exist."""
    tiles = tl.cdiv(experts, EXPERTS)  # the tiles of the same rows are neighbours: the large input is then in cache
    first = (tl.program_id(0) % tiles) * EXPERTS
    start = (tl.program_id(0) // tiles).to(tl.int64) * TOKENS
    rows = tl.arange(0, TOKENS)  # from the first one: only that needs 64 bits, and registers are few
    column = tl.arange(0, EXPERTS * PADDED)
    expert, within = first + column // PADDED, column % PADDED
    there = (expert < experts) & (within < rank)
    return start, rows, start + rows < tokens, first + tl.arange(0, EXPERTS), expert * rank + within, there


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    left, right, rows, is_row, ranks, is_rank, width, row_stride, width_stride, rank_stride,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``left [T, width] right [width, R]`` of this program's rows and ranks, in float32."""
    total = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        at = start + tl.arange(0, WIDTH)
        here = at < width
        a = tl.load(left + rows[:, None] * row_stride + at[None, :], mask=is_row[:, None] & here[None, :], other=0.0)
        right_at = at[:, None] * width_stride + ranks[None, :] * rank_stride
        b = tl.load(right + right_at, mask=here[:, None] & is_rank[None, :], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def _gates(  # type: ignore[no-untyped-def]
    weights, rows, is_row, experts_at, experts, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr
):
    """The gate of every row and rank, ``[TOKENS, EXPERTS * PADDED]`` float32."""
    mask = is_row[:, None] & (experts_at < experts)[None, :]
    gate = tl.load(weights + rows[:, None] * experts + experts_at[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.reshape(tl.broadcast_to(gate[:, :, None], (TOKENS, EXPERTS, PADDED)), (TOKENS, EXPERTS * PADDED))


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, A, weights, S, gated, tokens, width, experts, rank, x_row, A_rank, A_column,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    start, rows, is_row, experts_at, ranks, is_rank = _positions(tokens, experts, rank, TOKENS, EXPERTS, PADDED)
    product = _product(
        x + start * x_row, A, rows, is_row, ranks, is_rank, width, x_row, A_column, A_rank,
        TOKENS, EXPERTS * PADDED, WIDTH, PRECISION, WIDEN,
    )  # fmt: skip
    packed = experts * rank
    at, mask = rows[:, None] * packed + ranks[None, :], is_row[:, None] & is_rank[None, :]
    tl.store(S + start * packed + at, product.to(S.dtype.element_ty), mask=mask)
    gate = _gates(weights + start * experts, rows, is_row, experts_at, experts, TOKENS, EXPERTS, PADDED)
    tl.store(gated + start * packed + at, (product * gate).to(S.dtype.element_ty), mask=mask)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    d_out, B, weights, S, d_S, gated, d_weights, tokens, width, experts, rank, d_row, B_row, B_rank,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    start, rows, is_row, experts_at, ranks, is_rank = _positions(tokens, experts, rank, TOKENS, EXPERTS, PADDED)
    d_gated = _product(
        d_out + start * d_row, B, rows, is_row, ranks, is_rank, width, d_row, B_row, B_rank,
        TOKENS, EXPERTS * PADDED, WIDTH, PRECISION, WIDEN,
    )  # fmt: skip
    packed = experts * rank
    at, mask = rows[:, None] * packed + ranks[None, :], is_row[:, None] & is_rank[None, :]
    gate = _gates(weights + start * experts, rows, is_row, experts_at, experts, TOKENS, EXPERTS, PADDED)
    tl.store(d_S + start * packed + at, (d_gated * gate).to(S.dtype.element_ty), mask=mask)
    ungated = tl.load(S + start * packed + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(gated + start * packed + at, (ungated * gate).to(S.dtype.element_ty), mask=mask)
    by_expert = tl.sum(tl.reshape(d_gated * ungated, (TOKENS, EXPERTS, PADDED)), axis=2)
    where = rows[:, None] * experts + experts_at[None, :]
    there = is_row[:, None] & (experts_at < experts)[None, :]
    tl.store(d_weights + start * experts + where, by_expert.to(d_weights.dtype.element_ty), mask=there)


@torch.library.custom_op("clmoe::gated_product", mutates_args=())
def gated_product(x: Tensor, A: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``S = x A^T`` and its gated form. ``x [N, din]``, ``A [E*r, din]``, ``weights [N, E]`` -> two ``[N, E*r]``.

    Raises:
        ClmoeError: the kernel cannot be compiled or started on this device.
    """
    S, gated = x.new_empty(x.shape[0], A.shape[0]), x.new_empty(x.shape[0], A.shape[0])
    x = x.contiguous()
    tensors = (x, A, weights.contiguous(), S, gated)
    _launch(_forward, tensors, x.shape, weights.shape[1], A.shape[0], (x.stride(0), *A.stride()))
    return S, gated


@gated_product.register_fake
def _(x: Tensor, A: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], A.shape[0]), x.new_empty(x.shape[0], A.shape[0])


@torch.library.custom_op("clmoe::gated_gradients", mutates_args=())
def gated_gradients(d_out: Tensor, B: Tensor, S: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward pass needs of ``d_out [N, dout]``: the gradient of ``S``, ``S`` gated, the gate's gradient.

    ``B [dout, E*r]``, ``S [N, E*r]``, ``weights [N, E]`` -> ``d_S [N, E*r]``, ``[N, E*r]``, ``[N, E]``.

    Raises:
        ClmoeError: the kernel cannot be compiled or started on this device.
    """
    d_S, gated, d_weights = torch.empty_like(S), torch.empty_like(S), weights.new_empty(weights.shape)
    d_out = d_out.contiguous()
    tensors = (d_out, B, weights.contiguous(), S.contiguous(), d_S, gated, d_weights)
    _launch(_backward, tensors, d_out.shape, weights.shape[1], B.shape[1], (d_out.stride(0), *B.stride()))
    return d_S, gated, d_weights


@gated_gradients.register_fake
def _(d_out: Tensor, B: Tensor, S: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(S), torch.empty_like(S), weights.new_empty(weights.shape)


def _launch(
    kernel: Callable[..., Any],
    tensors: tuple[Tensor, ...],
    shape: torch.Size,
    experts: int,
    ranks: int,
    strides: tuple[int, ...],
) -> None:
    """Start one program per block of rows and tile of experts; ``shape`` is the large input's ``[N, width]``."""
    tokens, width = shape
    if not tokens:
        return
    rank, dtype = ranks // experts, tensors[0].dtype
    padded = triton.next_power_of_2(rank)
    tile = max(min(triton.next_power_of_2(experts), LARGEST_TILE // padded), LEAST_TILE // padded, 1)
    rows = min(max(ACCUMULATORS // (tile * padded), 16), 128)
    columns = min(max(ACCUMULATORS // (tile * padded), 16), 64) // (2 if dtype == torch.float32 else 1)
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    # triton's interpreter keeps bfloat16 as integers, which its tl.dot would multiply as such
    widen = dtype == torch.bfloat16 and bool(triton.knobs.runtime.interpret)
    grid = (triton.cdiv(tokens, rows) * triton.cdiv(experts, tile),)
    try:
        kernel[grid](  # type: ignore[index]
            *tensors, tokens, width, experts, rank, *strides,
            TOKENS=rows, EXPERTS=tile, PADDED=padded, WIDTH=max(columns, 16),
            PRECISION="ieee" if exact else "tf32", WIDEN=widen, num_warps=WARPS,
        )  # fmt: skip
    except Exception as error:  # compiler, driver and launcher fail in many ways
        reason = " ".join(str(error).split())[:200]
        raise ClmoeError(
            f"the fused expert kernel cannot run on {tensors[0].device} ({type(error).__name__}: {reason}); "
            "set CLMOE_KERNELS=torch to compute the experts with plain torch"
        ) from error
