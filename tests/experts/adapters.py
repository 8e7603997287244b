"""Adapted tiny models for the tests of this folder: random experts, grown by further tasks."""

from __future__ import annotations

import re

import torch
from peft import PeftModel
from torch import Tensor

from clmoe.bases.llava import LoadedBase
from clmoe.experts import model as ours
from clmoe.experts.config import ExpertConfig
from clmoe.experts.routing import RouteSelection, routing
from tests import support

SCOPES = ("per_linear", "per_block")
QUESTIONS = ("How many things are there?", "On which side is it, left or right?", "Which colour?")


def config(scope: str = "per_linear", experts: int = 3, **fields: object) -> ExpertConfig:
    layout = {str(block): [0] * experts for block in range(support.SIZES.text_layers)}
    return ExpertConfig(**{"rank": 2, "scaling": 2.0, "router_scope": scope, "layout": layout, "seed": 7, **fields})  # type: ignore[arg-type]


def randomise(model: PeftModel, seed: int = 0) -> PeftModel:
    """Give every expert a nonzero ``B``, and the tuned projector and task gates values of their own."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if re.search(r"clmoe_experts\..*\.B$|modules_to_save|task\.gates", name):
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return model


def attached(base: LoadedBase, scope: str = "per_linear", **fields: object) -> PeftModel:
    return randomise(ours.attach_adapter(base.model, config(scope, **fields))).eval()


def grow(model: PeftModel, owner: int = 1, count: int = 2) -> None:
    """Freeze what exists, then add random experts and a router spanning all, in every block."""
    ours.freeze_experts(model, owner)
    generator = torch.Generator().manual_seed(owner)
    factors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    weights = {}
    for name, layer in ours.expert_layers(model).items():
        factors[name] = {linear: experts.fresh(count, generator) for linear, experts in layer.experts.items()}
        old = layer.routers.instance[-1].weight
        weights[name] = torch.cat([old, torch.randn(count, old.shape[1], generator=generator)]).detach()
    ours.grow_experts(model, owner, factors)
    ours.add_routers(model, owner, weights)
    randomise(model, owner)


def old_router(rows: int) -> RouteSelection:
    return RouteSelection(router=torch.zeros(rows, dtype=torch.int64))


def logits(model: torch.nn.Module, batch: dict[str, Tensor], selection: RouteSelection | None = None) -> Tensor:
    with torch.no_grad(), routing(selection or RouteSelection()):
        return model(**batch).logits
