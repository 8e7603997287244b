"""What the adapter relies on in peft 0.21, one test per trap: they fail when an upgrade changes the ground."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from torch import Tensor

from clmoe.bases.llava import PROJECTOR, LoadedBase
from clmoe.experts import model as ours
from clmoe.experts.config import register_peft_type
from tests.experts.adapters import attached, config, grow, logits, old_router

NewBase = Callable[[], LoadedBase]


def test_our_member_of_peft_type_behaves_like_upstreams() -> None:
    member = PeftType("CLMOE")
    assert isinstance(member, PeftType) and isinstance(member, str)
    assert member.name == member.value == member == "CLMOE"
    assert member is PeftType["CLMOE"] is PeftType.CLMOE
    assert list(PeftType).count(member) == 1 and member in PeftType
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    assert json.dumps(member) == '"CLMOE"'
    assert PeftType("LORA") is PeftType.LORA


def test_registering_twice_changes_nothing() -> None:
    members = list(PeftType)
    register_peft_type()
    assert list(PeftType) == members


def test_peft_finds_our_classes() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.CLMOE] is ours.ExpertConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.CLMOE] is ours.ExpertModel


READ = """
import sys
from peft import PeftConfig
try:
    PeftConfig.from_pretrained(sys.argv[1])
except KeyError as error:
    print("without:", error)
import clmoe
print("with:", type(PeftConfig.from_pretrained(sys.argv[1])).__name__)
"""


def test_peft_reads_our_folders_once_clmoe_is_imported(new_base: NewBase, tmp_path: Path) -> None:
    attached(new_base()).save_pretrained(str(tmp_path))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, cwd=root, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["without: 'CLMOE'", "with: ExpertConfig"]


def test_the_config_survives_its_file(new_base: NewBase, tmp_path: Path) -> None:
    model = attached(new_base(), "per_block", router_top_k=2, modules_to_save=[PROJECTOR])
    grow(model)
    model.save_pretrained(str(tmp_path))
    live, read = ours.expert_config(model).to_dict(), PeftConfig.from_pretrained(str(tmp_path)).to_dict()
    differing = {key for key in live if live[key] != read[key]}
    assert differing <= {"inference_mode", "base_model_name_or_path", "auto_mapping"}


def test_transformers_own_loader_gives_the_same_model(
    new_base: NewBase, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    """peft prototypes with nested names lost their weights here without an error."""
    model = attached(new_base(), "per_block")
    expected = logits(model, batch)
    model.save_pretrained(str(tmp_path))
    native = new_base().model
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native, batch), expected)


def test_experts_cannot_be_merged_into_the_base(new_base: NewBase) -> None:
    with pytest.raises(NotImplementedError):
        attached(new_base()).merge_and_unload()


def test_experts_and_lora_do_not_share_one_model(new_base: NewBase) -> None:
    with pytest.raises(ValueError, match="different peft types"):
        attached(new_base()).add_adapter("plain", LoraConfig(target_modules=["q_proj"]))


def test_two_adapters_switch_and_only_the_active_one_trains(new_base: NewBase, batch: dict[str, Tensor]) -> None:
    model = attached(new_base())
    first = logits(model, batch)
    model.add_adapter("second", config(experts=2))
    assert torch.equal(logits(model, batch), first)
    for name, expected in (("second", 2), ("default", 3)):
        model.set_adapter(name)
        trainable = [parameter for parameter, tensor in model.named_parameters() if tensor.requires_grad]
        assert trainable and all(f".{name}." in parameter for parameter in trainable)
        assert {experts.count for experts in ours.experts_by_linear(model).values()} == {expected}
    assert torch.equal(logits(model, batch), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model, batch), first)


def test_generation_goes_through_the_adapter(new_base: NewBase, batch: dict[str, Tensor]) -> None:
    """With the key-value cache, token by token, the answers are those of whole forwards."""
    model = attached(new_base(), "per_block")
    tokens = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=-1)
    new = tokens[:, batch["input_ids"].shape[1] :]
    grown = dict(batch)
    for step in range(3):
        whole = logits(model, grown, old_router(3))[:, -1]
        assert torch.equal(whole.argmax(-1), new[:, step])
        grown["input_ids"] = torch.cat([grown["input_ids"], new[:, step : step + 1]], 1)
        grown["attention_mask"] = torch.cat([grown["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], 1)


def test_adapters_added_later_are_frozen_for_inference(new_base: NewBase, tmp_path: Path) -> None:
    attached(new_base()).save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(new_base().model, str(tmp_path))
    assert not any(tensor.requires_grad for tensor in model.parameters())
