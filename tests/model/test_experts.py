"""Growing, freezing and applying the experts of one linear."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from clmoe.model.experts import Experts
from clmoe.model.kernels import loop_experts

DIN, DOUT, RANK = 6, 5, 2


def grown(counts: list[int], dtype: torch.dtype = torch.float64) -> Experts:
    """Experts appended in steps, every step but the last frozen; all weights random."""
    torch.manual_seed(0)
    experts = Experts(DIN, DOUT, RANK, scaling=1.3)
    for step, count in enumerate(counts):
        if step:
            experts.freeze()
        experts.append(
            torch.randn(count * RANK, DIN, dtype=dtype),
            torch.randn(DOUT, count * RANK, dtype=dtype),
        )
    return experts


def inputs(count: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    gate = torch.randn(2, 4, count, dtype=dtype).softmax(-1)
    return torch.randn(2, 4, DIN, dtype=dtype), gate, torch.randn(2, 4, DOUT, dtype=dtype)


def test_fresh_experts_have_the_published_spread_and_change_nothing() -> None:
    experts = Experts(4096, DOUT, 64, scaling=2.0)
    A, B = experts.fresh(8, torch.Generator().manual_seed(0))
    assert A.shape == (512, 4096) and B.shape == (DOUT, 512)
    assert A.std().item() == pytest.approx(0.01, rel=0.01)
    assert A.mean().item() == pytest.approx(0, abs=1e-4)
    assert not B.any()
    experts.append(A, B)
    x, out = torch.randn(3, 4096), torch.randn(3, DOUT)
    assert torch.equal(experts(x, torch.full((3, 8), 1 / 8), out.clone()), out)


@pytest.mark.parametrize("counts", [[3], [2, 1], [1, 2, 1]])
def test_forward_equals_the_loop_however_the_experts_came(counts: list[int]) -> None:
    experts = grown(counts)
    x, gate, out = inputs(sum(counts))
    A = torch.cat([part for part in (experts.frozen_A, experts.A) if part is not None])
    B = torch.cat([part for part in (experts.frozen_B, experts.B) if part is not None], dim=1)
    assert experts.count == sum(counts)
    torch.testing.assert_close(experts(x, gate, out.clone()), loop_experts(x, gate, A, B, 1.3, out), rtol=0, atol=1e-12)


def test_gradients_reach_the_new_experts_only() -> None:
    experts = grown([2, 2])
    x, gate, out = inputs(4)
    experts(x, gate, out.clone()).sum().backward()
    assert [name for name, _ in experts.named_parameters()] == ["A", "B"]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in experts.parameters())
    assert experts.frozen_A is not None and not experts.frozen_A.requires_grad


@pytest.mark.parametrize("frozen", [True, False])
def test_growth_leaves_the_outputs_under_the_old_gate_unchanged(frozen: bool) -> None:
    experts = grown([3])
    x, gate, out = inputs(3)
    before = experts(x, gate, out.clone()).detach()
    if frozen:
        experts.freeze()
    experts.append(torch.randn(2 * RANK, DIN, dtype=torch.float64), torch.randn(DOUT, 2 * RANK, dtype=torch.float64))
    assert torch.equal(experts(x, gate, out.clone()), before)
    padded = torch.cat([gate, torch.zeros(2, 4, 2, dtype=torch.float64)], -1)
    torch.testing.assert_close(experts(x, padded, out.clone()), before, rtol=0, atol=1e-12)


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
    before = [tensor.detach().clone() for tensor in experts.packed()]
    experts.freeze()
    experts.freeze()  # nothing is left to freeze
    assert not list(experts.parameters())
    experts.append(torch.randn(RANK, DIN, dtype=torch.float64), torch.randn(DOUT, RANK, dtype=torch.float64))
    new = [p.detach().clone() for p in experts.parameters()]
    optimizer = torch.optim.AdamW(experts.parameters(), lr=0.1, weight_decay=0.1)
    x, gate, out = inputs(4)
    for _ in range(3):
        optimizer.zero_grad()
        experts(x, gate, out.clone()).square().sum().backward()
        optimizer.step()
    assert experts.frozen_A is not None and torch.equal(experts.frozen_A, before[0])
    assert experts.frozen_B is not None and torch.equal(experts.frozen_B, before[1])
    assert all(not torch.equal(p, old) for p, old in zip(experts.parameters(), new, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_kept_in_the_type_of_the_base_give_the_same_bits(dtype: torch.dtype) -> None:
    experts = grown([2, 1]).float()
    linear = nn.Linear(DIN, DOUT, bias=False).to(dtype).requires_grad_(False)
    x, gate, _ = inputs(3)
    before = experts.around(linear, x.to(dtype), gate.float()).detach()
    experts.freeze_as(dtype)
    assert experts.count == 3 and not list(experts.parameters())
    assert {value.dtype for value in experts.state_dict().values()} == {dtype}
    after = experts.around(linear, x.to(dtype), gate.float())
    assert after.dtype == dtype and torch.equal(after, before)


def test_frozen_experts_are_saved_and_do_not_alias_what_they_came_from() -> None:
    experts = grown([2])
    parameter = experts.A
    experts.freeze()
    assert parameter is not None
    parameter.data.zero_()
    assert experts.state_dict().keys() == {"frozen_A", "frozen_B"}
    assert experts.frozen_A is not None and experts.frozen_A.abs().sum() > 0


def test_one_dropout_mask_serves_all_experts_and_evaluation_has_none() -> None:
    experts = Experts(DIN, DOUT, RANK, scaling=1.0, dropout=0.5)
    experts.append(torch.randn(3 * RANK, DIN), torch.randn(DOUT, 3 * RANK))
    x, gate, out = inputs(3, torch.float32)
    torch.manual_seed(5)
    got = experts(x, gate, out.clone())
    torch.manual_seed(5)
    torch.testing.assert_close(got, loop_experts(dropout(x, 0.5), gate, *experts.packed(), 1.0, out))
    experts.eval()
    torch.testing.assert_close(experts(x, gate, out.clone()), loop_experts(x, gate, *experts.packed(), 1.0, out))


class OtherLinear(nn.Linear):
    """Stands for a quantised one: its forward is not a product with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def wrapped(kind: type[nn.Linear] = nn.Linear, bias: bool = False) -> nn.Linear:
    torch.manual_seed(2)
    return kind(DIN, DOUT, bias=bias, dtype=torch.float64).requires_grad_(False)


