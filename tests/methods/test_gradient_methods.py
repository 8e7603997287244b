"""A-GEM, RegLoRA, LLaCA and DGG: each rule against another float64 computation of it, and against the files."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from clmoe.config import load_config
from clmoe.experts.forward import adapted_base
from clmoe.experts.layer import experts_by_linear
from clmoe.methods.agem import project
from clmoe.methods.dgg import guide
from clmoe.methods.llaca import Llaca, pace
from clmoe.methods.reglora import STATE, key_elements, key_mean
from clmoe.utils.tensors import load_tensors, trainable
from tests.methods.helpers import NewBase, begun, same_adapter
from tests.runs import Runs, tensors
from tests.support import TASKS, train_batches

FIRST, SECOND = TASKS[:2]


def vectors(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


# ---- A-GEM


@pytest.mark.parametrize("seed", range(4))
def test_agem_is_the_nearest_gradient_that_does_not_raise_the_memorys_loss(seed: int) -> None:
    """Oracle: SLSQP solves eq. 8 without its closed form."""
    g, reference = vectors(seed, (2, 2), (3,)), vectors(seed + 10, (2, 2), (3,))
    before, wanted = flat(g).numpy().copy(), flat(reference).numpy()
    allowed = {"type": "ineq", "fun": lambda x: x @ wanted}
    best = minimize(lambda x: ((x - before) ** 2).sum(), before, constraints=allowed, method="SLSQP", tol=1e-14)
    assert project(g, reference) == (before @ wanted < 0)
    torch.testing.assert_close(flat(g), torch.from_numpy(best.x), rtol=1e-5, atol=1e-6)


def test_agem_leaves_alone_what_no_memory_speaks_against() -> None:
    g = vectors(0, (3,))
    before = g[0].clone()
    assert not project(g, [torch.zeros(3, dtype=torch.float64)])
    assert torch.equal(g[0], before)


@pytest.mark.parametrize("micro", ["null", "3"])
def test_agems_reference_is_the_gradient_of_the_whole_memory(micro: str, runs: Runs, new_base: NewBase) -> None:
    """Oracle: transformers' own loss on five records of the first task in one batch. Our gradient points against it."""
    previous = runs.chain("agem", "options.per_task=5", tasks=TASKS[:1])[0]
    started, model = begun(
        "agem", new_base(), runs, previous, "options.per_task=5", f"training.micro_batch_size={micro}"
    )
    memory: Any = started._memory  # type: ignore[attr-defined]
    assert len(memory) == 5
    (batch,) = train_batches(started._base, memory, 5)  # type: ignore[attr-defined]
    adapted_base(model)(**batch).loss.backward()
    reference = {name: p.grad.clone() for name, p in trainable(model).items()}  # type: ignore[union-attr]
    model.zero_grad()
    g = {name: torch.ones_like(value) - 3 * value for name, value in reference.items()}
    along, length = (flat(list(reference.values())) @ flat(list(other.values())) for other in (g, reference))
    assert along < 0
    expected = {name: value - along / length * reference[name] for name, value in g.items()}
    started.change_gradients(model, g, 0)
    for name, value in expected.items():
        torch.testing.assert_close(g[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert all(p.grad is None for p in trainable(model).values()), "the optimizer's gradients are untouched"


# ---- RegLoRA


def test_key_elements_are_the_largest_entries_of_the_update() -> None:
    A, B = vectors(0, (2, 7), (5, 2))
    entries = sorted(
        ((abs(sum(float(B[i, k] * A[k, j]) for k in range(2))), i * 7 + j) for i in range(5) for j in range(7)),
        reverse=True,
    )
    found = key_elements(A, B, 0.2)
    assert found.tolist() == sorted(place for _, place in entries[:7])
    assert key_elements(A, B, 1e-9).tolist() == [entries[0][1]], "at least one"
    assert float(key_mean(A, B, found.long())) == pytest.approx(sum(size for size, _ in entries[:7]) / 7)


def test_reglora_pulls_at_the_key_elements_of_all_older_tasks(runs: Runs, new_base: NewBase) -> None:
    """Over three tasks, the kept set grows by each update's key elements; the penalty is their mean size, by a loop."""
    settings = ("options.weight=7", "options.top=0.01")
    checkpoints = runs.chain("reglora", *settings, tasks=TASKS)
    for name in load_tensors(checkpoints[0] / STATE):
        kept = [set(load_tensors(checkpoint / STATE)[name].tolist()) for checkpoint in checkpoints]
        assert kept[0] < kept[1] < kept[2]
        linear = name.rpartition(".")[2]
        A, B = (tensors(checkpoints[1])[f"base_model.model.{name}.clmoe_experts.{linear}.{f}"] for f in "AB")
        own = key_elements(A, B, 0.01)
        assert kept[1] == kept[0] | set(own.tolist())
    started, model = begun("reglora", new_base(), runs, checkpoints[1], *settings)
    generator = torch.Generator().manual_seed(0)
    means = []
    for name, experts in experts_by_linear(model).items():
        with torch.no_grad():
            experts.B.copy_(torch.randn(experts.B.shape, generator=generator))  # type: ignore[union-attr, arg-type]
        update = experts.B.detach().double() @ experts.A.detach().double()  # type: ignore[union-attr]
        keys = load_tensors(checkpoints[1] / STATE)[name].tolist()
        means.append(sum(abs(float(update[divmod(key, update.shape[1])])) for key in keys) / len(keys))
    penalty = started.extra_loss(model, None, {})  # type: ignore[arg-type]
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(7 * sum(means) / len(means), rel=1e-5)


def test_reglora_as_released_counts_an_entry_of_two_tasks_twice(runs: Runs) -> None:
    first, second = runs.chain("reglora", "options.variant=released", "options.top=0.3")
    for name, keys in load_tensors(second / STATE).items():
        assert len(keys) == 2 * len(load_tensors(first / STATE)[name]) > len(keys.unique())


# ---- LLaCA


def rule(theta: list[list[float]], gradient: list[list[float]], start: list[float]) -> list[float]:
    """The average of one tensor over its steps, computed entry by entry in Python floats."""
    average, before = list(start), None
    for now, slope in zip(theta, gradient, strict=True):
        alpha = math.inf
        if before is not None:
            moved = sum(abs(a - b) for a, b in zip(now, average, strict=True))
            bent = sum(abs(a - b) for a, b in zip(slope, before, strict=True))
            alpha = 2 * (1 + sum(map(abs, slope))) / (moved * bent)
        alpha = alpha if 0 < alpha < 1 else 0.01
        average = [(1 - alpha) * old + alpha * new for old, new in zip(average, now, strict=True)]
        before = slope
    return average


@pytest.mark.parametrize("variant", ["published", "released"])
@pytest.mark.parametrize("size", [0.001, 0.1])
def test_llaca_averages_as_the_rule_says(
    variant: str, size: float, runs: Runs, new_base: NewBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small moves give no alpha below 1, larger ones do; saving and loading the state in between changes nothing."""
    previous = runs.chain("llaca", tasks=TASKS[:1])[0]
    settings = (f"options.variant={variant}",)
    started, model = begun("llaca", new_base(), runs, previous, *settings)
    for p in model.parameters():
        p.requires_grad_(False)
    name, parameter = next((n, p) for n, p in model.named_parameters() if ".lora_A." in n)
    parameter.requires_grad_(True)
    shape = tuple(parameter.shape)
    start, steps = parameter.detach().double().flatten().tolist(), []
    for step in range(5):
        theta, gradient = (size * part.float() for part in vectors(step, shape, shape))
        parameter.data.copy_(theta)
        parameter.grad = gradient
        started.after_step(model, step)
        steps.append((theta.double().flatten().tolist(), gradient.double().flatten().tolist()))
        if step == 2:
            state = {key: value.clone() for key, value in started.state().items() if key.endswith(name)}
            resumed, _ = begun("llaca", new_base(), runs, previous, *settings)
            assert isinstance(resumed, Llaca) and isinstance(started, Llaca)
            resumed._average, resumed._before = {}, {}
            resumed.load_state(state)
            started = resumed
    started.finish(model)
    first = start if variant == "published" else steps[0][0]
    expected = torch.tensor(rule([t for t, _ in steps], [g for _, g in steps], first))
    torch.testing.assert_close(parameter.detach().flatten(), expected, rtol=1e-4, atol=1e-6)


def test_llacas_pace_has_both_branches() -> None:
    theta, average, gradient, before = (torch.full((1,), value) for value in (10.0, 0.0, 3.0, 1.0))
    given, fallback = (theta, average, gradient), pytest.approx(0.01)
    assert float(pace(*given, before, 0.01)) == pytest.approx(2 * (1 + 3) / (10 * 2))
    assert float(pace(*given, None, 0.01)) == float(pace(theta, theta, gradient, before, 0.01)) == fallback


@pytest.mark.parametrize("variant", ["published", "released"])
def test_llaca_continues_on_the_weights_device(variant: str) -> None:
    """States are loaded on the CPU; the meta device stands for a GPU."""
    method = Llaca(load_config("llaca", {}, [f"options.variant={variant}"]))
    model, base = nn.Linear(2, 2, device="meta"), SimpleNamespace(device=torch.device("meta"))
    method.begin_task(cast(Any, SimpleNamespace(previous=Path("there"), base=base, model=model)))
    method.load_state({f"{kind}.weight": torch.ones(2, 2) for kind in ("average", "gradient")})
    assert {tensor.device.type for tensor in method.state().values()} == {"meta"}


def test_llaca_averages_from_the_second_task_on(runs: Runs) -> None:
    averaged, plain = runs.chain("llaca"), runs.chain("lora")
    assert [same_adapter(*pair) for pair in zip(averaged, plain, strict=True)] == [True, False]


# ---- DGG


@pytest.mark.parametrize("far", [0.1, 100.0])
def test_dggs_guidance_is_the_way_from_the_optimum_and_never_longer_than_the_gradient(far: float) -> None:
    g, away = vectors(0, (2, 3), (4,)), [far * part for part in vectors(1, (2, 3), (4,))]
    before, way = flat(g).tolist(), flat(away).tolist()
    lengths = [math.sqrt(sum(x * x for x in vector)) for vector in (before, way)]
    guide(g, away)
    shortened = min(1.0, lengths[0] / lengths[1])
    assert flat(g).tolist() == pytest.approx([a + shortened * b for a, b in zip(before, way, strict=True)])


def test_dgg_guides_a_share_of_the_steps(runs: Runs, new_base: NewBase) -> None:
    """The same steps are guided each time, and nothing changes at the old optimum itself."""
    previous = runs.chain("dgg", "options.per_task=5", tasks=TASKS[:1])[0]
    started, model = begun("dgg", new_base(), runs, previous, "options.alpha=0.3")
    at_optimum = {name: torch.ones_like(p) for name, p in trainable(model).items()}
    for step in range(20):
        started.change_gradients(model, at_optimum, step)
    assert all((gradient == 1).all() for gradient in at_optimum.values())
    with torch.no_grad():
        for p in trainable(model).values():
            p += 0.5
    changed = []
    for _ in range(2):
        changed.append([])
        for step in range(200):
            gradients = {name: torch.ones_like(p) for name, p in trainable(model).items()}
            started.change_gradients(model, gradients, step)
            values = {float(value) for gradient in gradients.values() for value in gradient.unique()}
            assert values in ({1.0}, {1.5})
            changed[-1].append(values == {1.5})
    assert changed[0] == changed[1]
    assert sum(changed[0]) / 200 == pytest.approx(0.3, abs=0.1)


def test_dgg_without_guidance_is_replay(runs: Runs) -> None:
    mine, plain = ("options.per_task=5", "options.alpha=0"), ("options.per_task=5",)
    for one, other in zip(runs.chain("dgg", *mine), runs.chain("replay", *plain), strict=True):
        assert same_adapter(one, other)
    assert not same_adapter(runs.chain("dgg", "options.per_task=5", "options.alpha=1")[1], runs.chain("dgg", *mine)[1])
