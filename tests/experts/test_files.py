"""Adapters on disk: bit-equal round trips, files that do not fit, and checkpoints that need a routing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from clmoe.bases.llava import PROJECTOR, LoadedBase
from clmoe.errors import ClmoeError
from clmoe.experts import model as ours
from clmoe.experts.routing import RouteSelection, routing
from tests.experts.adapters import SCOPES, attached, grow, logits, old_router, randomise

NewBase = Callable[[], LoadedBase]


# ---- Save and load


def grown_with_everything(base: LoadedBase, scope: str) -> PeftModel:
    """Two tasks' experts and routers, task gates, a tuned projector; blocks of different sizes."""
    model = attached(base, scope, modules_to_save=[PROJECTOR])
    grow(model)
    layers = ours.expert_layers(model)
    one_block = {n: layer for n, layer in layers.items() if layer.block == "1"}
    generator = torch.Generator().manual_seed(3)
    ours.freeze_experts(model, 2)
    new = {n: {k: e.fresh(1, generator) for k, e in layer.experts.items()} for n, layer in one_block.items()}
    ours.grow_experts(model, 2, new)
    counts = {name: next(iter(layer.experts.values())).count for name, layer in layers.items()}
    inputs = {name: layer.routers.instance[0].weight.shape[1] for name, layer in layers.items()}
    ours.add_routers(model, 2, {name: torch.randn(counts[name], inputs[name]) for name in layers})
    for _ in range(2):
        ours.add_task_gates(model, {name: torch.rand(count) for name, count in counts.items()})
    return randomise(model)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["default", "another"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_saved_and_loaded_adapters_are_bit_equal(
    scope: str, name: str, low_memory: bool, new_base: NewBase, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model = grown_with_everything(new_base(), scope)
    model.save_pretrained(str(tmp_path))
    copy = PeftModel.from_pretrained(new_base().model, str(tmp_path), adapter_name=name, low_cpu_mem_usage=low_memory)
    live, loaded = ours.adapter_tensors(model), ours.adapter_tensors(copy)
    on_disk = load_file(tmp_path / "adapter_model.safetensors")
    assert live.keys() == on_disk.keys()
    assert live.keys() == loaded.keys()
    assert all(torch.equal(live[key], on_disk[key]) and torch.equal(live[key], loaded[key]) for key in live)
    for selection in (old_router(3), RouteSelection(router=torch.tensor([2, 1, 0])), RouteSelection()):
        assert torch.equal(logits(copy.eval(), batch, selection), logits(model, batch, selection))
    assert ours.expert_config(copy).layout == {"0": [0, 0, 0, 1, 1], "1": [0, 0, 0, 1, 1, 2]}


@pytest.mark.parametrize("low_memory", [False, True])
def test_adapters_stay_float32_on_a_bfloat16_base(low_memory: bool, new_base: NewBase, tmp_path: Path) -> None:
    model = attached(new_base())
    grow(model)
    model.save_pretrained(str(tmp_path))
    half = new_base().model.bfloat16()
    copy = PeftModel.from_pretrained(half, str(tmp_path), low_cpu_mem_usage=low_memory)
    live, loaded = ours.adapter_tensors(model), ours.adapter_tensors(copy)
    assert all(torch.equal(live[name], loaded[name]) and loaded[name].dtype == torch.float32 for name in live)


BROKEN: dict[str, Callable[[str, Tensor], dict[str, Tensor]]] = {
    "lacks a tensor": lambda name, tensor: {},
    "holds one too many": lambda name, tensor: {name: tensor, f"{name}.more": torch.zeros(1)},
    "names one differently": lambda name, tensor: {f"extra.{name}": tensor},
    "holds another dtype": lambda name, tensor: {name: tensor.bfloat16()},
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_file_that_does_not_fit_is_refused(broken: str, frozen: bool, new_base: NewBase, tmp_path: Path) -> None:
    model = attached(new_base(), "per_block")
    if frozen:
        grow(model)
    model.save_pretrained(str(tmp_path))
    ours.load_adapter(new_base().model, tmp_path, trainable=False)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    changed = BROKEN[broken](first, tensors.pop(first))
    save_file({**tensors, **changed}, file)
    with pytest.raises(ClmoeError, match=r"adapter_model.safetensors.*clmoe_experts"):
        ours.load_adapter(new_base().model, tmp_path, trainable=False)


# ---- Several tasks need a routing


def test_a_checkpoint_of_several_tasks_refuses_to_guess(new_base: NewBase, batch: dict[str, Tensor]) -> None:
    model = attached(new_base())
    model(**batch)  # one task: nothing to choose
    grow(model)
    for call in (lambda: model(**batch), lambda: model.generate(**batch, max_new_tokens=1)):
        with pytest.raises(ClmoeError, match=re.escape("clmoe.load(folder).answer")):
            call()
    with routing(old_router(3)):
        model.generate(**batch, max_new_tokens=1, do_sample=False)
    with model.disable_adapter():
        model(**batch)
    model.train()(**batch)  # training uses the newest router
    gated = attached(new_base())
    for task in range(2):
        assert not ours.expert_config(gated).needs_routing
        ours.add_task_gates(gated, {name: torch.full((3,), 1 / 3 + task) for name in ours.expert_layers(gated)})
    with pytest.raises(ClmoeError, match="no routing was chosen"):
        gated(**batch)


def test_the_task_gate_reaches_the_output(new_base: NewBase, batch: dict[str, Tensor]) -> None:
    """beta 0 with a gate on expert 2 alone equals a model whose instance router always picks expert 2."""
    model = attached(new_base(), "per_block")
    ours.add_task_gates(model, {name: torch.tensor([0.0, 0.0, 1.0]) for name in ours.expert_layers(model)})
    got = logits(model, batch, RouteSelection(task=torch.zeros(3, dtype=torch.int64), beta=0.0))
    for experts in ours.experts_by_linear(model).values():
        with torch.no_grad():
            experts.A.copy_(experts.A[4:].repeat(3, 1))
            experts.B.copy_(experts.B[:, 4:].repeat(1, 3))
    torch.testing.assert_close(got, logits(model, batch), rtol=1e-4, atol=1e-4)
