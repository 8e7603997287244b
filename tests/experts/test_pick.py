"""Parts without routers, picked by task: every sample is served by its own task's LoRA, and by nothing else."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from clmoe.bases.llava import LoadedBase
from clmoe.errors import ClmoeError
from clmoe.experts import model as ours
from clmoe.experts.layer import experts_by_linear
from tests.experts.adapters import (
    SCOPES,
    NewBase,
    attached,
    config,
    grow,
    logits,
    routed,
    row,
    snapshot,
    train_steps,
)

TASKS = (1, 0, 2)


def separate(base: LoadedBase, scope: str = "per_linear", tasks: int = 3) -> PeftModel:
    """A random LoRA of rank 2 for each task, all but the newest frozen."""
    model = attached(base, scope, experts=1, router_owners=[], pick="task")
    for task in range(1, tasks):
        grow(model, task, count=1, routers=False)
    return model


@pytest.mark.parametrize("scope", SCOPES)
def test_a_mixed_batch_equals_each_sample_alone_on_a_base_with_its_lora_merged(
    scope: str, new_base: NewBase, even: dict[str, Tensor]
) -> None:
    """Oracle, in float64: a plain base whose weights are ``W + s B_t A_t``."""
    model = separate(new_base(), scope).double()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in even.items()}
    together = logits(model, batch, routed(*TASKS))
    for number, task in enumerate(TASKS):
        plain = new_base().model.double()
        for name, experts in experts_by_linear(model).items():
            A, B = experts.packed()
            ranks = slice(2 * task, 2 * task + 2)
            plain.get_submodule(name).weight.data += 2.0 * (B[:, ranks] @ A[ranks]).detach()
        expected = logits(plain, row(batch, number))
        torch.testing.assert_close(together[number], expected[0], rtol=0, atol=1e-9)
        alone = logits(model, row(batch, number), routed(task))
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-9)
        assert not torch.allclose(logits(model, row(batch, number), routed((task + 1) % 3)), alone, atol=1e-2)


def test_without_a_selection_the_newest_task_trains_and_the_others_keep_every_bit(
    new_base: NewBase, batch: dict[str, Tensor]
) -> None:
    model, older = separate(new_base()), routed(0, 1, 0)
    assert torch.equal(logits(model, batch), logits(model, batch, routed(2, 2, 2)))
    before, tensors = logits(model, batch, older), snapshot(model)
    train_steps(model, batch, steps=2)
    assert torch.equal(logits(model, batch, older), before)
    changed = {name for name, tensor in ours.adapter_tensors(model).items() if not torch.equal(tensor, tensors[name])}
    assert changed == {name for name in tensors if "frozen" not in name}


def test_several_tasks_need_a_routing_that_names_their_owners(new_base: NewBase, batch: dict[str, Tensor]) -> None:
    separate(new_base(), tasks=1)(**batch)
    model = separate(new_base(), tasks=2)
    with pytest.raises(ClmoeError, match="routing"):
        model(**batch)
    with pytest.raises(ClmoeError, match="task 2"):
        logits(model, batch, routed(*TASKS))


@pytest.mark.parametrize("fields", [{"router_owners": [0]}, {"layout": {"0": [0], "1": [0, 1]}}, {"pick": "newest"}])
def test_a_block_without_the_tasks_experts_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="pick"):
        config(**{"pick": "task", "router_owners": [], **fields})  # type: ignore[arg-type]
