"""EWC, MAS, LwF and O-LoRA: float64 importance, distillation and overlaps by hand, and what they do to a loss."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clmoe.bases.inputs import train_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.data.batches import sample_records
from clmoe.experts.forward import adapted_base, enable_checkpointing
from clmoe.experts.model import load_adapter
from clmoe.methods import method_class
from clmoe.methods.base import Method
from clmoe.methods.importance import STATE
from clmoe.train.loop import TrainedModel
from clmoe.utils.tensors import same_bits
from tests.methods.helpers import NewBase, begun, same_adapter, task_data, task_records
from tests.runs import Runs, tensors
from tests.support import TASKS, prompt_batch, tiny_config, train_batches

# ---- EWC and MAS


METHODS = ("ewc", "mas")


def importance(checkpoint: Path, kind: str = "importance", task: int = 0) -> dict[str, Tensor]:
    prefix = f"{task}.{kind}."
    state = load_file(checkpoint / STATE)
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def by_hand(method: str, base: LoadedBase, benchmark: Path, checkpoint: Path, samples: int) -> dict[str, Tensor]:
    """Importance by name, from transformers' own forward in float64, one record at a time and at all positions."""
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


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_importance_is_the_mean_of_single_records(method: str, runs: Runs, new_base: NewBase) -> None:
    """Five records, online, decay 0.5: the second task's state is its own importance plus half of the first task's."""
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
    """EWC: lambda/2 F (theta - theta*)^2 with gradient lambda F (theta - theta*). MAS: the same without the half."""
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
    """With ``per_task``, the first task's importance and weights stay as they were and pull after the second task."""
    first, second = runs.chain("ewc", "options.anchors=per_task", "options.weight=10")
    for kind in ("importance", "anchor"):
        for name, value in importance(first, kind).items():
            assert same_bits(importance(second, kind)[name], value), name
    started, model = begun("ewc", new_base(), runs, second, "options.anchors=per_task", "options.weight=10")
    now, old, weights = importance(second, "anchor", 1), importance(second, "anchor"), importance(second)
    loss, gradients = penalty(started, model)
    assert loss > 0
    for name in now:
        torch.testing.assert_close(gradients[name], 10 * weights[name] * (now[name] - old[name]), rtol=1e-4, atol=0)


# ---- LwF


def kl(before: np.ndarray, now: np.ndarray, temperature: float) -> float:
    """The divergence at one token, ``sum_v p_v log(p_v / q_v)``, in float64."""
    p, q = (each / each.sum() for each in (np.exp(before / temperature), np.exp(now / temperature)))
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


def answers(model: torch.nn.Module, batch: dict[str, Tensor]) -> list[np.ndarray]:
    """transformers' own logits before each answer token of one record, as float64."""
    with torch.no_grad():
        logits = adapted_base(model)(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]  # type: ignore[arg-type]
    answered = (batch["labels"][0] != -100).nonzero().flatten()
    return list(logits[answered - 1].double().numpy())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_holds_the_distillation_however_the_batch_is_cut(
    checkpointing: bool, runs: Runs, new_base: NewBase
) -> None:
    """The term against transformers' own logits in float64, for the whole batch and for its records one by one."""
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


# ---- O-LoRA


RANK = 8


def factors(checkpoint: Path) -> dict[str, dict[str, np.ndarray]]:
    """For each linear, those of ``frozen_A``, ``A``, ``frozen_B`` and ``B`` that exist, as float64."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors(checkpoint).items():
        if ".clmoe_experts." in name:
            linear, _, factor = name.rpartition(".")
            found.setdefault(linear, {})[factor] = value.double().numpy()
    return found


@pytest.mark.parametrize("norm", ["absolute", "squared"])
def test_the_penalty_of_three_tasks(norm: str, runs: Runs, new_base: NewBase) -> None:
    """Oracle: every entry of every product of the newest A with an older A, added up one by one."""
    third = runs.chain("olora", tasks=TASKS)[2]
    method = method_class("olora")(tiny_config("olora", Path("nowhere"), "options.weight=0.3", f"options.norm={norm}"))
    model = load_adapter(new_base().model, third, trainable=True)
    found = method.extra_loss(model, None, {})  # type: ignore[arg-type]
    assert found is not None
    expected = 0.0
    for parts in factors(third).values():
        for old in parts["frozen_A"]:
            for new in parts["A"]:
                overlap = sum(a * b for a, b in zip(old, new, strict=True))
                expected += abs(overlap) if norm == "absolute" else overlap**2
    assert float(found.detach()) == pytest.approx(0.3 * expected, rel=1e-5)
    found.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all((grad is not None) == name.endswith(".A") for name, grad in trained.items())
    first = load_adapter(new_base().model, runs.chain("olora", tasks=TASKS)[0], trainable=True)
    assert method.extra_loss(first, None, {}) is None  # type: ignore[arg-type]


def test_the_penalty_takes_part_in_training(runs: Runs) -> None:
    first, second = runs.chain("olora", "options.weight=0")
    assert same_adapter(first, runs.chain("olora")[0]) and not same_adapter(second, runs.chain("olora")[1])


def test_older_loras_never_change_a_bit(runs: Runs) -> None:
    """Each checkpoint's frozen part holds all of its parent's LoRAs, and its new LoRA has the same size."""
    chain = runs.chain("olora", tasks=TASKS)
    for parent, child in pairwise(chain):
        before, after = tensors(parent), tensors(child)
        for name in before:
            if not name.endswith((".A", ".B")):
                continue
            stem, factor, dim = name[:-1], name[-1], 0 if name.endswith(".A") else 1
            old = [before[f"{stem}frozen_{factor}"]] if f"{stem}frozen_{factor}" in before else []
            assert same_bits(after[f"{stem}frozen_{factor}"], torch.cat([*old, before[name]], dim).contiguous()), name
            assert after[name].shape == before[name].shape
            assert after[name].any()


def test_inference_adds_all_of_them(runs: Runs, new_base: NewBase) -> None:
    """Oracle: ``W0 + s * sum_i B_i A_i`` written into the base's own weights."""
    third = runs.chain("olora", tasks=TASKS)[2]
    dense, base = new_base(), new_base()
    for name, parts in factors(third).items():
        weight = dense.model.get_submodule(name.removeprefix("base_model.model.").split(".clmoe_experts.")[0]).weight
        A = np.concatenate([parts["frozen_A"], parts["A"]])
        B = np.concatenate([parts["frozen_B"], parts["B"]], axis=1)
        assert A.shape[0] == B.shape[1] == 3 * RANK
        each = [B[:, i : i + RANK] @ A[i : i + RANK] for i in range(0, 3 * RANK, RANK)]
        assert all(np.abs(update).max() > 0 for update in each)
        weight.data += 2.0 * torch.tensor(sum(each), dtype=weight.dtype)  # type: ignore[operator]
    saved = {k: v for k, v in tensors(third).items() if "multi_modal_projector" in k}
    for name, value in saved.items():
        stem = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        dense.model.get_parameter(stem).data.copy_(value)
    batch = prompt_batch(base, ["What is it?", "Which colour is it?"])
    with torch.no_grad():
        expected = dense.model(**batch).logits
        found = load_adapter(base.model, third, trainable=False).eval()(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
