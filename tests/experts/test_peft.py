"""What the adapter relies on in peft 0.21, one test per trap: they fail when an upgrade changes the ground."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from torch import Tensor

from clmoe.experts import model as ours
from tests.experts.adapters import NewBase, attached, logits


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
    """peft prototypes with nested names lost their weights here without an error."""
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
