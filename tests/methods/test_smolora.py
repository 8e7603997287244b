"""SMoLoRA: its linears against loops over samples and experts, its gates' gradients, and what a gate may see."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from clmoe.bases.llava import LoadedBase
from clmoe.config import load_config
from clmoe.errors import ClmoeError
from clmoe.experts.forward import adapted_base, answer_states, prefill
from clmoe.experts.layer import ExpertLayer, expert_layers
from clmoe.experts.model import load_adapter
from clmoe.experts.routing import NEWEST_ROUTER, Installed, current_routing, reading, routing
from clmoe.methods import method_class
from clmoe.methods.smolora import banks
from clmoe.train.checkpoint import checked_method, read_checkpoint
from tests.methods.helpers import NewBase, answers_alone_and_together, begun, task_data
from tests.methods.test_routed import in_and_out
from tests.runs import Runs, tensors
from tests.support import TASKS, copy_base, prompt_batch, train_batch

SCALE = 4.0  # alpha / rank
HALF = 2
QUESTIONS = ["What is it?", "Which colour is it, and how many of them are there?"]


def by_loop(layer: ExpertLayer, x: Tensor, asked: Tensor, vu: Tensor, follows: list[int]) -> Tensor:
    """``y [B, T, dout]`` in float64 for inputs ``x [B, T, din]``, computed sample by sample and token by token.

    ``vu [E/2, din]`` is the weight of the seeing gate, and ``follows`` names each sample's following expert.
    """
    (experts,), fusion = layer.experts.values(), layer.routers.fusion.double()
    A, B = (factor.double() for factor in experts.packed())
    pairs = list(zip(A.chunk(2 * HALF), B.chunk(2 * HALF, 1), strict=True))
    y = x @ cast(nn.Linear, layer.base_layer).weight.double().t()
    for row in range(len(x)):
        tokens = [x[row, t] for t in range(x.shape[1]) if asked[row, t]]
        i = int((vu.double() @ (sum(tokens) / len(tokens))).argmax())
        for t in range(x.shape[1]):
            answers = [SCALE * B_k @ (A_k @ x[row, t]) for A_k, B_k in (pairs[i], pairs[HALF + follows[row]])]
            scores = [math.exp(float(w @ answer)) for w, answer in zip(fusion, answers, strict=True)]
            y[row, t] += sum(score / sum(scores) * answer for score, answer in zip(scores, answers, strict=True))
    return y


def seen_half(layer: ExpertLayer) -> Tensor:
    return cast(Tensor, layer.routers.instance[0].weight)


def test_a_linear_adds_the_two_picked_experts_weighed_by_their_answers(runs: Runs, tiny_base: LoadedBase) -> None:
    """Oracle: the loop, on two prompts of different tasks and lengths; padding does not count in the mean."""
    checkpoint = runs.chain("smolora")[1]
    model = load_adapter(copy_base(tiny_base).model.double(), checkpoint, trainable=False).eval()
    generator = torch.Generator().manual_seed(0)
    for bank in banks(model).values():  # scores unlike those after four steps, and a different pick for each task
        bank.fusion.data = torch.randn(bank.fusion.shape, generator=generator)
        bank.task.gates = torch.eye(2 * HALF)[[HALF + 1, HALF]]
    method = method_class("smolora")(read_checkpoint(checkpoint).config)
    batch = prompt_batch(tiny_base, QUESTIONS)
    batch["pixel_values"] = batch["pixel_values"].double()
    asked = batch["attention_mask"].bool()
    assert not asked.all()
    selection = replace(method.selection(model, torch.tensor([1, 0])), asked=asked)
    picks, moved = set(), 0.0
    for name, (x, out) in in_and_out(model, batch, selection).items():
        layer = expert_layers(model)[name]
        expected = by_loop(layer, x, asked, seen_half(layer), [0, 1])
        torch.testing.assert_close(out[asked], expected[asked], rtol=1e-5, atol=1e-6, msg=name)
        moved = max(moved, float((out - cast(nn.Linear, layer.base_layer)(x)).abs().max()))
        means = [x[row][asked[row]].mean(0) for row in range(2)]
        picks |= {int((seen_half(layer).double() @ mean).argmax()) for mean in means}
    assert moved > 1e-3 and len(picks) > 1


def relaxed(layer: ExpertLayer, x: Tensor, asked: Tensor, embedding: Tensor, W: Tensor, W_if: Tensor) -> Tensor:
    """The linear's float64 update: all experts, mixed by gates of ``W`` and ``W_if`` that are one-hot only in value."""
    (experts,), fusion = layer.experts.values(), layer.routers.fusion.double()
    A, B = (factor.double() for factor in experts.packed())
    outs = torch.stack(
        [SCALE * x @ a.t() @ b.t() for a, b in zip(A.chunk(2 * HALF), B.chunk(2 * HALF, 1), strict=True)], -2
    )
    means = torch.stack([x[row][asked[row]].mean(0) for row in range(len(x))])
    picked = []
    for logits in (means @ W.t(), (W_if @ embedding).expand(len(x), -1)):
        p = logits.exp() / logits.exp().sum(-1, keepdim=True)
        hard = torch.zeros_like(p)
        hard[range(len(p)), p.argmax(-1)] = 1
        picked.append(hard + p - p.detach())
    v, f = (torch.einsum("be,bteo->bto", g, part) for g, part in zip(picked, outs.split(HALF, -2), strict=True))
    a, b = (v @ fusion[0]).exp(), (f @ fusion[1]).exp()
    return (a / (a + b)).unsqueeze(-1) * v + (b / (a + b)).unsqueeze(-1) * f


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["published", "released"])
def test_gates_learn_through_their_softmax_on_the_first_task_and_never_as_released(
    variant: str, runs: Runs, new_base: NewBase
) -> None:
    first, second = runs.chain("smolora", *(["options.variant=released"] if variant == "released" else []))
    fresh = runs.chain("smolora", f"options.variant={variant}", "training.learning_rate=1e-12", tasks=TASKS[:1])[0]
    for kind in ("instance.0.weight", "instruction.weight"):
        names = [name for name in tensors(first) if name.endswith(kind)]
        learned = [not torch.allclose(tensors(first)[name], tensors(fresh)[name], atol=1e-6) for name in names]
        assert any(learned) == (variant == "published"), kind
        assert all(torch.equal(tensors(second)[name], tensors(first)[name]) for name in names), "fixed from then on"
    if variant == "released":
        return
    base = new_base()
    _, model = begun("smolora", base, runs, first, records=task_data(base, runs.benchmark, TASKS[1], 6).rows)
    layer = next(iter(expert_layers(model).values()))
    bank, (experts,) = banks(model)[layer.name], layer.experts.values()
    x = torch.randn(2, 5, experts.din, generator=torch.Generator().manual_seed(3))
    asked = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    grad = torch.randn(2, 5, experts.dout, generator=torch.Generator().manual_seed(4))
    with routing(NEWEST_ROUTER), reading(asked):
        (layer(x) * grad).sum().backward()
    W, W_if = (w.detach().double().requires_grad_() for w in (seen_half(layer), bank.instruction.weight))
    assert bank.embedding is not None
    assert float(bank.embedding.norm()) == pytest.approx(1)
    update = relaxed(layer, x.double(), asked, bank.embedding.double(), W, W_if)
    (update * grad.double()).sum().backward()
    assert W.grad is not None and W_if.grad is not None and W.grad.abs().max() > 1e-4
    torch.testing.assert_close(seen_half(layer).grad.double(), W.grad, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]
    torch.testing.assert_close(bank.instruction.weight.grad.double(), W_if.grad, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]


