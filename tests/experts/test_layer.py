"""The packed mixture of experts against the loop and the equation; growing and freezing a linear's experts."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import dropout, silu

from clmoe.experts.layer import Experts, loop_experts, packed_experts

SCALING, DIN, DOUT, RANK = 1.7, 6, 5, 2
SHAPES = [(2, 5, 3, 4), (1, 1, 3, 4), (3, 1, 1, 2), (2, 7, 8, 1)]  # B, T, E, r


# ---- The packed product


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


def test_inputs_may_lack_the_batch_dimension_and_have_strides() -> None:
    x, gate, A, B, out = (tensor.detach() for tensor in case((2, 5, 3, 2)))
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    expected = packed_experts(x, gate, A, B, SCALING, out.clone())
    one = packed_experts(x[0], gate[0], A, B, SCALING, out[0].clone())
    torch.testing.assert_close(one, expected[0], rtol=0, atol=1e-14)
    for form in (out, out.transpose(0, 1).contiguous().transpose(0, 1)):
        answer = packed_experts(strided, gate, A, B, SCALING, form.clone(memory_format=torch.preserve_format))
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-14)


def test_the_frozen_output_is_used_up() -> None:
    x, gate, A, B, out = case((2, 3, 2, 2))
    given = out.clone()
    assert packed_experts(x, gate, A, B, SCALING, given) is given, "no tensor of its size is made"
    assert not torch.equal(given, out)


def test_a_recomputed_product_is_not_kept_and_changes_no_bit_of_a_gradient() -> None:
    _, gate, A, B, out = case((2, 5, 3, 4))
    g, u = (torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    answers = []
    for factors, keeps in ((None, True), ((g, u), False)):
        kept: list[int] = []
        x = silu(g) * u
        with saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):  # noqa: B023
            answer = packed_experts(x, gate, A, B, SCALING, out.clone(), product=factors)
        assert (x.data_ptr() in kept) is keeps
        answers.append(torch.autograd.grad(answer.square().sum(), (g, u, gate, A, B, out)))
    assert all(torch.equal(*pair) for pair in zip(*answers, strict=True))


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


# ---- The experts of one linear


class OtherLinear(nn.Linear):
    """Stands for a quantised one: its forward is not a product with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def frozen_linear(kind: type[nn.Linear] = nn.Linear, bias: bool = False) -> nn.Linear:
    torch.manual_seed(2)
    return kind(DIN, DOUT, bias=bias, dtype=torch.float64).requires_grad_(False)


def grown(counts: list[int]) -> Experts:
    """Experts appended in steps, every step but the last frozen; all weights random, in float64."""
    torch.manual_seed(0)
    experts = Experts(DIN, DOUT, RANK, SCALING)
    for step, count in enumerate(counts):
        if step:
            experts.freeze()
        experts.append(*random_experts(count))
    return experts


def random_experts(count: int) -> tuple[Tensor, Tensor]:
    A, B = torch.randn(count * RANK, DIN), torch.randn(DOUT, count * RANK)
    return A.double(), B.double()


def inputs(count: int) -> tuple[Tensor, Tensor, nn.Linear]:
    """x, gate, and the frozen linear."""
    torch.manual_seed(1)
    gate = torch.randn(2, 4, count, dtype=torch.float64).softmax(-1)
    return torch.randn(2, 4, DIN, dtype=torch.float64), gate, frozen_linear()


def test_fresh_experts_have_the_published_spread_and_change_nothing() -> None:
    experts, linear = Experts(4096, DOUT, 64, scaling=2.0), nn.Linear(4096, DOUT, bias=False)
    A, B = experts.fresh(8, torch.Generator().manual_seed(0))
    assert A.shape == (512, 4096) and B.shape == (DOUT, 512)
    assert A.std().item() == pytest.approx(0.01, rel=0.01)
    assert A.mean().item() == pytest.approx(0, abs=1e-4)
    assert not B.any()
    experts.append(A, B)
    x = torch.randn(3, 4096)
    assert torch.equal(experts(x, torch.full((3, 8), 1 / 8), linear), linear(x))


