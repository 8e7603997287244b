"""torch.compile: one graph per adapted layer, and the same loss and gradients as without."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch._dynamo.utils import counters

from clmoe.bases.llava import LoadedBase
from clmoe.experts.model import adapted_base, expert_layers
from clmoe.experts.routing import RouteSelection, RouteTrace, routing
from tests import support
from tests.experts.adapters import SCOPES, attached, grow

NewBase = Callable[[], LoadedBase]
PAIRS = [("How many things are there?", "two"), ("On which side is it?", "left"), ("Which?", "A")]
SELECTIONS = (
    RouteSelection(),
    RouteSelection(router=torch.tensor([0, 1, 0])),
    RouteSelection(router=torch.ones(3).long()),
)

INDUCTOR = pytest.param(
    "inductor", 2, marks=pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles C++ on a CPU")
)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def grown(base: LoadedBase, scope: str, top_k: int | None = 2) -> PeftModel:
    """Three frozen experts and two trained ones in every block; two routers of different spans."""
    model = attached(base, scope, router_top_k=top_k)
    grow(model)
    return model


def answers(
    layer: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor], selection: RouteSelection
) -> list[Tensor]:
    trace = RouteTrace()
    with routing(selection, trace):
        out = layer(x)
    (routed,) = trace.outputs.values()
    loss = out.square().sum() + routed.gate.square().sum()
    return [out, routed.logits, routed.weights, *torch.autograd.grad(loss, [x, *parameters])]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("backend", "top_k"), [("aot_eager", None), ("aot_eager", 2), INDUCTOR])
def test_a_layer_is_one_graph_with_the_same_gradients_under_every_routing(
    scope: str, backend: str, top_k: int | None, new_base: NewBase
) -> None:
    """The routing changes between calls of one compiled layer, which must notice. In float64; logits are float32."""
    tolerance = 1e-4 if backend == "inductor" else 1e-12  # it rounds the float32 part elsewhere
    layer = next(iter(expert_layers(grown(new_base(), scope, top_k)).values())).double()
    parameters = [p for p in layer.parameters() if p.requires_grad]
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, support.SIZES.text_hidden, dtype=torch.float64, generator=generator, requires_grad=True)
    outputs = []
    for selection in SELECTIONS:
        expected, got = (answers(form, x, parameters, selection) for form in (layer, compiled))
        width = expected[1].shape[-1]  # the compiled form is always as wide as the widest router
        got[1:3] = [tensor[..., :width] for tensor in got[1:3]]
        for theirs, ours in zip(expected, got, strict=True):
            largest = theirs[theirs.isfinite()].abs().max().item()  # logits of experts out of reach are -inf
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * largest)
        outputs.append(got[0])
    assert not torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])
    torch.testing.assert_close(outputs[2], outputs[0])


@pytest.mark.parametrize("scope", SCOPES)
def test_a_model_with_compiled_blocks_trains_alike(scope: str, new_base: NewBase, pristine_base: LoadedBase) -> None:
    batch = support.train_batch(pristine_base, PAIRS)
    results = []
    for compiled in (False, True):
        model = grown(new_base(), scope)
        llava = adapted_base(model).train()
        if compiled:
            for block in llava.get_decoder().layers:
                block.mlp.compile(backend="aot_eager", fullgraph=True)
        with routing(SELECTIONS[1]):
            loss = llava(**batch).loss
        loss.backward()
        results.append(
            {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        )
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert expected is not None, name
        torch.testing.assert_close(results[1][name], expected, rtol=1e-5, atol=1e-7)
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]
