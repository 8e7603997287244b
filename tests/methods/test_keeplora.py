"""KeepLoRA: directions against float64 eigenvectors, gradients against transformers' own loss, and its promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from clmoe.bases.llava import LoadedBase, decoder_layers
from clmoe.config import load_config
from clmoe.errors import ClmoeError
from clmoe.experts.forward import adapted_base
from clmoe.experts.layer import expert_layers, experts_by_linear
from clmoe.methods import frozen_gradients
from clmoe.methods.frozen_gradients import weight
from clmoe.methods.keeplora import STATE, extended, free_directions, principal
from clmoe.train.checkpoint import checked_method
from clmoe.utils.tensors import load_tensors
from tests.methods.helpers import NewBase, begun, task_data
from tests.runs import Runs, tensors
from tests.support import TASKS, train_batches

TOP, DIN, DOUT = 3, 8, 6


def matrices(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random gradient ``[6, 8]`` and two orthonormal rows ``[2, 8]``."""
    random = np.random.default_rng(seed)
    return random.normal(size=(DOUT, DIN)), np.linalg.qr(random.normal(size=(DIN, 2)))[0].T


def eigenvectors(G: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors (as rows) of the covariance of ``G`` outside ``keep``, largest first."""
    rest = G @ (np.eye(DIN) - keep.T @ keep)
    values, vectors = np.linalg.eigh(rest.T @ rest)
    return values[::-1], vectors[:, ::-1].T


def projector(rows: np.ndarray | Tensor) -> np.ndarray:
    """The projector onto the rows, which does not depend on their signs."""
    rows = np.asarray(rows)
    return rows.T @ rows


@pytest.mark.parametrize("seed", range(3))
def test_new_directions_are_the_largest_outside_the_kept_ones(seed: int) -> None:
    G, U = matrices(seed)
    A = free_directions(torch.from_numpy(G), torch.from_numpy(U), TOP)
    np.testing.assert_allclose(projector(A), projector(eigenvectors(G, U)[1][:TOP]), atol=1e-10)
    full = torch.eye(DIN, dtype=torch.float64)[: DIN - 1]
    only = free_directions(torch.from_numpy(G), full, TOP)
    np.testing.assert_allclose(projector(only), np.diag([0.0] * (DIN - 1) + [1.0]), atol=1e-10)
    assert not only[1:].any(), "there is one direction left"


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99])
def test_kept_directions_grow_until_they_hold_the_energy(energy: float) -> None:
    """Oracle: directions are added one by one until the projection of G keeps the energy."""
    G, U = matrices(0)
    basis = U
    for vector in eigenvectors(G, U)[1]:
        if np.square(G @ projector(basis)).sum() >= energy * np.square(G).sum():
            break
        basis = np.vstack([basis, vector])
    found = extended(torch.from_numpy(U), torch.from_numpy(G), energy)
    assert len(found) == len(basis) > 0
    np.testing.assert_allclose(projector(found), projector(basis), atol=1e-10)
    W = torch.from_numpy(G)
    held = [np.square(G @ projector(principal(W, energy)[:k])).sum() / np.square(G).sum() for k in (None, -1)]
    assert held[0] >= energy > held[1], "as few as possible"


def by_hand(base: LoadedBase, runs: Runs, model: torch.nn.Module, task: str, share: float) -> dict[str, Tensor]:
    """The mean gradient of transformers' own loss at the frozen weights, record by record and all layers at once."""
    layers = expert_layers(model)
    for layer in layers.values():
        weight(layer).requires_grad_(True)
    data = task_data(base, runs.benchmark, task)
    rows = np.linspace(0, len(data) - 1, int(share * len(data))).astype(int)
    batches = train_batches(base, data, 1)
    for row in rows:
        adapted_base(model)(**batches[row]).loss.backward()  # type: ignore[arg-type]
    found = {name: weight(layer).grad / len(rows) for name, layer in layers.items()}  # type: ignore[operator]
    for layer in layers.values():
        weight(layer).requires_grad_(False)
    model.zero_grad()
    return found


SETTINGS = (
    "options.blocks_per_pass=1", "options.gradient_share=0.5", "options.gradient_energy=0.6", "adapter.rank=4",
    "options.weight_energy=0.3",
)  # fmt: skip


def test_a_task_starts_in_the_free_directions_of_its_gradient_and_stays_there(
    runs: Runs, new_base: NewBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks, one at a time. What the second task adds to a weight has no part in the kept directions."""
    first, second = runs.chain("keeplora", *SETTINGS)
    kept = load_tensors(first / STATE)
    asked: list[int] = []
    real = frozen_gradients.loss_gradients
    monkeypatch.setattr(frozen_gradients, "loss_gradients", lambda *a: asked.append(len(a[4])) or real(*a))
    base = new_base()
    records, same_cut = task_data(base, runs.benchmark, TASKS[1]).rows, "training.batch_size=8"
    _, model = begun("keeplora", base, runs, first, *SETTINGS, same_cut, records=records)
    assert asked == [3, 3], "a block's three gradients at a time"
    gradients = by_hand(base, runs, model, TASKS[1], 0.5)
    for name, experts in experts_by_linear(model).items():
        A = experts.A.detach()  # type: ignore[union-attr]
        expected = free_directions(gradients[name].double(), kept[name].double(), 4)
        np.testing.assert_allclose(projector(A), projector(expected), atol=2e-3)
        saved = tensors(second)
        prefix = f"base_model.model.{name}.clmoe_experts.{name.rpartition('.')[2]}"
        assert torch.equal(saved[f"{prefix}.A"], A), "it did not train"
        update = saved[f"{prefix}.B"] @ saved[f"{prefix}.A"]
        assert update.norm() > 1e-3
        assert (update @ kept[name].t()).norm() < 1e-5 * update.norm() * len(kept[name])


def test_recomputed_activations_change_no_direction_and_dropout_stays_off(runs: Runs, new_base: NewBase) -> None:
    """A base that trains with recomputed activations in little memory gets its gradients in little memory, too."""
    first = runs.chain("keeplora", *SETTINGS, tasks=TASKS[:1])[0]
    found, passes = [], []
    for recompute in ("false", "true"):
        base, seen = new_base(), list[int]()
        last_mlp = decoder_layers(base.model)[-1].mlp
        last_mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))  # type: ignore[operator]
        records = task_data(base, runs.benchmark, TASKS[1]).rows
        settings = (*SETTINGS, "adapter.dropout=0.5", f"training.gradient_checkpointing={recompute}")
        _, model = begun("keeplora", base, runs, first, *settings, records=records)
        found.append({name: experts.A.detach().clone() for name, experts in experts_by_linear(model).items()})  # type: ignore[operator, union-attr]
        passes.append(len(seen))
        assert not any(module.training for module in model.modules())
    assert passes[1] == 2 * passes[0], "each block ran again in the backward pass"
    for name, A in found[0].items():
        assert torch.equal(found[1][name], A)


def test_kept_directions_are_orthonormal_and_never_leave(runs: Runs, tiny_base: LoadedBase) -> None:
    before, after = (load_tensors(run / STATE) for run in runs.chain("keeplora", *SETTINGS))
    names = dict(tiny_base.model.named_modules())
    for name, U in after.items():
        torch.testing.assert_close(U @ U.t(), torch.eye(len(U)), atol=1e-4, rtol=0)
        assert torch.equal(U[: len(before[name])], before[name])
        own = principal(names[name].weight.detach(), 0.3)  # type: ignore[operator, union-attr, arg-type]
        torch.testing.assert_close(before[name][: len(own)], own)
        assert len(own) < len(before[name])


@pytest.mark.slow
def test_as_released_one_direction_fewer_of_the_weights_is_kept(runs: Runs, tiny_base: LoadedBase) -> None:
    """Oracle: numpy's singular vectors before the one that reaches the energy."""
    state = load_tensors(runs.chain("keeplora", "options.variant=released", *SETTINGS, tasks=TASKS[:1])[0] / STATE)
    names = dict(tiny_base.model.named_modules())
    for name, U in state.items():
        W = names[name].weight.detach().double().numpy()  # type: ignore[operator, union-attr]
        _, S, V = np.linalg.svd(W)
        before = int(np.argmax(np.cumsum(S**2) >= 0.3 * np.square(S).sum()))
        np.testing.assert_allclose(projector(U[:before]), projector(V[:before]), atol=1e-4)
        assert before > 0 and abs(V[before] @ U[before].numpy()) < 0.99


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantised_base_is_refused(bits: str) -> None:
    with pytest.raises(ClmoeError, match=f"{bits}=false"):
        load_config("keeplora", {}, [f"model.{bits}=true"], None, checked_method)
