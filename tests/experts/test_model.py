"""The LoRA-expert adapter on a LLaVA: what it leaves alone, how it trains, grows, freezes, picks and recomputes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import silu

from clmoe.bases.families import PROJECTOR
from clmoe.bases.llava import LoadedBase, load_base
from clmoe.bases.stack import recompute_activations
from clmoe.config import FFN_PROJECTIONS, ModelConfig
from clmoe.errors import ClmoeError
from clmoe.experts import model as ours
from clmoe.experts.forward import adapted_base, answer_states
from clmoe.experts.layer import experts_by_linear, seeded
from clmoe.experts.routing import RouteSelection, RouteTrace, checkpoint_contexts, routing
from tests import support
from tests.experts.adapters import (
    SCOPES,
    NewBase,
    attached,
    config,
    grow,
    logits,
    old_router,
    randomise,
    routed,
    row,
    same,
    snapshot,
    train_steps,
)

# ---- What is patched, and what the base still outputs


@pytest.mark.parametrize("scope", SCOPES)
def test_fresh_disabled_and_detached_adapters_leave_the_bases_logits_bit_equal(
    scope: str, new_base: NewBase, pristine_base: LoadedBase, batch: dict[str, Tensor]
) -> None:
    base, plain = new_base().model, pristine_base.model
    expected = logits(plain, batch)
    model = ours.attach_adapter(base, config(scope, modules_to_save=[PROJECTOR])).eval()
    assert torch.equal(logits(model, batch), expected)
    randomise(model)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)
    assert not torch.allclose(logits(model, batch), expected, atol=1e-2)
    ours.detach_adapter(model)
    assert torch.equal(logits(base, batch), expected) and same(base.state_dict(), plain.state_dict())
    assert [type(module) for module in base.modules()] == [type(module) for module in plain.modules()]


@pytest.mark.parametrize(
    ("scope", "projections", "names"),
    [
        ("per_linear", FFN_PROJECTIONS, [f"mlp.{name}" for name in FFN_PROJECTIONS]),
        ("per_block", FFN_PROJECTIONS, ["mlp"]),
        ("per_linear", ("q_proj", "o_proj", "down_proj"), ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]),
    ],
)
def test_only_the_language_models_blocks_are_patched(
    scope: str, projections: tuple[str, ...], names: list[str], new_base: NewBase, batch: dict[str, Tensor]
) -> None:
    model = attached(new_base(), scope, projections=list(projections))
    expected = {f"model.language_model.layers.{block}.{name}" for block in (0, 1) for name in names}
    assert set(ours.expert_layers(model)) == expected
    assert logits(model, batch).isfinite().all()


def test_a_config_that_cannot_be_served_is_refused(new_base: NewBase) -> None:
    with pytest.raises(ValueError, match="router_scope"):
        config("per_model")
    for fields in ({}, {"modules_to_save": [PROJECTOR]}):
        with pytest.raises(ClmoeError, match="no_such_proj"):
            ours.attach_adapter(new_base().model, config(projections=["no_such_proj"], **fields))


@pytest.mark.parametrize("scope", SCOPES)
def test_the_patched_ffn_is_the_equation(scope: str, new_base: NewBase) -> None:
    """Oracle: section 3.1 of LLaVA-CMoE / eq. 3 of CL-MoE, written out with dense expert matrices."""
    model = attached(new_base(), scope)
    mlp = ours.adapted_base(model).get_decoder().layers[1].mlp
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

    expected = project("down_proj", silu(project("gate_proj", x)) * project("up_proj", x))
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)


def test_seeded_weights_do_not_depend_on_which_other_modules_exist(new_base: NewBase) -> None:
    every, two, one = (
        ours.adapter_tensors(ours.attach_adapter(new_base().model, config(projections=projections)))
        for projections in (["gate_proj", "up_proj", "down_proj"], ["down_proj", "up_proj"], ["up_proj"])
    )
    assert all(same(some, {name: every[name] for name in some}) for some in (two, one))
    draws = [torch.rand(4, generator=seeded(s, n)).tolist() for s, n in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))]
    assert draws[0] == draws[1] and draws[0] != draws[2] and draws[0] != draws[3]


# ---- What trains, and how it grows


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_every_trainable_parameter_gets_a_gradient(
    scope: str, top_k: int | None, new_base: NewBase, batch: dict[str, Tensor]
) -> None:
    """Experts that no token chose get zero gradients, never None, before and after growth."""
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


def reenable(model: PeftModel) -> None:
    for layer in ours.expert_layers(model).values():
        layer.clmoe_experts.requires_grad_(True)
        layer.clmoe_routers.requires_grad_(True)


@pytest.mark.parametrize("disturb", ["disable_adapter", "set_adapter", "requires_grad_", "reload"])
def test_frozen_experts_and_the_base_survive_what_peft_does_to_parameters(
    disturb: str, new_base: NewBase, pristine_base: LoadedBase, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    """peft switches gradients on by name in all of these; frozen experts are buffers, so it cannot reach them."""
    model = attached(new_base())
    grow(model)
    before = snapshot(model)
    if disturb == "disable_adapter":
        with model.disable_adapter():
            logits(model, batch)
    elif disturb == "set_adapter":
        model.set_adapter("default")
    elif disturb == "requires_grad_":
        reenable(model)
    else:
        model.save_pretrained(str(tmp_path))
        model = ours.load_adapter(new_base().model, tmp_path, trainable=True)
    assert sum(p.requires_grad for p in model.parameters()) == 6 * 3  # A, B and the newest router of each linear
    train_steps(model, batch)
    after = ours.adapter_tensors(model)
    kept = {name for name, tensor in before.items() if torch.equal(after[name], tensor)}
    assert kept == {name for name in before if name.endswith(("frozen_A", "frozen_B", "instance.0.weight"))}
    base = ours.adapted_base(model)
    ours.detach_adapter(model)
    assert same(base.state_dict(), pristine_base.model.state_dict())


def test_a_tuned_projector_on_a_16_bit_base_starts_as_the_bases_trains_and_is_saved_in_float32(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """The projector is float32 in memory and on disk, but computes in the base's dtype."""
    base, another = (load_base(ModelConfig(path=str(tiny_folder), dtype="bfloat16")) for _ in range(2))
    batch = support.prompt_batch(base, ["What is it?", "How many things are there?"])
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    before = logits(base.model, batch)
    model = ours.attach_adapter(base.model, config(modules_to_save=[PROJECTOR])).eval()
    assert before.dtype == torch.bfloat16 and torch.equal(logits(model, batch), before)
    tuned = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    assert len(tuned) == 4 and all(p.dtype == torch.float32 and p.requires_grad for p in tuned)
    old = [p.detach().clone() for p in tuned]
    train_steps(model, batch, steps=2, lr=2e-5)
    assert all(0 < (p - start).abs().max() < 1e-4 for p, start in zip(tuned, old, strict=True))
    assert any(not torch.equal(p, p.bfloat16().float()) for p in tuned), "bfloat16 could not hold it"
    model.save_pretrained(str(tmp_path))
    live = ours.adapter_tensors(model)
    assert {tensor.dtype for tensor in live.values()} == {torch.float32}
    again = ours.load_adapter(another.model, tmp_path, trainable=True)
    assert same(live, ours.adapter_tensors(again))
    assert sum(p.requires_grad for name, p in again.named_parameters() if "modules_to_save" in name) == 4


