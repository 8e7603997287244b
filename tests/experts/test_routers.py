"""Gates in closed form, and banks that route the samples of one batch differently."""

import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear

from clmoe.experts.routers import InstanceRouter, RouterBank, TaskRouter, gate_from_logits, router_logits
from clmoe.experts.routing import RouteSelection, RouteTrace, routing

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


@pytest.mark.parametrize("top_k", [3, 4])
def test_top_k_of_all_experts_is_the_dense_gate(top_k: int) -> None:
    logits = torch.randn(4, 3)
    assert torch.equal(gate_from_logits(logits, top_k), logits.softmax(-1))


def test_ties_go_to_the_lower_index() -> None:
    assert torch.equal(gate_from_logits(torch.zeros(64), 2), torch.tensor([0.5, 0.5] + [0.0] * 62))
    gate = gate_from_logits(torch.tensor([1.0, 2.0, 1.0, 2.0, 2.0]), 2)
    assert gate.nonzero().squeeze(1).tolist() == [1, 3]


def test_top_k_gradient_is_that_of_the_kept_softmax_and_finite() -> None:
    logits = torch.tensor([0.3, -1.0, 0.9, 0.1], requires_grad=True)
    gate_from_logits(logits, 2)[2].backward()
    p = math.exp(0.9) / (math.exp(0.9) + math.exp(0.3))
    torch.testing.assert_close(logits.grad, torch.tensor([-p * (1 - p), 0.0, p * (1 - p), 0.0]))


def test_instance_router_works_in_float32_whatever_the_input() -> None:
    router = InstanceRouter(torch.randn(3, DIN), frozen=False)
    x = tokens(2).bfloat16()
    expected = x.float() @ router.weight.T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected)


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


def test_samples_of_one_old_router_see_its_span_only() -> None:
    routers = bank([2, 5])
    with routing(RouteSelection(router=torch.zeros(3, dtype=torch.int64))):
        assert routers(tokens(3)).shape == (3, 5, 2)


def test_without_a_selection_the_newest_router_answers() -> None:
    routers, x = bank([2, 4]), tokens(2)
    expected = (x @ routers.instance[1].weight.T).softmax(-1)
    torch.testing.assert_close(routers(x), expected)
    with routing(RouteSelection()):
        torch.testing.assert_close(routers(x), expected)


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


def test_beta_one_is_the_instance_router_alone_bit_for_bit() -> None:
    routers, x = bank([3]), tokens(2)
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
