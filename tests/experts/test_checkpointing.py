"""Activation checkpointing of the adapted model: the same loss and gradients, under the routing of its own forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from clmoe.bases.llava import LoadedBase
from clmoe.experts.forward import answer_states
from clmoe.experts.model import adapted_base
from clmoe.experts.routing import RouteSelection, RouteTrace, checkpoint_contexts, routing
from tests import support
from tests.experts.adapters import SCOPES, attached, grow

NewBase = Callable[[], LoadedBase]
MIXED, OTHER = (RouteSelection(router=torch.tensor(rows)) for rows in ([1, 0, 1], [0, 1, 0]))


def prepared(
    base: LoadedBase, checkpointed: bool, scope: str, top_k: int | None = None, grown: bool = True
) -> PeftModel:
    model = attached(base, scope, router_top_k=top_k)
    if grown:
        grow(model)
    if checkpointed:
        adapted_base(model).activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": checkpoint_contexts}
        )
    return model


def gradients(
    model: PeftModel, batch: dict[str, Tensor], selection: RouteSelection, balance: float = 1.0, interrupt: bool = False
) -> dict[str, Tensor]:
    """A loss on the answers' states and on the routers alone, and every trainable parameter's gradient.

    ``interrupt``: between forward and backward comes another forward under another routing.
    """
    llava = adapted_base(model).train()
    with routing(selection, trace := RouteTrace()):
        loss = answer_states(llava, batch).square().sum()
    for output in trace.outputs.values():  # of the Switch Transformer's form
        loss = loss + balance * (output.gate.gt(0).float().mean((0, 1)) * output.gate.mean((0, 1))).sum()
    if interrupt:
        with torch.no_grad(), routing(OTHER):
            answer_states(llava, batch)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def answers(pristine_base: LoadedBase) -> dict[str, Tensor]:
    pairs = [("How many things are there?", "two"), ("On which side is it?", "left"), ("Which?", "A")]
    return support.train_batch(pristine_base, pairs)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("grown", [False, True])
def test_checkpointing_changes_no_bit_of_loss_and_gradients(
    scope: str, top_k: int | None, grown: bool, new_base: NewBase, answers: dict[str, Tensor]
) -> None:
    selection = MIXED if grown else RouteSelection()
    expected = gradients(prepared(new_base(), False, scope, top_k, grown), answers, selection)
    got = gradients(prepared(new_base(), True, scope, top_k, grown), answers, selection, interrupt=grown)
    assert expected.keys() == got.keys() and len(got) == 1 + 2 * (9 if scope == "per_linear" else 7)
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
    if grown:
        other = gradients(prepared(new_base(), False, scope, top_k), answers, OTHER)
        assert not any(torch.equal(expected[name], other[name]) for name in expected)


def test_losses_on_the_routers_have_gradients_and_blocks_are_recomputed(
    new_base: NewBase, answers: dict[str, Tensor]
) -> None:
    """Else the comparison above compares nothing."""
    calls: list[bool] = []
    results = []
    for balance in (0.0, 1.0):
        model = prepared(new_base(), True, "per_block", 2)
        layer = adapted_base(model).get_decoder().layers[0].mlp
        layer.register_forward_pre_hook(lambda *_: calls.append(True))
        results.append(gradients(model, answers, MIXED, balance))
    assert len(calls) == 4
    routers = [name for name in results[0] if "clmoe_routers" in name]
    assert len(routers) == 2 and not any(torch.equal(results[0][name], results[1][name]) for name in routers)