@pytest.mark.parametrize("counts", [[3], [2, 1], [1, 2, 1]])
def test_forward_and_gradients_equal_the_loop_however_the_experts_came(counts: list[int]) -> None:
    """Also that one function holds both gradients: the frozen linear has no graph of its own."""
    experts = grown(counts)
    x, gate, linear = inputs(sum(counts))
    assert experts.count == sum(counts)
    for got, wanted in zip(*outputs_and_gradients(experts, linear, gate, x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
    assert "MmBackward0" not in graph(experts(x, gate, linear))
    assert [name for name, _ in experts.named_parameters()] == ["A", "B"]


def outputs_and_gradients(experts: Experts, linear: nn.Linear, gate: Tensor, x: Tensor) -> list[list[Tensor]]:
    """Those of the layer, and those of the linear with the loop beside it."""
    leaves = [x.requires_grad_(), gate.requires_grad_(), *(p for p in linear.parameters() if p.requires_grad)]
    leaves += experts.parameters()
    answers = (experts(x, gate, linear), loop_experts(x, gate, *experts.packed(), SCALING, linear(x)))
    return [[answer, *torch.autograd.grad(answer.square().sum(), leaves)] for answer in answers]


def graph(tensor: Tensor) -> set[str]:
    """The names of all functions that a backward pass from here would run."""
    names, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(node.name())
            waiting += [below for below, _ in node.next_functions]
    return names


@pytest.mark.parametrize(
    "linear", [frozen_linear(OtherLinear), frozen_linear(bias=True), frozen_linear().requires_grad_()]
)
def test_another_linear_keeps_its_own_graph(linear: nn.Linear) -> None:
    experts = grown([3])
    x, gate, _ = inputs(3)
    for got, wanted in zip(*outputs_and_gradients(experts, linear, gate, x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


def test_a_weight_that_zero3_shards_keeps_its_own_graph() -> None:
    experts = grown([3])
    x, gate, linear = inputs(3)
    linear.weight.ds_id = 0  # type: ignore[attr-defined]
    assert "MmBackward0" in graph(experts(x.requires_grad_(), gate, linear))


def test_under_dropout_one_mask_serves_all_experts_and_the_frozen_linear_sees_the_whole_input() -> None:
    experts = Experts(DIN, DOUT, RANK, SCALING, dropout=0.5)
    experts.append(*random_experts(3))
    x, gate, linear = inputs(3)
    torch.manual_seed(5)
    got = experts(x.requires_grad_(), gate, linear)
    torch.manual_seed(5)
    wanted = loop_experts(dropout(x, 0.5), gate, *experts.packed(), SCALING, linear(x))
    for ours, theirs in ((got, wanted), [torch.autograd.grad(answer.sum(), x)[0] for answer in (got, wanted)]):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    experts.eval()
    wanted = loop_experts(x, gate, *experts.packed(), SCALING, linear(x))
    torch.testing.assert_close(experts(x, gate, linear), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False])
def test_growth_leaves_the_outputs_under_the_old_gate_unchanged(frozen: bool) -> None:
    experts = grown([3])
    x, gate, linear = inputs(3)
    before = experts(x, gate, linear).detach()
    if frozen:
        experts.freeze()
    experts.append(*random_experts(2))
    assert torch.equal(experts(x, gate, linear), before)
    padded = torch.cat([gate, torch.zeros(2, 4, 2, dtype=torch.float64)], -1)
    torch.testing.assert_close(experts(x, padded, linear), before, rtol=0, atol=1e-12)


def test_append_without_freezing_keeps_one_parameter() -> None:
    experts = grown([2])
    old_A, old_B = (t.detach().clone() for t in experts.packed())
    experts.append(torch.ones(RANK, DIN), torch.ones(DOUT, RANK))
    A, B = experts.packed()
    assert torch.equal(A[: 2 * RANK], old_A) and torch.equal(B[:, : 2 * RANK], old_B)
    assert (A[2 * RANK :] == 1).all() and (B[:, 2 * RANK :] == 1).all()
    assert experts.A is A and A.requires_grad


def test_freezing_keeps_every_bit_through_optimizer_steps() -> None:
    experts = grown([3])
    parameter, before = experts.A, [tensor.detach().clone() for tensor in experts.packed()]
    experts.freeze()
    experts.freeze()  # nothing is left to freeze
    parameter.data.zero_()  # type: ignore[union-attr]
    assert not list(experts.parameters()) and experts.state_dict().keys() == {"frozen_A", "frozen_B"}
    experts.append(*random_experts(1))
    new = [p.detach().clone() for p in experts.parameters()]
    optimizer = torch.optim.AdamW(experts.parameters(), lr=0.1, weight_decay=0.1)
    x, gate, linear = inputs(4)
    for _ in range(3):
        optimizer.zero_grad()
        experts(x, gate, linear).square().sum().backward()
        optimizer.step()
    assert torch.equal(experts.frozen_A, before[0]) and torch.equal(experts.frozen_B, before[1])  # type: ignore[arg-type]
    assert all(not torch.equal(p, old) for p, old in zip(experts.parameters(), new, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_frozen_in_the_dtype_of_the_base_give_the_same_bits(dtype: torch.dtype) -> None:
    experts, linear = grown([2, 1]).float(), frozen_linear().to(dtype)
    x, gate, _ = inputs(3)
    before = experts(x.to(dtype), gate.float(), linear).detach()
    experts.freeze_as(dtype)
    assert experts.count == 3 and not list(experts.parameters())
    assert {value.dtype for value in experts.state_dict().values()} == {dtype}
    after = experts(x.to(dtype), gate.float(), linear)
    assert after.dtype == dtype and torch.equal(after, before)
