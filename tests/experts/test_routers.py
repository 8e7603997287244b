"""Gates in closed form, banks that route the samples of one batch differently, and routing as data."""

import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from clmoe.experts.routers import InstanceRouter, RouterBank, TaskRouter, gate_from_logits, router_logits
from clmoe.experts.routing import RouteSelection, RouteTrace, checkpoint_contexts, current_routing, routing

DIN = 6


def bank(spans: list[int], top_k: int | None = None) -> RouterBank:
    """A bank of random routers; all but the newest frozen."""
    torch.manual_seed(0)
    routers = RouterBank("block", top_k)
    for number, span in enumerate(spans):
        routers.append(torch.randn(span, DIN), frozen=number < len(spans) - 1)
    return routers


def tokens(rows: int, length: int = 5) -> torch.Tensor:
    return torch.randn(rows, length, DIN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_a_float32_product_that_keeps_no_copy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6).to(dtype).requires_grad_()
    weight, upstream = torch.randn(3, 6, requires_grad=True), torch.randn(2, 5, 3)
    kept: list[int] = []
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor.data_ptr()), tensor)[1], lambda tensor: tensor):
        logits = router_logits(x, weight)
    assert sorted(kept) == sorted([x.data_ptr(), weight.data_ptr()])
    expected = linear(x.float(), weight)
    assert logits.dtype == torch.float32 and torch.equal(logits, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(InstanceRouter(weight.detach())(x), expected)
    found, wanted = (torch.autograd.grad(answer, (x, weight), upstream) for answer in (logits, expected))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_dense_gate_is_a_softmax() -> None:
    gate = gate_from_logits(torch.tensor([0.0, math.log(2), math.log(5)]), None)
    torch.testing.assert_close(gate, torch.tensor([1 / 8, 2 / 8, 5 / 8]))


def test_top_k_renormalises_over_the_kept_logits() -> None:
    gate = gate_from_logits(torch.tensor([[math.log(3), -9.0, math.log(7), math.log(2)]]), 2)
    torch.testing.assert_close(gate, torch.tensor([[0.3, 0.0, 0.7, 0.0]]))
    assert gate[0, 1] == 0 and gate[0, 3] == 0
    logits = torch.randn(4, 3)
    assert all(torch.equal(gate_from_logits(logits, top_k), logits.softmax(-1)) for top_k in (3, 4))


def test_ties_go_to_the_lower_index() -> None:
    assert torch.equal(gate_from_logits(torch.zeros(64), 2), torch.tensor([0.5, 0.5] + [0.0] * 62))
    gate = gate_from_logits(torch.tensor([1.0, 2.0, 1.0, 2.0, 2.0]), 2)
    assert gate.nonzero().squeeze(1).tolist() == [1, 3]


def test_top_k_gradient_is_that_of_the_kept_softmax_and_finite() -> None:
    logits = torch.tensor([0.3, -1.0, 0.9, 0.1], requires_grad=True)
    gate_from_logits(logits, 2)[2].backward()
    p = math.exp(0.9) / (math.exp(0.9) + math.exp(0.3))
    torch.testing.assert_close(logits.grad, torch.tensor([-p * (1 - p), 0.0, p * (1 - p), 0.0]))


def test_fresh_router_is_within_its_bound_and_seeded() -> None:
    weight = InstanceRouter.fresh(400, 50, torch.Generator().manual_seed(3))
    assert weight.shape == (50, 400)
    assert weight.abs().max() <= 1 / 20 and weight.abs().mean().item() == pytest.approx(1 / 40, rel=0.02)
    assert torch.equal(weight, InstanceRouter.fresh(400, 50, torch.Generator().manual_seed(3)))


def test_freezing_turns_the_weight_into_a_saved_buffer_bit_for_bit() -> None:
    routers = bank([2, 3])
    before = {name: tensor.clone() for name, tensor in routers.state_dict().items()}
    assert [name for name, _ in routers.named_parameters()] == ["instance.1.weight"]
    routers.freeze()
    assert not list(routers.parameters())
    assert routers.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in routers.state_dict().items())


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_mixed_batch_equals_its_samples_one_by_one(top_k: int | None) -> None:
    routers, x = bank([2, 5, 3], top_k), tokens(6)
    newest = gate_from_logits(x @ routers.instance[2].weight.T, top_k)
    torch.testing.assert_close(routers(x), newest)
    with routing(RouteSelection()):
        torch.testing.assert_close(routers(x), newest)
    index = torch.tensor([0, 2, 1, 0, 2, 1])
    with routing(RouteSelection(router=index), trace := RouteTrace()):
        gate = routers(x)
    assert gate.shape == (6, 5, 5)
    for row, router in enumerate(index.tolist()):
        span = routers.instance[router].span
        with routing(RouteSelection(router=index[row : row + 1])):
            alone = routers(x[row : row + 1])
        assert alone.shape[-1] == span
        torch.testing.assert_close(gate[row, :, :span], alone[0], rtol=0, atol=1e-6)
        logits = x[row] @ routers.instance[router].weight.T
        torch.testing.assert_close(gate[row, :, :span], gate_from_logits(logits, top_k), rtol=0, atol=1e-6)
        assert not gate[row, :, span:].any()
        assert torch.isneginf(trace.outputs["block"].logits[row, :, span:]).all()


