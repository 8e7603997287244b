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
from clmoe.experts.layer import experts_by_linear
from tests.experts.adapters import NewBase, attached, config, logits


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


def test_two_adapters_switch_and_only_the_active_one_trains(new_base: NewBase, batch: dict[str, Tensor]) -> None:
    model = attached(new_base())
    first = logits(model, batch)
    model.add_adapter("second", config(experts=2))
    assert torch.equal(logits(model, batch), first)
    for name, expected in (("second", 2), ("default", 3)):
        model.set_adapter(name)
        trainable = [parameter for parameter, tensor in model.named_parameters() if tensor.requires_grad]
        assert trainable and all(f".{name}." in parameter for parameter in trainable)
        assert {experts.count for experts in experts_by_linear(model).values()} == {expected}
    assert torch.equal(logits(model, batch), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model, batch), first)


def test_generation_goes_through_the_adapter(new_base: NewBase, batch: dict[str, Tensor]) -> None:
    """With the key-value cache, token by token, the answers are those of a whole forward."""
    model = attached(new_base(), "per_block")
    tokens = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=-1)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 3, dtype=torch.int64)], 1)
    whole = logits(model, dict(batch, input_ids=tokens, attention_mask=mask))
    assert torch.equal(whole[:, -4:-1].argmax(-1), tokens[:, -3:])