def graph(tensor: Tensor) -> set[str]:
    """The names of all functions that a backward pass from here would run."""
    names, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(node.name())
            waiting += [below for below, _ in node.next_functions]
    return names


def around_and_loop(experts: Experts, linear: nn.Linear, gate: Tensor, x: Tensor) -> list[list[Tensor]]:
    """Output and gradients of ``around``, and of the linear with the loop beside it."""
    leaves = [x.requires_grad_(), gate.requires_grad_(), *(p for p in linear.parameters() if p.requires_grad)]
    leaves += experts.parameters()
    answers = (experts.around(linear, x, gate), loop_experts(x, gate, *experts.packed(), 1.3, linear(x)))
    return [[answer, *torch.autograd.grad(answer.square().sum(), leaves)] for answer in answers]


@pytest.mark.parametrize("counts", [[3], [2, 1]])
def test_around_a_frozen_linear_one_function_has_both_gradients(counts: list[int]) -> None:
    experts, linear = grown(counts), wrapped()
    x, gate, _ = inputs(3)
    for got, wanted in zip(*around_and_loop(experts, linear, gate, x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
    assert "MmBackward0" not in graph(experts.around(linear, x, gate)), "the linear has no graph of its own"


@pytest.mark.parametrize("linear", [wrapped(OtherLinear), wrapped(bias=True), wrapped().requires_grad_()])
def test_around_another_linear_its_own_graph_is_kept(linear: nn.Linear) -> None:
    experts = grown([3])
    x, gate, _ = inputs(3)
    for got, wanted in zip(*around_and_loop(experts, linear, gate, x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


def test_around_under_dropout_the_frozen_linear_sees_the_whole_input() -> None:
    experts, linear = Experts(DIN, DOUT, RANK, scaling=1.3, dropout=0.5), wrapped()
    experts.append(*(tensor.double() for tensor in experts.fresh(3, torch.Generator().manual_seed(0))))
    x, gate, _ = inputs(3)
    (gradient,) = torch.autograd.grad(experts.around(linear, x.requires_grad_(), gate).sum(), x)
    torch.testing.assert_close(gradient, linear.weight.sum(0).expand_as(x), rtol=0, atol=1e-12)  # B is zero


def test_around_a_weight_that_zero3_spreads_its_own_graph_is_kept() -> None:
    experts, linear = grown([3]), wrapped()
    x, gate, _ = inputs(3)
    linear.weight.ds_id = 0  # type: ignore[attr-defined]
    out = experts.around(linear, x.requires_grad_(), gate)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.shape == x.shape
    assert "MmBackward0" in graph(out)