def test_the_gradient_of_a_mixed_batch_reaches_the_trainable_router_from_its_rows_only() -> None:
    routers, x = bank([2, 3]), tokens(4)
    index = torch.tensor([1, 0, 0, 1])
    weights = torch.randn(4, 5, 3)
    with routing(RouteSelection(router=index)):
        (routers(x) * weights).sum().backward()
    mixed = routers.instance[1].weight.grad.clone()
    routers.zero_grad()
    rows = index == 1
    with routing(RouteSelection(router=index[rows])):
        (routers(x[rows]) * weights[rows]).sum().backward()
    torch.testing.assert_close(mixed, routers.instance[1].weight.grad)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.8])
def test_task_gates_are_mixed_in_with_weight_one_minus_beta(beta: float) -> None:
    routers, x = bank([3]), tokens(2)
    routers.task.append(torch.tensor([0.2, 0.3, 0.5]))
    routers.task.append(torch.tensor([1.0, 0.0, 0.0]))
    instance = (x @ routers.instance[0].weight.T).softmax(-1)
    with routing(RouteSelection(task=torch.tensor([1, 0]), beta=beta), trace := RouteTrace()):
        gate = routers(x)
    for row, task_gate in enumerate(([1.0, 0.0, 0.0], [0.2, 0.3, 0.5])):
        expected = beta * instance[row] + (1 - beta) * torch.tensor(task_gate)
        torch.testing.assert_close(gate[row], expected)
    torch.testing.assert_close(trace.outputs["block"].gate, instance)
    plain = routers(x)
    with routing(RouteSelection(task=torch.tensor([0, 0]), beta=1.0)):
        assert torch.equal(routers(x), plain)


def test_task_router_keeps_rows_in_order_and_refuses_when_empty() -> None:
    router = TaskRouter()
    with pytest.raises(RuntimeError, match="no task gates"):
        router(torch.tensor([0]))
    for value in (1.0, 2.0):
        router.append(torch.full((4,), value))
    assert router(torch.tensor([1, 0, 1])).tolist() == [[[2.0] * 4], [[1.0] * 4], [[2.0] * 4]]
    assert router.state_dict().keys() == {"gates"}


# ---- Routing as data: installed around a forward, restored afterwards


def every(router: int) -> RouteSelection:
    return RouteSelection(router=torch.full((2,), router))


def test_blocks_nest_and_restore_even_after_an_error() -> None:
    assert current_routing() is None
    outer, inner = every(0), every(1)
    with routing(outer):
        with pytest.raises(ValueError), routing(inner):
            assert current_routing().selection is inner
            raise ValueError
        assert current_routing().selection is outer
    assert current_routing() is None


def test_rows_picks_samples_and_keeps_the_rest() -> None:
    selection = RouteSelection(router=torch.tensor([0, 1, 2]), task=torch.tensor([5, 6, 7]), beta=0.5)
    part = selection.rows(torch.tensor([2, 0]))
    assert part.router.tolist() == [2, 0] and part.task.tolist() == [7, 5] and part.beta == 0.5
    assert RouteSelection().rows(torch.tensor([0])) == RouteSelection()


def test_a_trace_holds_the_last_forward_only() -> None:
    routers, x = bank([3, 3]), tokens(2)
    trace = RouteTrace()
    with routing(every(0), trace):
        routers(x)
    with routing(every(1), trace):
        gate = routers(x)
    assert list(trace.outputs) == ["block"]
    assert torch.equal(trace.outputs["block"].gate, gate)


def test_recomputation_leaves_the_trace_of_the_forward_alone() -> None:
    routers, x = bank([3, 3]), tokens(2)
    with routing(every(1), trace := RouteTrace()):
        # The square is computed after the bank has answered: a recomputation stops at the last tensor it needs.
        output = checkpoint(lambda x: routers(x).square(), x, use_reentrant=False, context_fn=checkpoint_contexts)
        recorded = trace.outputs["block"]
        output.sum().backward()
    assert trace.outputs["block"] is recorded
