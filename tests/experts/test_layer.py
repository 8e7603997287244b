"""The packed mixture of experts against the loop and the equation; growing and freezing a linear's experts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import dropout, silu

from clmoe.experts.layer import Experts, loop_experts, packed_experts

SCALING, DIN, DOUT, RANK = 1.7, 6, 5, 2
SHAPES = [(2, 5, 3, 4), (1, 1, 3, 4), (3, 1, 1, 2), (2, 7, 8, 1)]  # B, T, E, r


def close(found: object, wanted: object, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


# ---- The packed product


def case(shape: tuple[int, int, int, int] = (2, 5, 3, 4)) -> list[Tensor]:
    """Random x, gate, A, B and out in float64, which require gradients."""
    torch.manual_seed(0)
    B, T, E, r = shape
    parts = [(B, T, DIN), (B, T, E), (E * r, DIN), (DOUT, E * r), (B, T, DOUT)]
    x, gate, *others = (torch.randn(part, dtype=torch.float64) for part in parts)
    return [tensor.requires_grad_() for tensor in (x, gate.softmax(-1), *others)]


def equation(x: Tensor, gate: Tensor, A: Tensor, B: Tensor, out: Tensor) -> Tensor:
    """``out + s * sum_i g_i B_i A_i x``, with one tensor ``[E, dout, din]`` of expert matrices."""
    E = gate.shape[-1]
    delta = torch.einsum("oer,eri->eoi", B.view(DOUT, E, -1), A.view(E, -1, DIN))
    return out + SCALING * torch.einsum("bte,eoi,bti->bto", gate, delta, x)


def packed(x: Tensor, gate: Tensor, A: Tensor, B: Tensor, out: Tensor, **more: object) -> Tensor:
    return packed_experts(x, gate, A, B, SCALING, out.clone(memory_format=torch.preserve_format), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_loop_and_equation_agree_with_all_gradients(shape: tuple[int, int, int, int]) -> None:
    tensors = case(shape)
    x, gate, A, B, out = tensors
    upstream = torch.randn_like(out)
    first, *others = (
        [answer, *torch.autograd.grad(answer, tensors, upstream)]
        for answer in (packed(*tensors), loop_experts(x, gate, A, B, SCALING, out), equation(*tensors))
    )
    for other in others:
        close(first, other)


@pytest.mark.parametrize("shape", [(2, 2, 3, 2), (1, 1, 2, 1)])
def test_gradcheck(shape: tuple[int, int, int, int]) -> None:
    assert torch.autograd.gradcheck(packed, case(shape))


def test_inputs_may_lack_the_batch_dimension_and_have_strides() -> None:
    x, gate, A, B, out = (tensor.detach() for tensor in case())
    expected = packed(x, gate, A, B, out)
    close(packed(x[0], gate[0], A, B, out[0]), expected[0], 1e-14)
    strided_x, strided_out = (tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (x, out))
    for form in (out, strided_out):
        close(packed(strided_x, gate, A, B, form), expected, 1e-14)


def test_a_recomputed_product_is_not_kept_and_changes_no_bit_of_a_gradient() -> None:
    _, gate, A, B, out = case()
    g, u = (torch.randn(2, 5, DIN, dtype=torch.float64, requires_grad=True) for _ in range(2))
    answers = []
    for factors, keeps in ((None, True), ((g, u), False)):
        kept: list[int] = []
        x = silu(g) * u
        with saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):  # noqa: B023
            answer = packed(x, gate, A, B, out, product=factors)
        assert (x.data_ptr() in kept) is keeps
        answers.append(torch.autograd.grad(answer.square().sum(), (g, u, gate, A, B, out)))
    assert all(torch.equal(*pair) for pair in zip(*answers, strict=True))


@pytest.mark.parametrize("frozen", [4, 8, 12])
def test_frozen_experts_get_no_gradient_and_the_others_theirs(frozen: int) -> None:
    tensors = case()
    whole, part = (
        torch.autograd.grad(packed(*tensors, frozen_rank=rank).square().sum(), tensors) for rank in (0, frozen)
    )
    assert all(torch.equal(whole[index], part[index]) for index in (0, 1, 4))
    assert not part[2][:frozen].any() and not part[3][:, :frozen].any()
    close((part[2][frozen:], part[3][:, frozen:]), (whole[2][frozen:], whole[3][:, frozen:]))


def test_bfloat16_input_stays_near_float64_and_keeps_float32_gradients() -> None:
    x, gate, A, B, out = (t.detach() for t in case((2, 16, 4, 4)))
    exact = equation(x, gate, A, B, out)
    A32, B32 = A.float().requires_grad_(), B.float().requires_grad_()
    half = packed(x.bfloat16(), gate.float(), A32, B32, out.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.double() - exact).norm() / exact.norm() < 0.01
    half.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in (A32, B32))


# ---- The experts of one linear


class OtherLinear(nn.Linear):
    """Stands for a quantised linear: its forward pass is not a product with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Viewed(torch.autograd.Function):
    """The product of bitsandbytes' 8-bit linear on a GPU: what it returns is a view that autograd does not know."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return (x.reshape(-1, x.shape[-1]) @ weight.t()).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.saved_tensors[0], None


class ViewedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _Viewed.apply(x, self.weight)


def frozen_linear(kind: type[nn.Linear] = nn.Linear, bias: bool = False) -> nn.Linear:
    torch.manual_seed(2)
    return kind(DIN, DOUT, bias=bias, dtype=torch.float64).requires_grad_(False)


def random_experts(count: int) -> tuple[Tensor, Tensor]:
    A, B = torch.randn(count * RANK, DIN), torch.randn(DOUT, count * RANK)
    return A.double(), B.double()


def grown(*counts: int, dropout: float = 0.0) -> Experts:
    """Experts appended in steps, all but the last step frozen; all weights are random, in float64."""
    torch.manual_seed(0)
    experts = Experts(DIN, DOUT, RANK, SCALING, dropout)
    for count in counts:
        experts.freeze()
        experts.append(*random_experts(count))
    return experts


def inputs(count: int) -> tuple[Tensor, Tensor, nn.Linear]:
    """Random x and gate, and the frozen linear."""
    torch.manual_seed(1)
    gate = torch.randn(2, 4, count, dtype=torch.float64).softmax(-1)
    return torch.randn(2, 4, DIN, dtype=torch.float64).requires_grad_(), gate.requires_grad_(), frozen_linear()


def equal_to_the_loop(experts: Experts, linear: nn.Linear) -> set[str]:
    """Compare outputs and gradients with the linear plus the loop; returns the names of the autograd functions used."""
    x, gate, _ = inputs(experts.count)
    leaves = [x, gate, *(p for p in linear.parameters() if p.requires_grad), *experts.parameters()]
    answers = (experts(x, gate, linear), loop_experts(x, gate, *experts.packed(), SCALING, linear(x)))
    names, waiting = set(), [answers[0].grad_fn]
    while waiting:
        if (node := waiting.pop()) is not None:
            names.add(node.name())
            waiting += [below for below, _ in node.next_functions]
    close(*([answer, *torch.autograd.grad(answer.square().sum(), leaves)] for answer in answers), 1e-11)
    return names


@pytest.mark.parametrize(("as_released", "at_11008"), [(False, 0.0061), (True, 0.01)])
def test_the_spread_of_fresh_experts_at_each_width(as_released: bool, at_11008: float) -> None:
    for din, std in ((4096, 0.01), (11_008, at_11008)):
        experts = Experts(din, DOUT, 64, scaling=2.0, as_released=as_released)
        assert experts.fresh(8, torch.Generator().manual_seed(0))[0].std().item() == pytest.approx(std, rel=0.01)


def test_fresh_experts_have_the_published_spread_and_change_nothing() -> None:
    experts, linear = Experts(4096, DOUT, 64, scaling=2.0), nn.Linear(4096, DOUT, bias=False)
    A, B = experts.fresh(8, torch.Generator().manual_seed(0))
    assert A.shape == (512, 4096) and B.shape == (DOUT, 512) and not B.any()
    assert A.std().item() == pytest.approx(0.01, rel=0.01) and A.mean().item() == pytest.approx(0, abs=1e-4)
    experts.append(A, B)
    x = torch.randn(3, 4096)
    assert torch.equal(experts(x, torch.full((3, 8), 1 / 8), linear), linear(x))


@pytest.mark.parametrize("counts", [(3,), (2, 1), (1, 2, 1)])
def test_forward_and_gradients_equal_the_loop_however_the_experts_came(counts: tuple[int, ...]) -> None:
    """One autograd function computes both gradients: the frozen linear has no graph of its own."""
    experts = grown(*counts)
    assert experts.count == sum(counts) and [name for name, _ in experts.named_parameters()] == ["A", "B"]
    assert "MmBackward0" not in equal_to_the_loop(experts, frozen_linear())


@pytest.mark.parametrize("kind", ["quantised", "biased", "trained", "sharded"])
def test_another_linear_keeps_its_own_graph(kind: str) -> None:
    linear = frozen_linear(OtherLinear if kind == "quantised" else nn.Linear, bias=kind == "biased")
    linear.requires_grad_(kind == "trained")
    if kind == "sharded":
        linear.weight.ds_id = 0  # type: ignore[attr-defined]
    assert equal_to_the_loop(grown(3), linear) & {"MmBackward0", "AddmmBackward0"}


def test_an_8_bit_linears_output_is_not_changed_in_place() -> None:
    with pytest.raises(RuntimeError, match="view and is being modified inplace"):
        frozen_linear(ViewedLinear)(torch.randn(2, 3, DIN, dtype=torch.float64, requires_grad=True)).add_(1)
    equal_to_the_loop(grown(3), frozen_linear(ViewedLinear))


def test_under_dropout_one_mask_serves_all_experts_and_the_frozen_linear_sees_the_whole_input() -> None:
    experts, (x, gate, linear) = grown(3, dropout=0.5), inputs(3)
    torch.manual_seed(5)
    got = experts(x, gate, linear, (x, x))  # factors of another x, not to be used under dropout
    torch.manual_seed(5)
    wanted = loop_experts(dropout(x, 0.5), gate, *experts.packed(), SCALING, linear(x))
    close(*([answer, *torch.autograd.grad(answer.sum(), [x, *experts.parameters()])] for answer in (got, wanted)))
    equal_to_the_loop(experts.eval(), linear)


@pytest.mark.parametrize("counts", [(3,), (1, 2)])
def test_as_released_each_expert_has_its_own_mask(counts: tuple[int, ...]) -> None:
    experts, (x, gate, linear) = grown(*counts, dropout=0.5), inputs(3)
    experts.as_released = True
    torch.manual_seed(5)
    got = experts(x, gate, linear)
    torch.manual_seed(5)
    wanted = linear(x)
    for g, A, B in zip(
        gate.split(1, -1), experts.packed()[0].split(RANK), experts.packed()[1].split(RANK, 1), strict=True
    ):
        wanted = wanted + SCALING * g * (dropout(x, 0.5) @ A.t() @ B.t())
    close(*([answer, *torch.autograd.grad(answer.sum(), [x, gate, *experts.parameters()])] for answer in (got, wanted)))
    equal_to_the_loop(experts.eval(), linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_frozen_in_the_dtype_of_the_base_give_the_same_bits(dtype: torch.dtype) -> None:
    experts, linear = grown(2, 1).float(), frozen_linear().to(dtype)
    x, gate, _ = inputs(3)
    before = experts(x.to(dtype), gate.float(), linear)
    experts.freeze_as(dtype)
    assert experts.count == 3 and not list(experts.parameters())
    assert {value.dtype for value in experts.state_dict().values()} == {dtype}
    after = experts(x.to(dtype), gate.float(), linear)
    assert after.dtype == dtype and torch.equal(after, before)
