"""SAME: spectra against the whole covariance, gradients entry by entry in float64, and which experts stand still."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from clmoe.bases.llava import LoadedBase
from clmoe.config import load_config
from clmoe.errors import ClmoeError
from clmoe.experts.config import ExpertConfig
from clmoe.experts.layer import expert_layers
from clmoe.experts.model import load_adapter
from clmoe.experts.routing import NEWEST_ROUTER, RouterOutput, RouteTrace, routing
from clmoe.experts.spectrum import along, leading, router_weights, watch_inputs
from clmoe.methods.same import STATE, Same
from clmoe.train.checkpoint import checked_method
from clmoe.utils.tensors import load_tensors
from tests.methods.helpers import NewBase, begun, task_data
from tests.methods.helpers import watch_inputs as watch_modules
from tests.runs import Runs
from tests.support import TASKS, tiny_config, train_batches

DIN = 6


def covariance(seed: int, rank: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    factors = random.normal(size=(DIN, rank)) * 2.0 ** -np.arange(rank)
    return factors @ factors.T


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_a_wide_enough_sketch_finds_the_covariances_own_directions(share: float) -> None:
    """A covariance of rank 3, seen through 4 columns, gives numpy's eigenvectors, as few as hold the share."""
    C = covariance(0, 3)
    Q = torch.from_numpy(np.random.default_rng(1).normal(size=(DIN, 4)))
    U, S = leading(torch.from_numpy(C) @ Q, Q, share)
    values, vectors = (part[..., ::-1] for part in np.linalg.eigh(C))
    k = int(np.argmax(np.cumsum(values) >= share * values.sum() * (1 - 1e-6))) + 1
    assert U.shape == (DIN, k)
    np.testing.assert_allclose(S, np.sqrt(values[:k]), rtol=1e-4)
    np.testing.assert_allclose(U @ U.t(), vectors[:, :k] @ vectors[:, :k].T, atol=1e-4)


def test_a_sketch_adds_up_over_batches(runs: Runs, new_base: NewBase) -> None:
    """After two batches of a linear's inputs, the spectrum is that of all their tokens; the sketch then forgets them.

    Padding does not count, and neither does a recomputed pass.
    """
    previous = runs.chain("same", tasks=TASKS[:1])[0]
    base = new_base()
    _, model = begun("same", base, runs, previous)
    (name, layer), *_ = expert_layers(model).items()
    sketch, watched = watch_inputs(model, 10_000, 0)[name], watch_modules({name: layer})
    tokens = []
    for batch in train_batches(base, task_data(base, runs.benchmark, TASKS[1], 6), 3):
        real = batch["attention_mask"].bool()
        real[0, -2:] = False
        for trace in (RouteTrace(real=real), None):
            with torch.no_grad(), routing(NEWEST_ROUTER, trace):
                model(**batch)
        tokens.append(watched[name][real].double())
        assert torch.allclose(sketch.energy, watched[name].square().sum(-1))
    U, S = sketch.spectrum(0.9)
    values, vectors = torch.linalg.eigh(torch.cat(tokens).t().cov(correction=0))
    k = len(S)
    torch.testing.assert_close(S.double(), values.flip(0)[:k].sqrt(), rtol=1e-3, atol=0)
    torch.testing.assert_close(
        (U @ U.t()).double(), vectors.flip(1)[:, :k] @ vectors.flip(1)[:, :k].t(), atol=1e-2, rtol=0
    )
    assert not sketch.Y.any() and not sketch.tokens


def test_a_gradient_is_scaled_along_the_spectrum_and_across_it() -> None:
    """The scale is w_i along u_i and ``rest`` across; oracle: direction by direction in a basis that completes U."""
    random = np.random.default_rng(0)
    basis, g, w = np.linalg.qr(random.normal(size=(DIN, DIN)))[0], random.normal(size=(3, DIN)), [0.5, 4.0]
    expected = np.zeros_like(g)
    for i in range(DIN):
        expected += (w[i] if i < 2 else 0.25) * np.outer(g @ basis[:, i], basis[:, i])
    U = torch.from_numpy(basis[:, :2].copy())
    found = along(torch.from_numpy(g), (U, torch.ones(2)), torch.tensor(w, dtype=torch.float64), 0.25)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_routers_weights() -> None:
    """S = 4, 2, 0.5, 0.1 in windows of 3 has means 4, 3, 6.5/3, 2.6/3; inverses over the largest, but at least 0.8."""
    weights = router_weights(torch.tensor([4.0, 2.0, 0.5, 0.1], dtype=torch.float64), 3, 0.2)
    assert weights.tolist() == pytest.approx([0.8, 0.8, 0.8, 1.0])
    plain = router_weights(torch.tensor([1.1, 1.0], dtype=torch.float64), 1, 0.2)
    assert plain.tolist() == pytest.approx([1 / 1.1, 1.0], abs=1e-5)


