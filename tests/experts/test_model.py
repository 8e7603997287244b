"""The LoRA-expert adapter on a LLaVA: what it leaves alone, what trains, how it grows and freezes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from clmoe.bases.llava import LoadedBase, load_base
from clmoe.config import FFN_PROJECTIONS, ModelConfig
from clmoe.errors import ClmoeError
from clmoe.experts import model as ours
from clmoe.experts.config import PROJECTOR
from clmoe.experts.layer import seeded
from clmoe.experts.routing import RouteSelection
from clmoe.train.task import save_adapter
from tests import support
from tests.experts.adapters import SCOPES, attached, config, grow, logits, old_router, randomise
from tests.runs import Runs, same_bits, tensors

NewBase = Callable[[], LoadedBase]


# ---- What is patched, and what the base still says


@pytest.mark.parametrize("scope", SCOPES)
def test_fresh_disabled_and_unloaded_adapters_leave_the_bases_logits_bit_equal(
    scope: str, new_base: NewBase, pristine_base: LoadedBase, batch: dict[str, Tensor]
) -> None:
    expected = logits(pristine_base.model, batch)
    fresh = ours.attach_adapter(new_base().model, config(scope, modules_to_save=[PROJECTOR])).eval()
    assert torch.equal(logits(fresh, batch), expected)
    model = randomise(fresh)
    assert not torch.allclose(logits(model, batch), expected, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)
    assert not torch.allclose(logits(model, batch), expected, atol=1e-2)


@pytest.mark.parametrize("scope", SCOPES)
def test_unloading_gives_the_base_back(
    scope: str, new_base: NewBase, pristine_base: LoadedBase, batch: dict[str, Tensor]
) -> None:
    base = attached(new_base(), scope).unload()
    assert torch.equal(logits(base, batch), logits(pristine_base.model, batch))
    assert base.state_dict().keys() == pristine_base.model.state_dict().keys()
    assert [type(m) for m in base.modules()] == [type(m) for m in pristine_base.model.modules()]


@pytest.mark.parametrize("scope", SCOPES)
def test_only_the_language_models_blocks_are_patched(scope: str, new_base: NewBase) -> None:
    model = attached(new_base(), scope)
    names = {"mlp"} if scope == "per_block" else {f"mlp.{name}" for name in FFN_PROJECTIONS}
    expected = {f"model.language_model.layers.{block}.{name}" for block in (0, 1) for name in names}
    assert set(ours.expert_layers(model)) == expected
    tower = ours.adapted_base(model).model.vision_tower
    assert not any(isinstance(module, ours.ExpertLayer) for module in tower.modules())
    assert sum(name.endswith(".mlp") for name, _ in tower.named_modules()) == support.SIZES.vision_layers


def test_attention_linears_can_carry_experts_too(new_base: NewBase, batch: dict[str, Tensor]) -> None:
    model = attached(new_base(), projections=["q_proj", "o_proj", "down_proj"])
    parts = {name.split("layers.0.")[1] for name in ours.expert_layers(model) if "layers.0." in name}
    assert parts == {"self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"}
    assert logits(model, batch).isfinite().all()


def test_a_config_that_cannot_be_served_is_refused() -> None:
    with pytest.raises(ValueError, match="router_scope"):
        config("per_model")
    with pytest.raises(ValueError, match="per_block"):
        config("per_block", projections=["q_proj"])


def test_targets_that_do_not_exist_are_an_error(tiny_base: LoadedBase) -> None:
    with pytest.raises((ClmoeError, ValueError), match="no_such_proj"):
        ours.attach_adapter(tiny_base.model, config(projections=["no_such_proj"]))


@pytest.mark.parametrize("scope", SCOPES)
def test_the_patched_ffn_is_the_equation(scope: str, new_base: NewBase) -> None:
    """Layer 3.1 of LLaVA-CMoE / eq. 3 of CL-MoE written out with dense expert matrices."""
    model = attached(new_base(), scope)
    mlp = ours.adapted_base(model).model.language_model.layers[1].mlp
    layers = {name.rpartition(".")[2]: layer for name, layer in ours.expert_layers(model).items() if ".1.mlp" in name}
    x = torch.randn(2, 3, support.SIZES.text_hidden)

    def project(name: str, value: Tensor) -> Tensor:
        layer = layers.get(name, layers.get("mlp"))
        weight = (layer.base_layer if scope == "per_linear" else getattr(layer.base_layer, name)).weight
        router_input = value if scope == "per_linear" else x
        gate = (router_input @ layer.routers.instance[0].weight.T).softmax(-1)
        A, B = layer.experts[name].A, layer.experts[name].B
        delta = torch.einsum("oer,eri->eoi", B.view(len(B), 3, 2), A.view(3, 2, -1))
        return value @ weight.T + 2.0 * torch.einsum("bte,eoi,bti->bto", gate, delta, value)

    expected = project("down_proj", torch.nn.functional.silu(project("gate_proj", x)) * project("up_proj", x))
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)


# ---- Initial weights


def test_seeded_weights_do_not_depend_on_which_other_modules_exist(new_base: NewBase) -> None:
    def weights(projections: list[str], **fields: object) -> dict[str, Tensor]:
        model = ours.attach_adapter(new_base().model, config(projections=projections, **fields))
        return ours.adapter_tensors(model)

    torch.manual_seed(1)
    every = weights(["gate_proj", "up_proj", "down_proj"])
    torch.manual_seed(2)
    torch.rand(3)
    for projections in (["down_proj", "up_proj"], ["up_proj"]):
        for name, tensor in weights(projections).items():
            assert torch.equal(tensor, every[name]), name
    mlp = "model.language_model.layers.0.mlp"
    gate, up = (every[ours.tensor_name(f"{mlp}.{p}", f"clmoe_experts.{p}.A")] for p in ("gate_proj", "up_proj"))
    assert not torch.equal(gate, up)


def test_seeded_generators_differ_by_seed_and_by_name() -> None:
    draws = [torch.rand(4, generator=seeded(s, n)).tolist() for s, n in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2] and draws[0] != draws[3]


# ---- What trains


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_every_trainable_parameter_gets_a_gradient(
    scope: str, top_k: int | None, new_base: NewBase, batch: dict[str, Tensor]
) -> None:
    """Zeros for experts that no token chose, never None, before and after growth."""
    model = attached(new_base(), scope, router_top_k=top_k, modules_to_save=[PROJECTOR]).train()
    for step in range(2):
        if step:
            grow(model)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert all("clmoe_" in name or "modules_to_save" in name for name in trainable)
        assert sum("clmoe_routers" in name for name in trainable) == len(ours.expert_layers(model))
        model.zero_grad(set_to_none=True)
        model(**batch).logits.square().mean().backward()
        assert [name for name, p in trainable.items() if p.grad is None] == []
        assert all(p.grad.abs().sum() > 0 for name, p in trainable.items() if name.endswith(".B"))


def test_parameter_counts_include_the_frozen_experts(new_base: NewBase) -> None:
    model = attached(new_base(), "per_block")
    D, F, blocks = support.SIZES.text_hidden, support.SIZES.text_ffn, support.SIZES.text_layers
    one_expert, router_row = 3 * 2 * (D + F), D
    assert ours.count_parameters(model) == (blocks * (3 * one_expert + 3 * router_row),) * 2
    grow(model)
    new = blocks * (2 * one_expert + 5 * router_row)
    assert ours.count_parameters(model) == (new, new + blocks * (3 * one_expert + 3 * router_row))


def train_steps(model: PeftModel, batch: dict[str, Tensor], steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).logits.square().mean().backward()
        optimizer.step()
    model.eval()


# ---- Growth and freezing


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("top_k", [None, 2])
def test_growth_and_training_leave_the_old_routers_answers_bit_equal(
    scope: str, top_k: int | None, new_base: NewBase, batch: dict[str, Tensor]
) -> None:
    model = attached(new_base(), scope, router_top_k=top_k)
    before = logits(model, batch)
    grow(model)
    assert ours.expert_config(model).layout == {"0": [0, 0, 0, 1, 1], "1": [0, 0, 0, 1, 1]}
    assert ours.expert_config(model).router_owners == [0, 1]
    assert torch.equal(logits(model, batch, old_router(3)), before)
    newest = logits(model, batch)
    train_steps(model, batch)
    assert torch.equal(logits(model, batch, old_router(3)), before)
    assert not torch.allclose(logits(model, batch), newest, atol=1e-3)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_batch_with_several_routers_equals_its_samples_one_by_one(
    scope: str, new_base: NewBase, pristine_base: LoadedBase
) -> None:
    model = attached(new_base(), scope)
    grow(model, owner=1, count=2)
    grow(model, owner=2, count=1)
    assert [e.count for e in ours.experts_by_linear(model).values()] == [6] * 6
    same_length = [f"How many things are {word}?" for word in ("there", "left", "right")]
    batch = support.prompt_batch(pristine_base, same_length)
    assert batch["attention_mask"].all()
    index = torch.tensor([1, 0, 2])
    together = logits(model, batch, RouteSelection(router=index))
    for row in range(3):
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        expected = logits(model, alone, RouteSelection(router=index[row : row + 1]))
        torch.testing.assert_close(together[row], expected[0], rtol=1e-5, atol=1e-5)
        other = logits(model, alone, RouteSelection(router=(index[row : row + 1] + 1) % 3))
        assert not torch.allclose(other, expected, atol=1e-2)


def frozen_tensors(model: PeftModel) -> dict[str, Tensor]:
    kinds = ("frozen_A", "frozen_B", "instance.0.weight")
    return {n: t.clone() for n, t in ours.adapter_tensors(model).items() if n.endswith(kinds)}


@pytest.mark.parametrize("disturb", ["nothing", "disable_adapter", "set_adapter", "requires_grad_", "reload"])
def test_frozen_experts_survive_what_peft_does_to_parameters(
    disturb: str, new_base: NewBase, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    """peft switches gradients on by name in all of these; frozen experts are buffers, so it cannot reach them."""
    base = new_base()
    model = attached(base)
    grow(model)
    before, frozen_base = frozen_tensors(model), base.model.state_dict()
    frozen_base = {name: tensor.clone() for name, tensor in frozen_base.items() if "clmoe_" not in name}
    if disturb == "disable_adapter":
        with model.disable_adapter():
            logits(model, batch)
    elif disturb == "set_adapter":
        model.set_adapter("default")
    elif disturb == "requires_grad_":
        for layer in ours.expert_layers(model).values():
            layer.clmoe_experts.requires_grad_(True)
            layer.clmoe_routers.requires_grad_(True)
    elif disturb == "reload":
        model.save_pretrained(str(tmp_path))
        base = new_base()
        model = ours.load_adapter(base.model, tmp_path, trainable=True)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 6 * 3  # A, B and the newest router of each of the six linears
    assert not any("frozen" in name or "instance.0" in name for name in trainable)
    newest = {n: t.clone() for n, t in ours.adapter_tensors(model).items() if n not in before}
    train_steps(model, batch)
    after = ours.adapter_tensors(model)
    assert len(before) == 6 * 3 and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(not torch.equal(after[name], tensor) for name, tensor in newest.items())
    assert all(torch.equal(base.model.state_dict()[name], tensor) for name, tensor in frozen_base.items())


def test_linears_of_a_block_must_grow_alike(new_base: NewBase) -> None:
    model = attached(new_base())
    name = next(iter(ours.expert_layers(model)))
    linear, experts = next(iter(ours.expert_layers(model)[name].experts.items()))
    with pytest.raises(ValueError, match="block 0 would have different numbers"):
        ours.grow_experts(model, 1, {name: {linear: experts.fresh(1, torch.Generator())}})


def test_detaching_gives_the_base_back_with_its_own_projector(
    new_base: NewBase, pristine_base: LoadedBase, batch: dict[str, Tensor]
) -> None:
    base = new_base()
    model = attached(base, modules_to_save=[PROJECTOR])
    assert not torch.allclose(logits(model, batch), logits(pristine_base.model, batch), atol=1e-2)
    ours.detach_adapter(model)
    assert base.model.state_dict().keys() == pristine_base.model.state_dict().keys()
    assert torch.equal(logits(base.model, batch), logits(pristine_base.model, batch))


# ---- A tuned projector on a 16-bit base: float32 in memory and on disk, computed in the base's dtype


@pytest.fixture
def half_base(tiny_folder: Path) -> Callable[[], LoadedBase]:
    return lambda: load_base(ModelConfig(path=str(tiny_folder), dtype="bfloat16"))


def batch_of(base: LoadedBase) -> dict[str, torch.Tensor]:
    batch = support.prompt_batch(base, ["What is it?", "How many things are there?"])
    return batch | {"pixel_values": batch["pixel_values"].bfloat16()}


def test_an_untrained_copy_is_float32_and_changes_no_bit(half_base: Callable[[], LoadedBase]) -> None:
    base = half_base()
    before = logits(base.model, batch_of(base))
    model = ours.attach_adapter(base.model, config(modules_to_save=[PROJECTOR])).eval()
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
    loaded = ours.load_adapter(half_base().model, tmp_path, trainable=True)
    for name, value in ours.adapter_tensors(model).items():
        assert same_bits(ours.adapter_tensors(loaded)[name], value), name
    projector = {name: p for name, p in loaded.named_parameters() if "modules_to_save" in name}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in projector.values())
    assert any(not torch.equal(p, p.bfloat16().float()) for p in projector.values()), "bfloat16 could not hold it"


def test_training_moves_it_by_less_than_bfloat16_could(runs: Runs, tmp_path: Path) -> None:
    settings = ("model.dtype=bfloat16", "training.projector_learning_rate=2e-5", "training.steps=2")
    first = runs.train(tmp_path / support.TASKS[0], "clmoe", support.TASKS[0], *settings)
    second = runs.train(tmp_path / support.TASKS[1], "clmoe", support.TASKS[1], *settings, previous=first)
    for earlier, later in zip(tensors(first).items(), tensors(second).items(), strict=True):
        if PROJECTOR in earlier[0]:
            moved = (later[1] - earlier[1]).abs()
            assert later[1].dtype == torch.float32 and 0 < moved.max() < 1e-4, later[0]
