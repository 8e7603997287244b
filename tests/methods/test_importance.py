"""EWC and MAS: importance against a loop in float64, the penalty against its closed form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clmoe.bases.inputs import train_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.data.batches import sample_records
from clmoe.experts.forward import adapted_base
from clmoe.experts.model import load_adapter
from clmoe.methods.base import Method
from clmoe.methods.ewc import STATE
from tests.methods.helpers import begun, task_records
from tests.runs import Runs, same_bits
from tests.support import TASKS, train_batches

METHODS = ("ewc", "mas")
NewBase = Callable[[], LoadedBase]


def importance(checkpoint: Path, kind: str = "importance", task: int = 0) -> dict[str, Tensor]:
    prefix = f"{task}.{kind}."
    state = load_file(checkpoint / STATE)
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def by_hand(method: str, base: LoadedBase, benchmark: Path, checkpoint: Path, samples: int) -> dict[str, Tensor]:
    """transformers' own forward in float64, one record at a time, all positions; ``[name] -> importance``."""
    task = checkpoint.name
    model = load_adapter(base.model, checkpoint, trainable=True).eval().double()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p) for name, p in named.items()}
    records, images = task_records(benchmark, task)
    batches = train_batches(base, train_dataset(base, sample_records(records, samples, 0), images, 2048), 1)
    for batch in batches:
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch.items() if k != "labels"}
        logits = adapted_base(model)(**inputs).logits[0]
        value = torch.zeros((), dtype=torch.float64)
        for position, token in enumerate(batch["labels"][0].tolist()):
            if token != -100:
                before = logits[position - 1]
                value = value + (before.log_softmax(-1)[token] if method == "ewc" else before.square().sum())
        model.zero_grad()
        value.backward()
        for name, p in named.items():
            if p.grad is not None:
                totals[name] += p.grad**2 if method == "ewc" else p.grad.abs()
    return {name: total / len(batches) for name, total in totals.items()}


def assert_importance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.max())
        assert scale > 0, name
        torch.testing.assert_close(found[name].double() / scale, value / scale, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_importance_is_the_mean_of_single_records(method: str, runs: Runs, new_base: NewBase) -> None:
    """Of five, online, decay 0.5: the second task's state is its own importance and half of the first one's."""
    settings = ("options.decay=0.5", "options.weight=0.1", "options.samples=5")
    checkpoints = runs.chain(method, *settings)
    own = [by_hand(method, new_base(), runs.benchmark, checkpoint, 5) for checkpoint in checkpoints]
    expected = [own[0], {name: value + 0.5 * own[0][name] for name, value in own[1].items()}]
    for task, checkpoint in enumerate(checkpoints):
        found = importance(checkpoint, task=task)
        assert len(load_file(checkpoint / STATE)) == 2 * len(found), "nothing of the older task besides"
        assert_importance(found, expected[task])


def penalty(method: Method, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = method.extra_loss(model, None, {})  # type: ignore[arg-type]
    assert loss is not None
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("method", "factor"), [("ewc", 1.0), ("mas", 2.0)])
def test_the_penalty_pulls_as_the_closed_form_says(method: str, factor: float, runs: Runs, new_base: NewBase) -> None:
    """EWC: lambda/2 F (theta - theta*)^2, gradient lambda F (theta - theta*). MAS: without the half."""
    previous = runs.chain(method, tasks=TASKS[:1])[0]
    started, model = begun(method, new_base(), runs, previous, "options.weight=3")
    loss, gradients = penalty(started, model)
    assert float(loss) == 0
    assert all(not gradient.any() for gradient in gradients.values()), "nothing pulls at the anchor itself"
    weights, anchors = importance(previous), importance(previous, "anchor")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    for p in named.values():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    loss, gradients = penalty(started, model)
    assert gradients.keys() == named.keys() == weights.keys()
    expected = 0.0
    for name, p in named.items():
        distance = p.detach().double() - anchors[name].double()
        torch.testing.assert_close(
            gradients[name].double(), factor * 3 * weights[name].double() * distance, rtol=1e-5, atol=0
        )
        expected += float((factor / 2 * 3 * weights[name].double() * distance**2).sum())
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_anchors_of_every_task(runs: Runs, new_base: NewBase) -> None:
    """``per_task``: the first task's importance and weights stay as they were; both pull."""
    first, second = runs.chain("ewc", "options.anchors=per_task", "options.weight=10")
    for kind in ("importance", "anchor"):
        for name, value in importance(first, kind).items():
            assert same_bits(importance(second, kind)[name], value), name
    started, model = begun("ewc", new_base(), runs, second, "options.anchors=per_task", "options.weight=10")
    now, old = importance(second, "anchor", 1), importance(second, "anchor", 0)
    weights = importance(second)
    loss, gradients = penalty(started, model)
    expected = sum(float((weights[n].double() * (now[n].double() - old[n].double()) ** 2).sum()) for n in now)
    assert float(loss) == pytest.approx(10 / 2 * expected, rel=1e-5)
    assert expected > 0
    for name in now:
        torch.testing.assert_close(gradients[name], 10 * weights[name] * (now[name] - old[name]), rtol=1e-4, atol=0)