def test_the_second_tasks_gradients_follow_the_first_ones_spectrum(runs: Runs, new_base: NewBase) -> None:
    """From gradients of ones, A's follow the float64 formula, B's stay, and the router's change from ``start`` on."""
    previous = runs.chain("same", tasks=TASKS[:1])[0]
    settings = ("options.tau=0", "options.start=1", "options.mu=0.5", "adapter.router_top_k=2", "adapter.experts=4")
    base = new_base()
    started, model = begun("same", base, runs, previous, *settings)
    (batch,) = train_batches(base, task_data(base, runs.benchmark, TASKS[1], 4), 4)
    stored = load_tensors(previous / STATE)
    for step in range(2):
        with routing(NEWEST_ROUTER, trace := RouteTrace()), torch.no_grad():
            model(**batch)
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        started.extra_loss(model, trace, batch)
        started._idle = lambda name: torch.zeros(4, dtype=torch.bool)  # type: ignore[attr-defined, method-assign]
        started.change_gradients(model, {}, step)
        for name, layer in expert_layers(model).items():
            (experts,) = layer.experts.values()
            U, S = (stored[f"{kind}.{name}"].double().numpy() for kind in "US")
            one = np.ones(experts.din)
            expected = U @ ((U.T @ one) / (S + 0.5)) + (one - U @ (U.T @ one)) / 0.5
            np.testing.assert_allclose(experts.A.grad[0], expected, rtol=1e-3, atol=1e-4)  # type: ignore[index, union-attr]
            assert (experts.B.grad == 1).all()  # type: ignore[union-attr]
            router = layer.routers.instance[0].weight.grad
            assert (router == 1).all() == (step < 1)


def test_experts_that_cost_more_than_they_are_used_stand_still(runs: Runs, new_base: NewBase) -> None:
    """Of four experts, all but one are used evenly; the second token has the energy. The task's own never freezes."""
    previous = runs.chain("same", tasks=TASKS[:1])[0]
    started, model = begun("same", new_base(), runs, previous, "adapter.experts=4")
    assert isinstance(started, Same)
    name = next(iter(expert_layers(model)))
    gate = torch.tensor([[[0.6, 0.2, 0.1, 0.1], [0.5, 0.1, 0.2, 0.2], [9.0, 9.0, 9.0, 9.0]]])
    energy, mask = torch.tensor([[1.0, 50.0, 7.0]]), torch.tensor([[1, 1, 0]])
    started._sketches[name].energy = energy
    output = RouterOutput(gate, gate, gate)
    started.extra_loss(model, RouteTrace({name: output}), {"attention_mask": mask})
    use = [0.95 / 4 + 0.05 * mean for mean in (0.55, 0.15, 0.15, 0.15)]
    weighed = [(0.6 + 25.0) / 2, (0.2 + 5.0) / 2, (0.1 + 10.0) / 2, (0.1 + 10.0) / 2]
    cost = [0.95 / 4 + 0.05 * value for value in weighed]

    def scaled(values: list[float]) -> list[float]:
        return [(value - min(values)) / (max(values) - min(values)) for value in values]

    scores = [a - b for a, b in zip(scaled(use), scaled(cost), strict=True)]
    expected = [score < 0.1 for score in scores]
    expected[1] = False  # the expert with the second task's number
    assert started._idle(name).tolist() == expected
    assert any(expected) and not all(expected)


def test_training_mixes_all_experts_and_an_answer_keeps_two(runs: Runs, new_base: NewBase) -> None:
    settings = ("adapter.experts=4", "adapter.rank=8", "adapter.router_top_k=2")
    first, second = runs.chain("same", *settings)
    base, used = new_base(), []
    (batch,) = train_batches(base, task_data(base, runs.benchmark, TASKS[1], 4), 4)
    trained = begun("same", base, runs, first, *settings)[1]
    for model in (trained, load_adapter(new_base().model, second, trainable=False)):
        with routing(NEWEST_ROUTER, trace := RouteTrace()), torch.no_grad():
            model(**batch)
        used.append({int(n) for output in trace.outputs.values() for n in (output.gate > 0).sum(-1).flatten()})
    assert used == [{4}, {2}]


def test_the_updates_scale_is_that_of_trainings_dense_gate(tiny_base: LoadedBase) -> None:
    """Four experts share a token in training: with s = 8, their mean gate of 1/4 gives the wanted scale of 2."""
    settings = ("adapter.experts=4", "adapter.rank=8", "adapter.router_top_k=2", "adapter.scale=2")
    method = Same(tiny_config("same", Path("nowhere"), *settings))
    found = cast(ExpertConfig, method.adapter(tiny_base))
    assert (found.scaling, found.router_top_k, method.effective_scale()) == (8, 2, 2)


def test_a_router_for_a_whole_block_is_refused() -> None:
    with pytest.raises(ClmoeError, match=r"adapter\.router_scope"):
        load_config("same", {}, ["adapter.router_scope=per_block"], None, checked_method)
