"""LwF's distillation against a hand computation in float64, with the parent as a model of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clmoe.bases.llava import LoadedBase
from clmoe.experts.forward import adapted_base
from clmoe.experts.model import load_adapter
from clmoe.methods.base import Method
from clmoe.methods.lwf import divergence
from clmoe.train.loop import TrainedModel, enable_checkpointing
from tests.methods.helpers import begun, task_data
from tests.runs import Runs, same_bits
from tests.support import TASKS, tiny_config, train_batches

NewBase = Callable[[], LoadedBase]


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    raised = np.exp(logits / temperature)
    return raised / raised.sum(-1, keepdims=True)


def kl(before: np.ndarray, now: np.ndarray, temperature: float) -> float:
    """One token: ``sum_v p_v log(p_v / q_v)``, in float64."""
    p, q = softmax(before, temperature), softmax(now, temperature)
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


def test_the_divergence_of_three_tokens() -> None:
    before = torch.tensor([[1.0, 0.0, -1.0], [2.0, 2.0, 2.0], [5.0, 0.0, 0.0]])
    now = torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0], [0.0, 5.0, 0.0]])
    for temperature in (1.0, 2.0):
        found = divergence(before, now, temperature)
        expected = [kl(b, n, temperature) for b, n in zip(before.double().numpy(), now.double().numpy(), strict=True)]
        assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert expected[1] == 0 and expected[0] > 0


def answers(model: torch.nn.Module, batch: dict[str, Tensor]) -> list[np.ndarray]:
    """transformers' own logits before each token of the answers of one record, float64."""
    with torch.no_grad():
        logits = adapted_base(model)(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]  # type: ignore[arg-type]
    return [
        logits[position - 1].double().numpy()
        for position, token in enumerate(batch["labels"][0].tolist())
        if token != -100
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_holds_the_distillation_however_the_batch_is_cut(
    checkpointing: bool, runs: Runs, new_base: NewBase
) -> None:
    """Also with dropout: the parent has none. Records differ in length and turns; some hold no image."""
    previous = runs.chain("lwf", tasks=TASKS[:1])[0]
    base = new_base()
    method, model = begun("lwf", base, runs, previous, "options.weight=0.7")
    dataset = task_data(base, runs.benchmark, TASKS[2], 6)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    size = sum(p.numel() for p in model.parameters())
    trained = TrainedModel(model, method, 6).train()
    plain = TrainedModel(model, Method(tiny_config("lora", Path("nowhere"))), 6).train()
    if checkpointing:
        enable_checkpointing(model)
    (whole,) = train_batches(base, dataset, 6)
    count = (whole["labels"] != -100).sum()
    loss = trained(**whole, num_items_in_batch=count)["loss"]
    difference = loss - plain(**whole, num_items_in_batch=count)["loss"]
    singles = train_batches(base, dataset, 1)
    cut = sum(float(trained(**one, num_items_in_batch=count)["loss"].detach()) for one in singles)

    parent = load_adapter(new_base().model, previous, trainable=False).eval()
    model.eval()
    expected = 0.0
    for one in singles:
        pairs = list(zip(answers(parent, one), answers(model, one), strict=True))
        expected += 0.7 * sum(kl(old, new, 2.0) for old, new in pairs) / len(pairs) / 6
    assert expected > 1e-3
    assert float(difference.detach()) == pytest.approx(expected, rel=1e-3)
    assert cut == pytest.approx(float(loss.detach()), rel=1e-5)

    loss.backward()
    for name, p in model.named_parameters():
        assert same_bits(p.detach(), before[name]), "the parent's tensors were there for one pass only"
        assert (p.grad is not None) == p.requires_grad
    assert sum(p.numel() for p in model.parameters()) == size, "one base, one adapter"


def test_the_parent_has_no_dropout(runs: Runs, new_base: NewBase) -> None:
    settings = ("adapter.dropout=0.3",)
    previous = runs.chain("lwf", *settings, tasks=TASKS[:1])[0]
    base = new_base()
    method, model = begun("lwf", base, runs, previous, *settings)
    (batch,) = train_batches(base, task_data(base, runs.benchmark, TASKS[1], 4), 4)
    count = (batch["labels"] != -100).sum()
    given = {**batch, "logits": torch.zeros(int(count), base.model.config.text_config.vocab_size)}
    pulls = []
    for mode in (True, False):
        pulls.append(float(method.extra_loss(model.train(mode), None, given)))  # type: ignore[arg-type]
        assert model.training == mode, "the mode is put back"
    assert pulls[0] == pulls[1] > 0
