"""Where a task needs experts: every step of the probes is checked against numpy or a plain loop."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from clmoe.bases.inputs import train_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.experts.forward import adapted_base
from clmoe.experts.layer import expert_layers
from clmoe.experts.routing import NEWEST_ROUTER, gate_from_logits, routing
from clmoe.methods.base import TaskContext
from clmoe.methods.llava_cmoe import balance_loss
from clmoe.methods.probes import BlockDecision, choose_blocks, decide, extend_router, measure_activations
from clmoe.utils.tensors import same_bits
from tests.experts.adapters import attached, grow
from tests.methods.helpers import task_records, watch_inputs
from tests.support import TASKS, tiny_config, train_batches


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def oracle(values: np.ndarray, probes: int, alpha: float) -> tuple[float, int, float]:
    """The threshold, the number of probes above it and the margin, computed one probe at a time."""
    mean = sum(values) / len(values)
    threshold = mean - alpha * math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    limit = threshold if threshold > 0 else 0.0
    probed = list(values)[len(values) - probes :]
    return threshold, len([v for v in probed if v > limit]), min(abs(v - limit) for v in probed)


@pytest.mark.parametrize("probes", [1, 4, 8])
def test_decision_equals_the_oracle(probes: int) -> None:
    random = np.random.default_rng(probes)
    seen = set()
    for _ in range(60):
        values = random.dirichlet(np.full(8 + probes, 0.6)) * 2
        alpha = float(random.choice([0.3, 0.8, 1.2]))
        decision = decide(torch.from_numpy(values), probes, alpha)
        threshold, extend, margin = oracle(values, probes, alpha)
        assert decision.threshold == pytest.approx(threshold, abs=1e-12)
        assert decision.probed == extend
        assert decision.margin == pytest.approx(margin, abs=1e-12)
        assert (decision.activations, decision.probes) == (values.tolist(), probes)
        assert decision.most_active == int(np.argmax(values))
        seen.add(extend)
    assert len(seen) > 1, "one number only would show little"


@pytest.mark.parametrize(
    ("values", "probes", "alpha", "threshold", "probed"),
    [
        ([0.9, 0.9, 0.1, 0.1], 1, 0.9, 0.14, 0),  # population deviation; the sample's would count the probe
        ([0.25] * 5, 2, 0.8, 0.25, 0),  # exactly on the threshold
        ([1.0, 0.0], 1, 1.0, 0.0, 0),
        ([1.0, 1.0, 0, 0, 0, 0, 0, 0, 0], 1, 0.8, -0.11, 0),  # all tokens use two experts: the floor at 0 stops it
        ([1.0, 1.0, 0, 0, 0, 0, 0, 0, 1e-9], 1, 0.8, -0.11, 1),
    ],
)
def test_decisions_at_the_edge(values: list[float], probes: int, alpha: float, threshold: float, probed: int) -> None:
    decision = decide(torch.tensor(values, dtype=torch.float64), probes, alpha)
    assert decision.threshold == pytest.approx(threshold, abs=1e-2) and decision.probed == probed
    # ties go to the older expert, and a probe can be the most active one
    assert decide(torch.tensor([0.2, 0.7, 0.7, 0.7]), 1, 0.8).most_active == 1
    assert decide(torch.tensor([0.2, 0.7, 0.8]), 1, 0.8).most_active == 2


def decisions(counts: list[int]) -> dict[str, BlockDecision]:
    return {f"block{i}": BlockDecision([0.5] * 9, 8, 0.1, 0.1, count) for i, count in enumerate(counts)}


def test_choose_blocks() -> None:
    counts = [0, 3, 1, 0, 2, 0, 0, 8]
    given = decisions(counts)
    assert choose_blocks(given, "probed", 0) == {f"block{i}": n for i, n in enumerate(counts)}
    assert set(choose_blocks(given, "none", 0).values()) == {0}
    assert list(choose_blocks(given, "every", 0).values()) == [1] * 8
    drawn = [choose_blocks(given, "random", seed) for seed in range(6)]
    for choice in drawn:
        assert choice.keys() == given.keys()
        assert sorted(choice.values()) == sorted(counts)
    assert choose_blocks(given, "random", 3) == drawn[3]
    assert len({tuple(choice.values()) for choice in drawn}) > 1, "the seed decides"
    for where in ("probed", "random", "every", "none"):
        assert choose_blocks({}, where, 0) == {}  # type: ignore[arg-type]


def test_a_router_keeps_its_rows_and_gets_new_ones_of_their_spread() -> None:
    old = torch.nn.Parameter(3.0 + 0.2 * torch.randn(6, 4096, generator=generator(3)))
    longer = extend_router(old, 2, generator(4))
    assert longer.shape == (8, 4096) and not longer.requires_grad
    assert same_bits(longer[:6], old.detach())
    new = longer[6:].numpy()
    assert abs(new.mean()) < 0.01, "N(0, .), whatever the mean of the old rows"
    assert new.std() == pytest.approx(float(old.detach().numpy().std()), rel=0.05)
    assert same_bits(extend_router(old, 2, generator(4)), longer)
    assert not torch.equal(extend_router(old, 2, generator(5))[6:], longer[6:])
    assert same_bits(extend_router(old, 0, generator(4)), old.detach())


def test_balance_loss_is_one_when_balanced_and_e_over_k_when_collapsed() -> None:
    logits = torch.zeros(1, 4, 4)
    gate = torch.zeros(1, 4, 4)
    for token in range(4):
        gate[0, token, [token, (token + 1) % 4]] = 0.5
    mask = torch.ones(1, 4, dtype=torch.int64)
    assert float(balance_loss(logits, gate, mask)) == pytest.approx(1.0)
    logits[..., :2] = 50.0
    assert float(balance_loss(logits, gate_from_logits(logits, 2), mask)) == pytest.approx(2.0)


@pytest.fixture
def measured(tiny_base: LoadedBase, mini_yaml: Path) -> TaskContext:
    """A model whose blocks hold experts of two tasks, and records of unequal length, some without an image."""
    model = attached(tiny_base, "per_block", router_top_k=2, dropout=0.2)
    grow(model)
    model.train()  # as training leaves it; measuring must not use dropout
    records, images = task_records(mini_yaml, TASKS[1], 11)
    config = tiny_config("llava_cmoe", Path("nowhere"), "adapter.train_projector=false", "evaluation.batch_size=4")
    here = Path("unused")
    return TaskContext(TASKS[1], 1, records, images, config, tiny_base, model, here, here, here, None)


@pytest.mark.parametrize("kind", ["frequency", "logit"])
def test_activations_are_what_single_records_say(kind: str, measured: TaskContext) -> None:
    """Oracle: numpy's logits and picks from each block's own input, one record at a time so that nothing is padded."""
    result = measure_activations(measured, measured.records, kind)  # type: ignore[arg-type]
    layers = expert_layers(measured.model.eval())
    inputs = watch_inputs(layers)
    seen: dict[str, list[np.ndarray]] = {name: [] for name in layers}
    dataset = train_dataset(measured.base, measured.records, measured.image_root, 2048)
    for batch in train_batches(measured.base, dataset, 1):
        batch.pop("labels")
        with torch.no_grad(), routing(NEWEST_ROUTER):
            adapted_base(measured.model).model(**batch)
        for name, x in inputs.items():
            weight = layers[name].routers.instance[-1].weight.detach().double().numpy()
            seen[name].append(x[0].double().numpy() @ weight.T)
    assert result.keys() == layers.keys()
    for name, parts in seen.items():
        logits = np.concatenate(parts)
        expected = logits.mean(0)
        if kind == "frequency":
            picks = np.argsort(-logits, axis=1, kind="stable")[:, :2]
            expected = np.bincount(picks.ravel(), minlength=logits.shape[1]) / len(logits)
            assert float(result[name].sum()) == pytest.approx(2.0), "top-2: two experts per token"
        assert result[name].shape == (5,) and result[name].dtype == torch.float64
        np.testing.assert_allclose(result[name].numpy(), expected, atol=1e-5 if kind == "logit" else 1e-9)