def test_a_gate_never_sees_the_answer_that_it_helps_to_predict(runs: Runs, new_base: NewBase) -> None:
    base = new_base()
    model = load_adapter(base.model, runs.chain("smolora")[0], trainable=False).eval()
    batch = train_batch(base, [("What is it?", "A circle and many more."), ("What is it?", "No."), ("Who?", "Me.")])
    seen: list[Tensor] = []
    layer = next(iter(expert_layers(model).values()))
    layer.register_forward_pre_hook(lambda *_: seen.append(cast(Tensor, cast(Installed, current_routing())[0].asked)))
    with torch.no_grad():
        states = answer_states(adapted_base(model), batch)
    for row, labels in enumerate(batch["labels"].tolist()):
        first = next(place for place, token in enumerate(labels) if token != -100)
        assert seen[0][row].tolist() == [place < first for place in range(len(labels))]
    firsts = [int(n) for n in (batch["labels"][:, 1:] != -100).sum(1).cumsum(0)]
    torch.testing.assert_close(states[0], states[firsts[0]], rtol=0, atol=1e-5)
    assert not torch.allclose(states[0], states[firsts[1]], atol=1e-3)


@pytest.mark.parametrize("variant", ["published", "released"])
def test_generated_tokens_keep_the_prompts_experts_and_as_released_pick_their_own(
    variant: str, runs: Runs, tiny_base: LoadedBase
) -> None:
    """A linear after a prompt equals the loop with the prompt's mean input or, as released, with the newest input."""
    checkpoint = runs.chain("smolora")[1]
    model = load_adapter(copy_base(tiny_base).model.double(), checkpoint, trainable=False).eval()
    config = read_checkpoint(checkpoint).config
    method = method_class("smolora")(replace(config, options={"variant": variant}))
    selection = method.selection(model, torch.tensor([1, 1]))
    assert len(set(selection.keys(2))) == 2, "no shared prefix"
    batch = prompt_batch(tiny_base, QUESTIONS)
    batch["pixel_values"] = batch["pixel_values"].double()
    prefill(adapted_base(model), batch, selection, 1)
    asked = batch["attention_mask"].bool()
    prompts = dict(in_and_out(model, batch, replace(selection, asked=asked, kept=None)))  # a copy, as the hooks stay
    generator, other = torch.Generator().manual_seed(0), 0
    for name, layer in expert_layers(model).items():
        (experts,) = layer.experts.values()
        x = torch.randn(2, 1, experts.din, generator=generator, dtype=torch.float64)
        with torch.no_grad(), routing(selection):
            out = layer(x)
        follows = [int(cast(Tensor, layer.routers.task.gates)[1, HALF:].argmax())] * 2
        whole, mask = torch.cat([prompts[name][0], x], 1), torch.cat([asked, torch.zeros(2, 1).bool()], 1)
        kept = by_loop(layer, whole, mask, seen_half(layer), follows)[:, -1:]
        own = by_loop(layer, x, torch.ones(2, 1).bool(), seen_half(layer), follows)
        torch.testing.assert_close(out, kept if variant == "published" else own, rtol=1e-5, atol=1e-6)
        other += not torch.allclose(kept, own, atol=1e-5)
    assert other, "it makes a difference"


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch(runs: Runs, tmp_path: Path) -> None:
    alone, together = answers_alone_and_together(runs.chain("smolora", tasks=TASKS)[-1], runs, tmp_path)
    assert alone == together


@pytest.mark.parametrize(
    ("setting", "field"),
    [("adapter.router_scope=per_block", r"adapter\.router_scope"), ("adapter.experts=5", r"adapter\.experts"),
     ("adapter.router_top_k=1", "router_top_k")],
)  # fmt: skip
def test_other_gates_are_refused(setting: str, field: str) -> None:
    with pytest.raises(ClmoeError, match=field):
        load_config("smolora", {}, [setting, "adapter.rank=40"], None, checked_method)
