"""Routing as data: installed around a forward, restored afterwards, and the same in a recomputation."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from clmoe.experts.routers import RouterBank
from clmoe.experts.routing import RouteSelection, RouteTrace, checkpoint_contexts, current_routing, routing


def two_routers() -> tuple[RouterBank, torch.Tensor]:
    torch.manual_seed(0)
    bank = RouterBank("block", None)
    for _ in range(2):
        bank.append(torch.randn(3, 4))
    return bank, torch.randn(2, 5, 4)


def choose(router: int) -> RouteSelection:
    return RouteSelection(router=torch.full((2,), router))


def test_blocks_nest_and_restore_even_after_an_error() -> None:
    assert current_routing() is None
    outer, inner = choose(0), choose(1)
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
    bank, x = two_routers()
    trace = RouteTrace()
    with routing(choose(0), trace):
        bank(x)
    with routing(choose(1), trace):
        gate = bank(x)
    assert list(trace.outputs) == ["block"]
    assert torch.equal(trace.outputs["block"].gate, gate)


def gradients(bank: RouterBank) -> list[torch.Tensor | None]:
    result = [None if router.weight.grad is None else router.weight.grad.clone() for router in bank.instance]
    bank.zero_grad()
    return result


@pytest.mark.parametrize("first", [0, None])
def test_recomputation_uses_the_routing_of_its_own_forward(first: int | None) -> None:
    bank, x = two_routers()
    x.requires_grad_()
    selection = RouteSelection() if first is None else choose(first)
    other = choose(0 if first is None else 1)
    with routing(selection):
        bank(x).square().sum().backward()
    expected = gradients(bank)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in expected) == 1

    def run() -> torch.Tensor:
        return checkpoint(bank, x, use_reentrant=False, context_fn=checkpoint_contexts)

    if first is None:
        output = run()
    else:
        with routing(selection):
            output = run()
    with torch.no_grad(), routing(other):
        bank(x)
    with routing(other):
        output.square().sum().backward()
    for ours, theirs in zip(gradients(bank), expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


def test_recomputation_leaves_the_trace_of_the_forward_alone() -> None:
    bank, x = two_routers()
    with routing(choose(0), trace := RouteTrace()):
        # The square is computed after the bank has answered: a recomputation stops at the last tensor it needs.
        output = checkpoint(lambda x: bank(x).square(), x, use_reentrant=False, context_fn=checkpoint_contexts)
        recorded = trace.outputs["block"]
        output.sum().backward()
    assert trace.outputs["block"] is recorded
