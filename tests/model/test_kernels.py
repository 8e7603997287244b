"""The packed mixture of experts against the loop that defines it, and against the equation written with einsum."""

import pytest
import torch
from torch import Tensor

from clmoe.model.kernels import loop_experts, packed_experts

SCALING = 1.7
SHAPES = [(2, 5, 3, 4), (1, 1, 3, 4), (3, 1, 1, 2), (2, 7, 8, 1)]  # B, T, E, r


def case(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, gate, A, B, out with gradients, for din 6 and dout 5."""
    torch.manual_seed(0)
    batch, tokens, experts, rank = shape
    x = torch.randn(batch, tokens, 6, dtype=dtype)
    gate = torch.randn(batch, tokens, experts, dtype=dtype).softmax(-1)
    A, B = torch.randn(experts * rank, 6, dtype=dtype), torch.randn(5, experts * rank, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (x, gate, A, B, torch.randn(batch, tokens, 5, dtype=dtype))]


def equation(x: Tensor, gate: Tensor, A: Tensor, B: Tensor, out: Tensor) -> Tensor:
    """``out + s * sum_i g_i B_i A_i x``, one tensor ``[E, dout, din]`` of expert matrices."""
    E = gate.shape[-1]
    A_i, B_i = A.view(E, -1, A.shape[1]), B.view(B.shape[0], E, -1)
    delta = torch.einsum("oer,eri->eoi", B_i, A_i)
    return out + SCALING * torch.einsum("bte,eoi,bti->bto", gate, delta, x)


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_loop_and_equation_agree_with_all_gradients(shape: tuple[int, int, int, int]) -> None:
    tensors = case(shape)
    x, gate, A, B, out = tensors
    upstream = torch.randn_like(out)
    answers = [
        packed_experts(x, gate, A, B, SCALING, out),
        loop_experts(x, gate, A, B, SCALING, out),
        equation(x, gate, A, B, out),
    ]
    gradients = [torch.autograd.grad(answer, tensors, upstream) for answer in answers]
    for answer, gradient in zip(answers[1:], gradients[1:], strict=True):
        torch.testing.assert_close(answers[0], answer, rtol=0, atol=1e-12)
        for ours, theirs in zip(gradients[0], gradient, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 2, 3, 2), (1, 1, 2, 1)])
def test_gradcheck(shape: tuple[int, int, int, int]) -> None:
    assert torch.autograd.gradcheck(lambda x, g, A, B, out: packed_experts(x, g, A, B, SCALING, out), case(shape))


def test_input_without_batch_dimension() -> None:
    x, gate, A, B, out = case((1, 4, 3, 2))
    whole = packed_experts(x, gate, A, B, SCALING, out)
    torch.testing.assert_close(packed_experts(x[0], gate[0], A, B, SCALING, out[0]), whole[0], rtol=0, atol=1e-14)


def test_views_with_strides_are_accepted() -> None:
    x, gate, A, B, out = (tensor.detach() for tensor in case((2, 5, 3, 2)))
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    expected = packed_experts(x, gate, A, B, SCALING, out)
    torch.testing.assert_close(packed_experts(strided, gate, A, B, SCALING, out), expected, rtol=0, atol=1e-14)


def test_the_frozen_output_is_not_changed_in_place() -> None:
    x, gate, A, B, out = case((2, 3, 2, 2))
    before = out.detach().clone()
    packed_experts(x, gate, A, B, SCALING, out)
    assert torch.equal(out, before)


def test_bfloat16_input_stays_near_float64_and_keeps_float32_gradients() -> None:
    x, gate, A, B, out = (t.detach() for t in case((2, 16, 4, 4)))
    exact = equation(x, gate, A, B, out)
    A32, B32 = A.float().requires_grad_(), B.float().requires_grad_()
    half = packed_experts(x.bfloat16(), gate.float(), A32, B32, SCALING, out.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).norm() / exact.norm() < 0.01
    half.sum().backward()
    assert A32.grad is not None and A32.grad.dtype == torch.float32
    assert B32.grad is not None and B32.grad.dtype == torch.float32
