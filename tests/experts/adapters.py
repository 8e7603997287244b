"""Adapted tiny models for the tests in this folder: random experts that further tasks add to."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor

from clmoe.bases.llava import LoadedBase
from clmoe.experts import model as ours
from clmoe.experts.config import ExpertConfig
from clmoe.experts.routing import RouteSelection, routing
from tests import support

NewBase = Callable[[], LoadedBase]
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


def grow(model: PeftModel, owner: int = 1, count: int = 2, block: str = "", routers: bool = True) -> None:
    """Freeze what exists, then add random experts (only in ``block``, if named) and routers that span all experts."""
    ours.freeze_experts(model, owner)
    generator = torch.Generator().manual_seed(owner)
    factors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    weights = {}
    for name, layer in ours.expert_layers(model).items():
        new = count if block in ("", layer.block) else 0
        if new:
            factors[name] = {linear: experts.fresh(new, generator) for linear, experts in layer.experts.items()}
        if routers:
            old = layer.routers.instance[-1].weight
            weights[name] = torch.cat([old, torch.randn(new, old.shape[1], generator=generator)]).detach()
    ours.grow_experts(model, owner, factors)
    if routers:
        ours.add_routers(model, owner, weights)
    randomise(model, owner)


def train_steps(model: PeftModel, batch: dict[str, Tensor], steps: int = 3, lr: float = 0.05) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).logits.square().mean().backward()
        optimizer.step()
    model.eval()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether both hold tensors of equal names, dtypes and bits."""
    equal = (a.dtype == second[name].dtype and torch.equal(a, second[name]) for name, a in first.items())
    return first.keys() == second.keys() and all(equal)


def snapshot(model: PeftModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in ours.adapter_tensors(model).items()}


def row(batch: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    return {name: tensor[number : number + 1] for name, tensor in batch.items()}


def routed(*routers: int) -> RouteSelection:
    return RouteSelection(router=torch.tensor(routers))


def old_router(rows: int) -> RouteSelection:
    return routed(*[0] * rows)


def logits(model: torch.nn.Module, batch: dict[str, Tensor], selection: RouteSelection | None = None) -> Tensor:
    with torch.no_grad(), routing(selection or RouteSelection()):
        return model(**batch).logits
