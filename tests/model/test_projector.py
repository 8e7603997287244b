"""A tuned projector on a base of 16 bits: float32 in memory and on disk, computed in the base's type."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from clmoe.config import ModelConfig
from clmoe.model.adapter import PROJECTOR, adapter_tensors, attach_adapter, load_adapter
from clmoe.model.llava import LoadedBase, load_base
from clmoe.train.task import save_adapter
from tests.model.adapters import attached, config, logits
from tests.runs import Runs, same_bits, tensors
from tests.support import TASKS, prompt_batch


@pytest.fixture
def half_base(tiny_folder: Path) -> Callable[[], LoadedBase]:
    return lambda: load_base(ModelConfig(path=str(tiny_folder), dtype="bfloat16"))


def batch_of(base: LoadedBase) -> dict[str, torch.Tensor]:
    batch = prompt_batch(base, ["What is it?", "How many things are there?"])
    return batch | {"pixel_values": batch["pixel_values"].bfloat16()}


def test_an_untrained_copy_is_float32_and_changes_no_bit(half_base: Callable[[], LoadedBase]) -> None:
    base = half_base()
    before = logits(base.model, batch_of(base))
    model = attach_adapter(base.model, config(modules_to_save=[PROJECTOR])).eval()
    tuned = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    assert len(tuned) == 4 and all(p.dtype == torch.float32 and p.requires_grad for p in tuned)
    after = logits(model, batch_of(base))
    assert after.dtype == torch.bfloat16 and torch.equal(after, before)


def test_it_is_saved_and_loaded_without_rounding(half_base: Callable[[], LoadedBase], tmp_path: Path) -> None:
    model = attached(half_base(), modules_to_save=[PROJECTOR])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1e-5 * torch.randn_like(parameter))
    save_adapter(model, tmp_path)
    loaded = load_adapter(half_base().model, tmp_path, trainable=True)
    for name, value in adapter_tensors(model).items():
        assert same_bits(adapter_tensors(loaded)[name], value), name
    projector = {name: p for name, p in loaded.named_parameters() if "modules_to_save" in name}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in projector.values())
    assert any(not torch.equal(p, p.bfloat16().float()) for p in projector.values()), "bfloat16 could not hold it"


def test_training_moves_it_by_less_than_bfloat16_could(runs: Runs, tmp_path: Path) -> None:
    settings = ("model.dtype=bfloat16", "training.projector_learning_rate=2e-5", "training.steps=2")
    first = runs.train(tmp_path / TASKS[0], "clmoe", TASKS[0], *settings)
    second = runs.train(tmp_path / TASKS[1], "clmoe", TASKS[1], *settings, previous=first)
    for earlier, later in zip(tensors(first).items(), tensors(second).items(), strict=True):
        if PROJECTOR in earlier[0]:
            moved = (later[1] - earlier[1]).abs()
            assert later[1].dtype == torch.float32 and 0 < moved.max() < 1e-4, later[0]


def test_upstream_still_has_this_form(half_base: Callable[[], LoadedBase]) -> None:
    projector = half_base().model.model.multi_modal_projector
    assert type(projector) is LlavaMultiModalProjector
    assert [name for name, _ in projector.named_children()] == ["linear_1", "act", "linear_2"]
