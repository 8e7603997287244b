"""Parts without routers, picked by task: every sample is served by its own task's LoRA, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from clmoe.bases.llava import LoadedBase
from clmoe.errors import ClmoeError
from clmoe.experts import model as ours
from clmoe.experts.routing import NEWEST_ROUTER, RouteSelection, routing
from tests import support
from tests.experts.adapters import SCOPES, attached, config, logits, randomise

NewBase = Callable[[], LoadedBase]
TASKS = torch.tensor([1, 0, 2])


def separate(base: LoadedBase, scope: str = "per_linear", tasks: int = 3) -> PeftModel:
    """A random LoRA of rank 2 for each task, all but the newest frozen."""
    model = attached(base, scope, experts=1, router_owners=[], pick="task")
    for task in range(1, tasks):
        generator = torch.Generator().manual_seed(task)
        ours.freeze_experts(model, task)
        layers = ours.expert_layers(model).items()
        factors = {n: {k: e.fresh(1, generator) for k, e in layer.experts.items()} for n, layer in layers}
        ours.grow_experts(model, task, factors)
        randomise(model, task)
    return model


def rows(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: tensor[row : row + 1] for name, tensor in batch.items()}


@pytest.fixture
def even(pristine_base: LoadedBase) -> dict[str, Tensor]:
    """Three prompts of equal length."""
    batch = support.prompt_batch(pristine_base, [f"How many are {word}?" for word in ("there", "left", "right")])
    assert batch["attention_mask"].all()
    return batch


@pytest.mark.parametrize("scope", SCOPES)
def test_a_mixed_batch_equals_each_sample_alone_on_a_base_with_its_lora_merged(
    scope: str, new_base: NewBase, even: dict[str, Tensor]
) -> None:
    """Oracle, in float64: a plain base whose weights are ``W + s B_t A_t``."""
    model = separate(new_base(), scope).double()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in even.items()}
    together = logits(model, batch, RouteSelection(router=TASKS))
    for row, task in enumerate(TASKS.tolist()):
        plain = new_base().model.double()
        for name, experts in ours.experts_by_linear(model).items():
            A, B = experts.packed()
            ranks = slice(2 * task, 2 * task + 2)
            plain.get_submodule(name).weight.data += 2.0 * (B[:, ranks] @ A[ranks]).detach()
        with torch.no_grad():
            expected = plain(**rows(batch, row)).logits[0]
        torch.testing.assert_close(together[row], expected, rtol=0, atol=1e-9)
        alone = logits(model, rows(batch, row), RouteSelection(router=TASKS[row : row + 1]))
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-10)
        other = logits(model, rows(batch, row), RouteSelection(router=(TASKS[row : row + 1] + 1) % 3))
        assert not torch.allclose(other, alone, atol=1e-2)


def test_summed_parts_equal_a_base_with_all_of_them_merged(new_base: NewBase, even: dict[str, Tensor]) -> None:
    model = attached(new_base(), router_owners=[])
    assert not ours.expert_config(model).needs_routing
    plain = new_base().model
    for name, experts in ours.experts_by_linear(model).items():
        A, B = experts.packed()
        plain.get_submodule(name).weight.data += 2.0 * (B @ A).detach()
    torch.testing.assert_close(logits(model, even), logits(plain, even), rtol=1e-4, atol=1e-4)


def test_without_a_selection_the_newest_task_trains_and_the_others_keep_every_bit(
    new_base: NewBase, batch: dict[str, Tensor]
) -> None:
    model = separate(new_base())
    newest = RouteSelection(router=torch.full((3,), 2))
    assert torch.equal(logits(model, batch, NEWEST_ROUTER), logits(model, batch, newest))
    older = RouteSelection(router=torch.tensor([0, 1, 0]))
    before, tensors = logits(model, batch, older), {n: t.clone() for n, t in ours.adapter_tensors(model).items()}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).logits.square().mean().backward()
        assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
        optimizer.step()
    assert torch.equal(logits(model.eval(), batch, older), before)
    changed = {name for name, tensor in ours.adapter_tensors(model).items() if not torch.equal(tensor, tensors[name])}
    assert changed == {name for name in tensors if "frozen" not in name}


@pytest.mark.parametrize("scope", SCOPES)
def test_saved_and_loaded_it_answers_with_the_same_bits(
    scope: str, new_base: NewBase, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model = separate(new_base(), scope)
    model.save_pretrained(str(tmp_path))
    copy = ours.load_adapter(new_base().model, tmp_path, trainable=False).eval()
    live, loaded = ours.adapter_tensors(model), ours.adapter_tensors(copy)
    assert live.keys() == loaded.keys() and all(torch.equal(live[name], loaded[name]) for name in live)
    for selection in (RouteSelection(router=TASKS), NEWEST_ROUTER):
        assert torch.equal(logits(copy, batch, selection), logits(model, batch, selection))


def test_a_compiled_layer_picks_the_same(new_base: NewBase) -> None:
    layer = next(iter(ours.expert_layers(separate(new_base())).values()))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 7, support.SIZES.text_hidden)
    for selection in (RouteSelection(router=TASKS), NEWEST_ROUTER, RouteSelection(router=TASKS.flip(0))):
        with routing(selection):
            torch.testing.assert_close(compiled(x), layer(x))


def test_several_tasks_need_a_routing_that_names_their_owners(new_base: NewBase, batch: dict[str, Tensor]) -> None:
    model = separate(new_base(), tasks=1)
    assert not ours.expert_config(model).needs_routing
    model(**batch)
    model = separate(new_base(), tasks=2)
    with pytest.raises(ClmoeError, match="no routing was chosen"):
        model(**batch)
    with pytest.raises(ClmoeError, match="no experts of task 2"):
        logits(model, batch, RouteSelection(router=TASKS))


def test_a_block_without_the_tasks_experts_is_refused(new_base: NewBase) -> None:
    model = separate(new_base(), tasks=1)
    name, layer = next(iter(ours.expert_layers(model).items()))
    fresh = {linear: experts.fresh(1, torch.Generator()) for linear, experts in layer.experts.items()}
    with pytest.raises(ValueError, match="block"):
        ours.grow_experts(model, 1, {name: fresh})
    for fields in ({"router_owners": [0]}, {"layout": {"0": [0], "1": [0, 1]}}, {"pick": "newest"}):
        with pytest.raises(ValueError, match="pick"):
            config(**{"pick": "task", "router_owners": [], **fields})