# ---- Parts without routers, picked by task


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


# ---- Activation checkpointing


MIXED, OTHER = routed(1, 0, 1), routed(0, 1, 0)


def gradients(
    model: PeftModel, batch: dict[str, Tensor], selection: RouteSelection, interrupt: bool = False
) -> dict[str, Tensor]:
    """A loss on the answers' states and on the routers alone, and every trainable parameter's gradient.

    With ``interrupt``, another forward pass under another routing comes between forward and backward.
    """
    llava = adapted_base(model).train()
    with routing(selection, trace := RouteTrace()):
        loss = answer_states(llava, batch).square().sum()
    for output in trace.outputs.values():  # a loss of the Switch Transformer's form
        loss = loss + (output.gate.gt(0).float().mean((0, 1)) * output.gate.mean((0, 1))).sum()
    if interrupt:
        with torch.no_grad(), routing(OTHER):
            answer_states(llava, batch)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("grown", [False, True])
def test_checkpointing_changes_no_bit_of_loss_and_gradients(
    scope: str, top_k: int | None, grown: bool, new_base: NewBase, answers: dict[str, Tensor]
) -> None:
    def made() -> PeftModel:
        model = attached(new_base(), scope, router_top_k=top_k)
        if grown:
            grow(model)
        return model

    selection = MIXED if grown else RouteSelection()
    expected = gradients(made(), answers, selection)
    checkpointed, calls, embedded = made(), [], []
    llava = adapted_base(checkpointed)
    recompute_activations(llava, use_reentrant=False, context_fn=checkpoint_contexts)
    llava.get_input_embeddings().register_forward_hook(lambda *seen: embedded.append(seen[-1].requires_grad))
    llava.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(True))
    got = gradients(checkpointed, answers, selection, interrupt=grown)
    assert len(calls) == 2 + grown, "the block is recomputed"
    assert embedded and not any(embedded), "no gradient goes back beyond what trains, through a frozen tower, say"
    assert same(expected, got) and len(got) == 1 + 2 * (9 if scope == "per_linear" else 7)
    if grown:
        other = gradients(made(), answers, OTHER)
        assert not any(torch.equal(expected[name], other[name]) for name in expected)
