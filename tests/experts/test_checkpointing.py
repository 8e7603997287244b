"""Activation checkpointing of the adapted model: the same loss and gradients, under the routing of its own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from clmoe.bases.llava import LoadedBase
from clmoe.experts.model import adapted_base
from clmoe.experts.routing import RouteSelection, RouteTrace, routing
from clmoe.methods.base import Method
from clmoe.train.loss import TrainedModel, enable_checkpointing
from tests import support
from tests.experts.adapters import SCOPES, attached, grow

NewBase = Callable[[], LoadedBase]
PAIRS = [("How many things are there?", "two"), ("On which side is it?", "left"), ("Which?", "A")]


class Balance:
    """A loss on the routers alone, of the Switch Transformer's form: ``E * sum_e f_e P_e``, averaged over layers."""

    reads_logits = False

    def extra_loss(self, model: PeftModel, trace: RouteTrace, batch: dict[str, Tensor]) -> Tensor:
        losses = [
            output.gate.shape[-1] * (output.gate.gt(0).float().mean((0, 1)) * output.gate.mean((0, 1))).sum()
            for output in trace.outputs.values()
        ]
        assert len(losses) in (2, 6)
        return torch.stack(losses).mean()


class Plain:
    reads_logits = False

    def extra_loss(self, model: PeftModel, trace: RouteTrace, batch: dict[str, Tensor]) -> None:
        return None


def gradients(model: PeftModel, method: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and every trainable parameter's gradient."""
    trained = TrainedModel(model, cast(Method, method), len(PAIRS)).train()
    loss = trained(**batch, num_items_in_batch=torch.tensor(6.0))["loss"]
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in named.values())
    return {"loss": loss.detach(), **cast(dict[str, Tensor], named)}


@pytest.fixture
def answers(pristine_base: LoadedBase) -> dict[str, Tensor]:
    return support.train_batch(pristine_base, PAIRS)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("grown", [False, True])
def test_checkpointing_changes_no_bit_of_loss_and_gradients(
    scope: str, top_k: int | None, grown: bool, new_base: NewBase, answers: dict[str, Tensor]
) -> None:
    results = []
    for checkpointed in (False, True):
        model = attached(new_base(), scope, router_top_k=top_k)
        if grown:
            grow(model)
        if checkpointed:
            enable_checkpointing(model)
        results.append(gradients(model, Balance(), answers))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_the_balance_loss_has_a_gradient_under_checkpointing(new_base: NewBase, answers: dict[str, Tensor]) -> None:
    results = []
    for method in (Plain(), Balance()):
        model = attached(new_base(), router_top_k=2)
        enable_checkpointing(model)
        results.append(gradients(model, method, answers))
    routers = [name for name in results[0] if "clmoe_routers" in name]
    assert len(routers) == 6
    assert not any(torch.equal(results[0][name], results[1][name]) for name in routers)


def test_checkpointing_does_recompute_the_blocks(new_base: NewBase, answers: dict[str, Tensor]) -> None:
    """Else the comparisons above compare nothing."""
    model = attached(new_base(), "per_block")
    enable_checkpointing(model)
    calls: list[bool] = []
    layer = adapted_base(model).model.language_model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(True))
    gradients(model, Plain(), answers)
    assert len(calls) == 2


@pytest.mark.parametrize("scope", SCOPES)
def test_backward_uses_the_routing_of_its_own_forward(
    scope: str, new_base: NewBase, answers: dict[str, Tensor]
) -> None:
    """Forward under A, another forward without gradient under B, backward of A."""
    inputs = {name: answers[name] for name in ("input_ids", "attention_mask")}
    first, second = (RouteSelection(router=torch.full((3,), router)) for router in (1, 0))

    def run(checkpointed: bool, interrupt: bool, selection: RouteSelection) -> dict[str, Tensor]:
        model = attached(new_base(), scope)
        grow(model)
        llava = adapted_base(model).train()
        if checkpointed:
            enable_checkpointing(model)
        with routing(selection):
            output = llava.model(**inputs, use_cache=False).last_hidden_state
        if interrupt:
            with torch.no_grad(), routing(second):
                llava.model(**inputs, use_cache=False)
        output.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = run(False, False, first)
    got = run(True, True, first)
    assert expected.keys() == got.keys()
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
    other = run(False, False, second)
    assert other.keys() != expected.keys() or not all(torch.equal(expected[name], other[name]) for name in other)
