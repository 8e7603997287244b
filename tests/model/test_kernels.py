"""The packed mixture of experts against the loop that defines it, and against the equation written with einsum."""

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear, silu

from clmoe.model.kernels import loop_experts, packed_experts, router_logits

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
        packed_experts(x, gate, A, B, SCALING, out.clone()),
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
    assert torch.autograd.gradcheck(
        lambda x, g, A, B, out: packed_experts(x, g, A, B, SCALING, out.clone()), case(shape)
    )


def test_input_without_batch_dimension() -> None:
    x, gate, A, B, out = case((1, 4, 3, 2))
    whole = packed_experts(x, gate, A, B, SCALING, out.clone())
    one = packed_experts(x[0], gate[0], A, B, SCALING, out[0].clone())
    torch.testing.assert_close(one, whole[0], rtol=0, atol=1e-14)


def test_views_with_strides_are_accepted() -> None:
    x, gate, A, B, out = (tensor.detach() for tensor in case((2, 5, 3, 2)))
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    expected = packed_experts(x, gate, A, B, SCALING, out.clone())
    for form in (out, out.transpose(0, 1).contiguous().transpose(0, 1)):
        answer = packed_experts(strided, gate, A, B, SCALING, form.clone(memory_format=torch.preserve_format))
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-14)


def test_the_frozen_output_is_used_up() -> None:
    x, gate, A, B, out = case((2, 3, 2, 2))
    given = out.clone()
    assert packed_experts(x, gate, A, B, SCALING, given) is given, "no tensor of its size is made"
    assert not torch.equal(given, out)


def product_case() -> tuple[list[Tensor], Tensor, Tensor]:
    """As ``case``, and the factors of a product in the place of ``x``."""
    _, *others = case((2, 5, 3, 4))
    return others, *(torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))


def test_a_product_made_again_changes_no_bit_of_a_gradient() -> None:
    (gate, A, B, out), g, u = product_case()
    answers = []
    for factors in (None, (g, u)):
        answer = packed_experts(silu(g) * u, gate, A, B, SCALING, out.clone(), product=factors)
        answers.append(torch.autograd.grad(answer.square().sum(), (g, u, gate, A, B, out)))
    assert all(torch.equal(*pair) for pair in zip(*answers, strict=True))


def test_a_product_is_not_kept() -> None:
    (gate, A, B, out), g, u = product_case()
    for factors, keeps in ((None, True), ((g, u), False)):
        kept: list[int] = []
        x = silu(g) * u
        with saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda none: none):  # noqa: B023
            packed_experts(x, gate, A, B, SCALING, out.clone(), product=factors)
        assert (x.data_ptr() in kept) is keeps


@pytest.mark.parametrize("frozen", [0, 4, 8, 12])
def test_frozen_experts_get_no_gradient_and_the_others_theirs(frozen: int) -> None:
    tensors = case((2, 5, 3, 4))
    x, gate, A, B, out = tensors
    whole, part = (
        torch.autograd.grad(packed_experts(x, gate, A, B, SCALING, out.clone(), rank).square().sum(), tensors)
        for rank in (0, frozen)
    )
    for index in (0, 1, 4):
        assert torch.equal(whole[index], part[index])
    assert not part[2][:frozen].any() and not part[3][:, :frozen].any()
    torch.testing.assert_close(part[2][frozen:], whole[2][frozen:], rtol=0, atol=1e-12)
    torch.testing.assert_close(part[3][:, frozen:], whole[3][:, frozen:], rtol=0, atol=1e-12)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_logits_are_a_float32_product_that_keeps_no_copy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6).to(dtype).requires_grad_()
    weight, upstream = torch.randn(3, 6, requires_grad=True), torch.randn(2, 5, 3)
    kept: list[int] = []
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor.data_ptr()), tensor)[1], lambda tensor: tensor):
        logits = router_logits(x, weight)
    assert sorted(kept) == sorted([x.data_ptr(), weight.data_ptr()])
    expected = linear(x.float(), weight)
    assert logits.dtype == torch.float32 and torch.equal(logits, expected)
    found, wanted = (torch.autograd.grad(answer, (x, weight), upstream) for answer in (logits, expected))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
