"""ProgLoRA: its weights and linears against float64 loops, the gradient of its keys, and what stays frozen."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from clmoe.bases.llava import LoadedBase, decoder_layers
from clmoe.experts.forward import adapted_base, answer_logits, answer_states, answer_tokens, prefill
from clmoe.experts.guide import Guide
from clmoe.experts.layer import expert_layers, experts_by_linear
from clmoe.experts.model import attach_adapter, detach_adapter, find_guide, load_adapter
from clmoe.experts.routing import routing
from clmoe.methods import method_class
from clmoe.train.checkpoint import read_checkpoint
from tests.methods.helpers import NewBase, answers_alone_and_together, watch_inputs
from tests.runs import Runs, tensors
from tests.support import TASKS, copy_base, prompt_batch, train_batch

SCALE = 2.0
QUESTIONS = ["What is it?", "Which colour is it, and how many of them are there?"]
KEY = "guide.key"


def shares(guide: Guide, embeddings: Tensor, asked: Tensor) -> list[list[float]]:
    """The weights of the tasks for each sample, computed number by number."""
    (W1, W2), keys = (router.weight.double() for router in guide.mlp), guide.keys.double()
    scale, shift = guide.norm.weight.double(), guide.norm.bias.double()
    found = []
    for row in range(len(embeddings)):
        tokens = [embeddings[row, t].double() for t in range(embeddings.shape[1]) if asked[row, t]]
        largest = torch.stack([max(token[i] for token in tokens) for i in range(embeddings.shape[2])])
        wide = [float(value) / (1 + math.exp(-float(value))) for value in W2 @ (W1 @ largest)]
        mean = sum(wide) / len(wide)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in wide) / len(wide) + 1e-5)
        query = scale * torch.tensor([(value - mean) / deviation for value in wide], dtype=torch.float64) + shift
        exp = [math.exp(float(key @ query) / math.sqrt(len(query))) for key in keys]
        found.append([value / sum(exp) for value in exp])
    return found


def test_every_linear_weighs_the_tasks_by_the_prompts_largest_embeddings(runs: Runs, tiny_base: LoadedBase) -> None:
    """Checked on prompts of unequal length in one batch, then on a token that follows each of them."""
    checkpoint = runs.chain("proglora", tasks=TASKS)[-1]
    model = load_adapter(copy_base(tiny_base).model.double(), checkpoint, trainable=False).eval()
    guide = find_guide(model)
    assert guide is not None
    guide.norm.weight.data *= torch.linspace(1, 4, len(guide.norm.weight))  # training has hardly moved it
    guide.norm.bias.data += 0.1
    selection = method_class("proglora")(read_checkpoint(checkpoint).config).plain_selection()
    assert len(set(selection.keys(2))) == 2, "no shared prefix"
    batch = prompt_batch(tiny_base, QUESTIONS)
    batch["pixel_values"] = batch["pixel_values"].double()
    asked = batch["attention_mask"].bool()
    assert not asked.all()
    layers = expert_layers(model)
    outs: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, args, out, name=name: outs.__setitem__(name, out))
    inputs = watch_inputs(layers)
    embedded: list[Tensor] = []
    first = decoder_layers(adapted_base(model))[0]
    first.register_forward_pre_hook(lambda _, args, kw: embedded.append((args or [*kw.values()])[0]), with_kwargs=True)
    read = prefill(adapted_base(model), batch, selection, 1)
    expected = shares(guide, embedded[0], asked)
    assert max(abs(a - b) for a, b in zip(*expected, strict=True)) > 1e-3

    def check() -> None:
        for name, layer in layers.items():
            (experts,), x = layer.experts.values(), inputs[name]
            A, B = (factor.double() for factor in experts.packed())
            y = x @ cast(nn.Linear, layer.base_layer).weight.t()
            for row in range(2):
                for w, A_i, B_i in zip(expected[row], A.chunk(3), B.chunk(3, 1), strict=True):
                    y[row] += SCALE * w * (x[row] @ A_i.t() @ B_i.t())
            torch.testing.assert_close(outs[name], y, rtol=1e-5, atol=1e-6, msg=name)

    check()
    following = {"input_ids": torch.tensor([[5], [6]]), "position_ids": read.next_position.unsqueeze(1)}
    mask = torch.cat([read.attention_mask, torch.ones(2, 1, dtype=torch.int64)], 1)
    with torch.no_grad(), routing(selection):
        adapted_base(model).base_model(**following, attention_mask=mask, past_key_values=read.cache, use_cache=True)
    assert next(iter(inputs.values())).shape[1] == 1
    check()


def test_keys_and_mlp_learn_from_the_loss(runs: Runs, new_base: NewBase) -> None:
    """The gradient of the newest key agrees with a difference quotient of the loss."""
    base = new_base()
    base.model.double()
    model = load_adapter(base.model, runs.chain("proglora")[1], trainable=True).eval()
    for experts in experts_by_linear(model).values():
        experts.frozen_B *= 30  # type: ignore[operator]
    guide = find_guide(model)
    assert guide is not None
    batch = train_batch(base, [("What is it?", "A circle."), ("Who?", "Me.")])

    def loss() -> Tensor:
        tokens = answer_tokens(batch["labels"])
        return torch.nn.functional.cross_entropy(answer_logits(adapted_base(model), batch), tokens)

    loss().backward()
    gradient = cast(Tensor, guide.key.grad)[0]
    assert all(router.weight.grad.abs().max() > 0 for router in guide.mlp)
    place, step = int(gradient.abs().argmax()), 0.1
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            guide.key[0, place] += sign * step
            values.append(float(loss()))
            guide.key[0, place] -= sign * step
    assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.05)


def test_old_loras_and_keys_are_frozen_and_the_newest_key_and_the_mlp_train(runs: Runs) -> None:
    first, second = (tensors(checkpoint) for checkpoint in runs.chain("proglora"))
    (key,) = (name for name in first if name.endswith(KEY))
    frozen = second[key.replace(KEY, "guide.frozen_key")]
    assert torch.equal(frozen, first[key]) and second[key].shape == first[key].shape
    assert not torch.equal(second[key], first[key])
    for name, value in first.items():
        if name.endswith(".A"):
            assert torch.equal(second[name.replace(".A", ".frozen_A")], value)
    assert any(".guide.mlp." in name and not torch.equal(second[name], value) for name, value in first.items())


def test_weights_do_not_see_the_answer(runs: Runs, new_base: NewBase) -> None:
    base = new_base()
    model = load_adapter(base.model, runs.chain("proglora")[1], trainable=False).eval()
    batch = train_batch(base, [("What is it?", "A circle and many more."), ("What is it?", "No.")])
    with torch.no_grad():
        states = answer_states(adapted_base(model), batch)
    second = int((batch["labels"][0, 1:] != -100).sum())
    torch.testing.assert_close(states[0], states[second], rtol=0, atol=1e-5)


def test_a_detached_adapter_leaves_no_hook(tiny_base: LoadedBase, runs: Runs) -> None:
    base = copy_base(tiny_base)
    checkpoint = runs.chain("proglora")[0]
    method = method_class("proglora")(read_checkpoint(checkpoint).config)
    model = attach_adapter(base.model, method.adapter(base))
    first = decoder_layers(base.model)[0]
    assert len(first._forward_pre_hooks) == 1
    detach_adapter(model)
    assert not first._forward_pre_hooks


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch(runs: Runs, tmp_path: Path) -> None:
    alone, together = answers_alone_and_together(runs.chain("proglora", tasks=TASKS)[-1], runs, tmp_path)
    assert alone == together
