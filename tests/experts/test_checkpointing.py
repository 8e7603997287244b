"""Activation checkpointing of the adapted model: the same loss and gradients, under the routing of its own forward."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from clmoe.experts.forward import adapted_base, answer_states
from clmoe.experts.routing import RouteSelection, RouteTrace, checkpoint_contexts, routing
from tests.experts.adapters import SCOPES, NewBase, attached, grow, routed, same

MIXED, OTHER = routed(1, 0, 1), routed(0, 1, 0)


def gradients(
    model: PeftModel, batch: dict[str, Tensor], selection: RouteSelection, interrupt: bool = False
) -> dict[str, Tensor]:
    """A loss on the answers' states and on the routers alone, and every trainable parameter's gradient.

    ``interrupt``: between forward and backward comes another forward under another routing.
    """
    llava = adapted_base(model).train()
    with routing(selection, trace := RouteTrace()):
        loss = answer_states(llava, batch).square().sum()
    for output in trace.outputs.values():  # of the Switch Transformer's form
        loss = loss + (output.gate.gt(0).float().mean((0, 1)) * output.gate.mean((0, 1))).sum()
    if interrupt:
        with torch.no_grad(), routing(OTHER):
            answer_states(llava, batch)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("grown", [False, True])
def test_checkpointing_changes_no_bit_of_loss_and_gradients(
    scope: str, top_k: int | None, grown: bool, new_base: NewBase, answers: dict[str, Tensor]
) -> None:
    def made() -> PeftModel:
        model = attached(new_base(), scope, router_top_k=top_k)
        if grown:
            grow(model)
        return model

    selection = MIXED if grown else RouteSelection()
    expected = gradients(made(), answers, selection)
    checkpointed, calls = made(), []
    llava = adapted_base(checkpointed)
    llava.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": checkpoint_contexts}
    )
    llava.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(True))
    got = gradients(checkpointed, answers, selection, interrupt=grown)
    assert len(calls) == 2 + grown, "the block is recomputed"
    assert same(expected, got) and len(got) == 1 + 2 * (9 if scope == "per_linear" else 7)
    if grown:
        other = gradients(made(), answers, OTHER)
        assert not any(torch.equal(expected[name], other[name]) for name in expected)
