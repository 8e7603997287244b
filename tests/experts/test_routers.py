"""Gates in closed form, banks that route the samples of one batch differently, and routing as data."""

import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from clmoe.experts.routing import (
    InstanceRouter,
    RouterBank,
    RouterLogits,
    RouteSelection,
    RouteTrace,
    checkpoint_contexts,
    current_routing,
    gate_from_logits,
    routing,
)
from tests.experts.adapters import routed

DIN = 6


def bank(spans: list[int], top_k: int | None = None) -> RouterBank:
    """A bank of random routers, all but the newest frozen."""
    torch.manual_seed(0)
    routers = RouterBank("block", top_k)
    for span in spans:
        for router in routers.instance:
            router.freeze()
        routers.instance.append(InstanceRouter(torch.randn(span, DIN)))
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
        logits = RouterLogits.apply(x, weight)
    assert sorted(kept) == sorted([x.data_ptr(), weight.data_ptr()])
    expected = linear(x.float(), weight)
    assert logits.dtype == torch.float32 and torch.equal(logits, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(InstanceRouter(weight.detach())(x), expected)
    found, wanted = (torch.autograd.grad(answer, (x, weight), upstream) for answer in (logits, expected))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("logits", "top_k", "expected"),
    [
        ([0.0, math.log(2), math.log(5)], None, [1 / 8, 2 / 8, 5 / 8]),
        ([0.0, math.log(2), math.log(5)], 4, [1 / 8, 2 / 8, 5 / 8]),
        ([math.log(3), -9.0, math.log(7), math.log(2)], 2, [0.3, 0.0, 0.7, 0.0]),
        ([0.0] * 64, 2, [0.5, 0.5] + [0.0] * 62),  # ties go to the lower index
        ([1.0, 2.0, 1.0, 2.0, 2.0], 2, [0.0, 0.5, 0.0, 0.5, 0.0]),
    ],
)
def test_gates_in_closed_form(logits: list[float], top_k: int | None, expected: list[float]) -> None:
    gate = gate_from_logits(torch.tensor(logits), top_k)
    torch.testing.assert_close(gate, torch.tensor(expected))
    assert gate.ne(0).tolist() == [value != 0 for value in expected]


def test_top_k_gradient_is_that_of_the_kept_softmax_and_finite() -> None:
    logits = torch.tensor([0.3, -1.0, 0.9, 0.1], requires_grad=True)
    gate_from_logits(logits, 2)[2].backward()
    p = math.exp(0.9) / (math.exp(0.9) + math.exp(0.3))
    torch.testing.assert_close(logits.grad, torch.tensor([-p * (1 - p), 0.0, p * (1 - p), 0.0]))


def test_fresh_router_is_within_its_bound_and_seeded() -> None:
    weight, again = (InstanceRouter.fresh(400, 50, torch.Generator().manual_seed(3)).weight for _ in range(2))
    assert weight.shape == (50, 400) and torch.equal(weight, again)
    assert weight.abs().max() <= 1 / 20 and weight.abs().mean().item() == pytest.approx(1 / 40, rel=0.02)


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_mixed_batch_equals_its_samples_one_by_one(top_k: int | None) -> None:
    routers, x = bank([2, 5, 3], top_k), tokens(6)
    newest = gate_from_logits(x @ routers.instance[2].weight.T, top_k)
    torch.testing.assert_close(routers(x), newest)
    with routing(RouteSelection()):
        torch.testing.assert_close(routers(x), newest)
    index = (0, 2, 1, 0, 2, 1)
    with routing(routed(*index), trace := RouteTrace()):
        gate = routers(x)
    assert gate.shape == (6, 5, 5)
    for row, router in enumerate(index):
        weight = routers.instance[router].weight
        span = len(weight)
        with routing(routed(router)):
            alone = routers(x[row : row + 1])
        assert alone.shape[-1] == span
        torch.testing.assert_close(gate[row, :, :span], alone[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(alone[0], gate_from_logits(x[row] @ weight.T, top_k), rtol=0, atol=1e-6)
        assert not gate[row, :, span:].any()
        assert torch.isneginf(trace.outputs["block"].logits[row, :, span:]).all()


def test_the_gradient_of_a_mixed_batch_reaches_the_trainable_router_from_its_rows_only() -> None:
    routers, x = bank([2, 3]), tokens(4)
    weights, gradients = torch.randn(4, 5, 3), []
    for selection, rows in ((routed(1, 0, 0, 1), [0, 1, 2, 3]), (routed(1, 1), [0, 3])):
        routers.zero_grad()
        with routing(selection):
            (routers(x[rows]) * weights[rows]).sum().backward()
        gradients.append(routers.instance[1].weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.8])
def test_task_gates_are_mixed_in_with_weight_one_minus_beta(beta: float) -> None:
    routers, x = bank([3]), tokens(2)
    routers.task.append(torch.tensor([0.2, 0.3, 0.5]))
    routers.task.append(torch.tensor([1.0, 0.0, 0.0]))
    instance = (x @ routers.instance[0].weight.T).softmax(-1)
    with routing(RouteSelection(task=torch.tensor([1, 0]), beta=beta), trace := RouteTrace()):
        gate = routers(x)
    for row, task in enumerate((1, 0)):
        expected = beta * instance[row] + (1 - beta) * routers.task.gates[task]
        torch.testing.assert_close(gate[row], expected)
    torch.testing.assert_close(trace.outputs["block"].gate, instance)
    with routing(RouteSelection(task=torch.tensor([0, 0]), beta=1.0)):
        alone = routers(x)
    assert torch.equal(alone, routers(x))
    assert "task.gates" in routers.state_dict()


def test_rows_select_the_router_and_the_task_of_each_sample() -> None:
    whole = RouteSelection(torch.tensor([5, 6, 7]), torch.tensor([2, 1, 0]), 0.3)
    chosen = whole.rows(torch.tensor([2, 0, 2]))
    assert (chosen.router.tolist(), chosen.task.tolist(), chosen.beta) == ([7, 5, 7], [0, 2, 0], 0.3)
    assert RouteSelection(beta=0.3).rows(torch.tensor([1])) == RouteSelection(beta=0.3)
    shares = RouteSelection(weights=torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.25, 0.75]]))
    assert shares.rows(torch.tensor([1])).weights.tolist() == [[1.0, 0.0]]
    first, second, third = shares.keys(3)
    assert first == third != second


def test_blocks_nest_and_restore_even_after_an_error() -> None:
    assert current_routing() is None
    outer, inner = routed(0, 0), routed(1, 1)
    with routing(outer):
        with pytest.raises(ValueError), routing(inner):
            assert current_routing()[0] is inner
            raise ValueError
        assert current_routing()[0] is outer
    assert current_routing() is None


def test_a_trace_holds_the_last_forward_only_and_no_recomputation() -> None:
    routers, x = bank([3, 3]), tokens(2)
    trace = RouteTrace()
    with routing(routed(0, 0), trace):
        routers(x)
    with routing(routed(1, 1), trace):
        # The square comes after the bank because a recomputation stops at the last tensor that it needs.
        output = checkpoint(lambda x: routers(x).square(), x, use_reentrant=False, context_fn=checkpoint_contexts)
        recorded = trace.outputs["block"]
        output.sum().backward()
    assert list(trace.outputs) == ["block"] and trace.outputs["block"] is recorded
    torch.testing.assert_close(recorded.gate.square(), output)
