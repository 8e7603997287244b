"""Adapters on disk, checkpoints that need a routing, and what we rely on in peft 0.21, one test per trap."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from safetensors.torch import load_file, save_file
from torch import Tensor

from clmoe.bases.families import PROJECTOR
from clmoe.bases.llava import LoadedBase
from clmoe.errors import ClmoeError
from clmoe.experts import model as ours
from clmoe.experts.routing import RouteSelection, routing
from tests.experts.adapters import SCOPES, NewBase, attached, grow, logits, old_router, randomise, routed, same


def grown_with_everything(base: LoadedBase, scope: str) -> PeftModel:
    """A model with three tasks' experts and routers, task gates and a tuned projector; its blocks differ in size."""
    model = attached(base, scope, modules_to_save=[PROJECTOR])
    grow(model)
    grow(model, owner=2, count=1, block="1")
    layers = ours.expert_layers(model)
    for _ in range(2):
        ours.add_task_gates(model, {name: torch.rand(len(layer.routers.owners)) for name, layer in layers.items()})
    return randomise(model)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("name", "low_memory"), [("default", False), ("another", False), ("default", True)])
def test_saved_and_loaded_adapters_are_bit_equal(
    scope: str, name: str, low_memory: bool, new_base: NewBase, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model = grown_with_everything(new_base(), scope)
    model.save_pretrained(str(tmp_path))
    copy = PeftModel.from_pretrained(new_base().model, str(tmp_path), adapter_name=name, low_cpu_mem_usage=low_memory)
    live = ours.adapter_tensors(model)
    assert same(live, load_file(tmp_path / "adapter_model.safetensors")) and same(live, ours.adapter_tensors(copy))
    for selection in (old_router(3), routed(2, 1, 0), RouteSelection()):
        assert torch.equal(logits(copy.eval(), batch, selection), logits(model, batch, selection))
    written, read = ours.expert_config(model).to_dict(), ours.expert_config(copy).to_dict()
    differing = {key for key in written if written[key] != read[key]}
    assert differing <= {"inference_mode", "base_model_name_or_path", "auto_mapping"}
    assert read["layout"] == {"0": [0, 0, 0, 1, 1], "1": [0, 0, 0, 1, 1, 2]}


@pytest.mark.parametrize("as_released", [False, True])
def test_as_released_is_kept_and_written_only_if_set(as_released: bool, new_base: NewBase, tmp_path: Path) -> None:
    attached(new_base(), dropout=0.5, as_released=as_released).save_pretrained(str(tmp_path))
    assert ("as_released" in json.loads((tmp_path / "adapter_config.json").read_text())) == as_released
    copy = PeftModel.from_pretrained(new_base().model, str(tmp_path))
    kept = {experts.as_released for layer in ours.expert_layers(copy).values() for experts in layer.experts.values()}
    assert kept == {as_released}


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


@pytest.mark.parametrize("key", ["rank", "layout", "pick"])
def test_an_adapter_of_another_shape_than_its_configuration_is_one_line(
    key: str, new_base: NewBase, tmp_path: Path
) -> None:
    attached(new_base(), "per_linear").save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    other = {"rank": values["rank"] + 1, "layout": {"0": [0]}, "pick": "any"}
    path.write_text(json.dumps(values | {key: other[key]}))
    with pytest.raises(ClmoeError, match=r"adapter_model\.safetensors.*adapter_config\.json") as refused:
        ours.load_adapter(new_base().model, tmp_path, trainable=False)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_a_checkpoint_of_several_tasks_refuses_to_guess(new_base: NewBase, batch: dict[str, Tensor]) -> None:
    model = attached(new_base())
    model(**batch)  # with one task there is nothing to choose
    grow(model)
    for call in (lambda: model(**batch), lambda: model.generate(**batch, max_new_tokens=1)):
        with pytest.raises(ClmoeError, match="routing"):
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
    with pytest.raises(ClmoeError, match="routing"):
        gated(**batch)


# ---- peft


def test_our_member_of_peft_type_behaves_like_upstreams() -> None:
    member = PeftType("CLMOE")
    assert isinstance(member, PeftType) and isinstance(member, str)
    assert member.name == member.value == member == "CLMOE"
    assert member is PeftType["CLMOE"] is PeftType.CLMOE
    assert list(PeftType).count(member) == 1 and member in PeftType
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    assert json.dumps(member) == '"CLMOE"'
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is ours.ExpertConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is ours.ExpertModel


def test_transformers_own_loader_gives_the_same_model(
    new_base: NewBase, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    """In this loader, prototypes for peft with nested names lost their weights without an error."""
    model = attached(new_base(), "per_block")
    expected = logits(model, batch)
    model.save_pretrained(str(tmp_path))
    native = new_base().model
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native, batch), expected)


def test_experts_cannot_be_merged_into_the_base_or_share_it_with_lora(new_base: NewBase) -> None:
    with pytest.raises(NotImplementedError):
        attached(new_base()).merge_and_unload()
    with pytest.raises(ValueError, match="different peft types"):
        attached(new_base()).add_adapter("plain", LoraConfig(target_modules=["q_proj"]))
