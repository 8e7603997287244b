"""torch.compile: one graph per adapted layer, and the same outputs and gradients as without it."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clmoe.experts.layer import expert_layers
from clmoe.experts.routing import RouteSelection, RouteTrace, routing
from tests import support
from tests.experts.adapters import SCOPES, NewBase, attached, grow, routed

pytestmark = [pytest.mark.slow, pytest.mark.compiled]

SELECTIONS = (RouteSelection(), routed(0, 1, 0), routed(1, 1, 1))
INDUCTOR = pytest.param(
    "inductor", 2, marks=pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles C++ on a CPU")
)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def results(
    layer: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor], selection: RouteSelection
) -> list[Tensor]:
    with routing(selection, trace := RouteTrace()):
        out = layer(x)
    (routed,) = trace.outputs.values()
    loss = out.square().sum() + routed.gate.square().sum()
    return [out, routed.logits, routed.weights, *torch.autograd.grad(loss, [x, *parameters])]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("backend", "top_k"), [("aot_eager", None), ("aot_eager", 2), INDUCTOR])
def test_a_layer_is_one_graph_with_the_same_gradients_under_every_routing(
    scope: str, backend: str, top_k: int | None, new_base: NewBase
) -> None:
    """The routing changes between calls of one compiled layer, which must notice. In float64, with float32 logits."""
    tolerance = 1e-4 if backend == "inductor" else 1e-12  # inductor rounds the float32 part at other places
    model = attached(new_base(), scope, router_top_k=top_k)
    grow(model)
    layer = next(iter(expert_layers(model).values())).double()
    parameters = [p for p in layer.parameters() if p.requires_grad]
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, support.SIZES.text_hidden, dtype=torch.float64, generator=generator, requires_grad=True)
    outputs = []
    for selection in SELECTIONS:
        expected, got = (results(form, x, parameters, selection) for form in (layer, compiled))
        width = expected[1].shape[-1]  # the compiled form is always as wide as the widest router
        got[1:3] = [tensor[..., :width] for tensor in got[1:3]]
        for theirs, ours in zip(expected, got, strict=True):
            largest = theirs[theirs.isfinite()].abs().max().item()  # logits of experts out of reach are -inf
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * largest)
        outputs.append(got[0])
    assert not torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])
    torch.testing.assert_close(outputs[2], outputs[0])


def test_a_compiled_layer_picks_the_same_parts(new_base: NewBase) -> None:
    model = attached(new_base(), experts=1, router_owners=[], pick="task")
    grow(model, routers=False)
    layer = next(iter(expert_layers(model).values()))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 7, support.SIZES.text_hidden)
    for selection in (routed(1, 0, 1), RouteSelection(), routed(0, 1, 0)):
        with routing(selection):
            torch.testing.assert_close(compiled(x), layer(x))
