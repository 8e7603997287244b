"""The memory formulas against what autograd really saves, and against every storage that is really alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clmoe.bases.llava import LoadedBase, _four_bit, load_base
from clmoe.config import ModelConfig
from clmoe.experts.model import add_routers, attach_adapter, expert_layers, freeze_experts, grow_experts
from clmoe.methods import method_class
from clmoe.methods.attached import attached_to, llava_shapes
from clmoe.methods.base import Method
from clmoe.system.memory import (
    Attached,
    LlavaShapes,
    Micro,
    Sharding,
    Tensors,
    activation_peak,
    adapter_kept,
    all_kept,
    block_kept,
    four_bit,
    training_state,
)
from clmoe.train.loss import TrainedModel, enable_checkpointing
from tests.support import pixels, tiny_config

SAMPLES, TOKENS, ANSWERS = 3, 40, 4
FROZEN_PROJECTOR = "adapter.train_projector=false"
HALF = "model.dtype=bfloat16"
VARIANTS: list[tuple[str, tuple[str, ...]]] = [
    ("lora", ()),
    ("lora", (HALF,)),
    ("lora", (FROZEN_PROJECTOR, "adapter.targets=[up_proj]")),
    ("lora", ("adapter.targets=[down_proj,o_proj]", "adapter.dropout=0.1", "model.attention=eager", HALF)),
    ("moelora", ()),
    ("moelora", (HALF,)),
    ("moelora", (HALF, "model.attention=eager")),
    ("moelora", (FROZEN_PROJECTOR, "adapter.targets=[o_proj]")),
    ("moelora", (FROZEN_PROJECTOR, "adapter.targets=[down_proj]")),
    ("moelora", ("adapter.router_scope=per_block",)),
    ("clmoe_released", ()),
    ("clmoe_released", (HALF,)),
    ("clmoe_released", ("adapter.dropout=0",)),
    ("llava_cmoe", (FROZEN_PROJECTOR,)),
    ("llava_cmoe", (FROZEN_PROJECTOR, HALF)),
]
IDS = ["-".join([name, *(o.partition("=")[2] for o in overrides)]) for name, overrides in VARIANTS]
Trainable = tuple[TrainedModel, PeftModel, Method, LoadedBase]


def trainable(folder: Path, name: str, overrides: Iterable[str]) -> Trainable:
    """A method's model, ready for a step."""
    config = tiny_config(name, folder, *overrides)
    base = load_base(config.model)
    method = method_class(config.method)(config)
    model = attach_adapter(base.model, method.adapter(base))
    return TrainedModel(model, method, SAMPLES).train(), model, method, base


def batch(base: LoadedBase) -> dict[str, Tensor]:
    """Three samples with a picture each, one of them padded."""
    ids = torch.full((SAMPLES, TOKENS), 5)
    ids[:, 2 : 2 + base.image_token_count] = base.model.config.image_token_index
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    labels = torch.full_like(ids, -100)
    labels[:, 30 : 30 + ANSWERS] = 7
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "num_items_in_batch": torch.tensor(SAMPLES * ANSWERS),
        "pixel_values": pixels(SAMPLES).to(base.model.dtype),
    }


def planned(model: PeftModel, method: Method, base: LoadedBase) -> tuple[LlavaShapes, Attached, Micro]:
    config: ModelConfig = method.config.model
    micro = Micro(SAMPLES, TOKENS, ANSWERS, base.model.dtype.itemsize, config.attention, "cpu")
    return llava_shapes(base.model), attached_to(model, method), micro


def saved_bytes(trained: TrainedModel, inputs: dict[str, Tensor]) -> int:
    """Bytes of all storages that autograd saves, parameters, buffers and inputs left out."""
    known = {t.untyped_storage().data_ptr() for t in (*trained.parameters(), *trained.buffers(), *inputs.values())}
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor keeps its address from being reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trained(**inputs)
    return sum(size for size, _ in found.values())


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and nothing has freed yet."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or not size:
            return
        self.seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


# ---- Activations


@pytest.mark.parametrize(("name", "overrides"), VARIANTS, ids=IDS)
def test_what_is_kept_is_what_autograd_saves(name: str, overrides: tuple[str, ...], tiny_folder: Path) -> None:
    trained, model, method, base = trainable(tiny_folder, name, overrides)
    assert all_kept(*planned(model, method, base)) == pytest.approx(saved_bytes(trained, batch(base)), rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grown_experts_are_joined_in_every_pass(dtype: str, tiny_folder: Path) -> None:
    trained, model, method, base = trainable(tiny_folder, "llava_cmoe", (FROZEN_PROJECTOR, f"model.dtype={dtype}"))
    layers = expert_layers(model)
    freeze_experts(model, 1)
    grow_experts(
        model,
        1,
        {n: {k: e.fresh(1, torch.Generator()) for k, e in layer.experts.items()} for n, layer in layers.items()},
    )
    add_routers(model, 1, {name: torch.zeros(5, 48) for name in layers})
    shapes, attached, micro = planned(model, method, base)
    assert (attached.experts, attached.grown) == (5, True)
    assert all_kept(shapes, attached, micro) == pytest.approx(saved_bytes(trained, batch(base)), rel=0.01)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("name", "overrides"), VARIANTS, ids=IDS)
def test_the_peak_is_what_is_alive(name: str, overrides: tuple[str, ...], recompute: bool, tiny_folder: Path) -> None:
    trained, model, method, base = trainable(tiny_folder, name, overrides)
    inputs = batch(base)
    if recompute:
        enable_checkpointing(model)
    trained(**inputs)["loss"].backward()  # so that gradients exist, which are no activations
    gradients = [p.grad for p in trained.parameters() if p.grad is not None]
    with Alive([*trained.parameters(), *trained.buffers(), *inputs.values(), *gradients]) as alive:
        loss = trained(**inputs)["loss"]
        forward = alive.now
        loss.backward()
    what = planned(model, method, base)
    assert all_kept(*what, recompute) == pytest.approx(forward, rel=0.03)
    assert activation_peak(*what, recompute) == pytest.approx(alive.most, rel=0.1 if recompute else 0.03)


SEVEN_B = LlavaShapes(4096, 11008, 32, 32, 128, 32, 32064, 1024, 24, 576, 577)
FFN = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(("kind", "inputs"), [("per_block", 4096), ("per_linear", 4096 + 11008)])
def test_what_the_packed_experts_of_a_7b_model_keep(kind: Literal["per_block", "per_linear"], inputs: int) -> None:
    """Per token and layer, in bytes: the linears' inputs, 2 (4096 + 11008) with a router for each linear, and one
    rank-sized product for each linear, 2 * 32; one router per block leaves the FFN's product to be made again.
    """
    kept = adapter_kept(SEVEN_B, Attached(kind, FFN, 8, 4), Micro(16, 640, 16, 2))
    routers = 4 * 8 * (1 if kind == "per_block" else 3)  # float32 gates
    assert kept - routers == 2 * inputs + 3 * 2 * 32 + 3 * 2 * 8, "and the gate of each product"


def test_eager_attention_keeps_a_square() -> None:
    """Float32 and bfloat16 probabilities of 32 heads: twice the tokens keep that much more than twice the bytes."""
    attached = Attached("lora", ("up_proj",), 1, 64)
    one, two = (block_kept(SEVEN_B, attached, Micro(1, tokens, 16, 2, "eager")) for tokens in (1000, 2000))
    assert two - 2 * one == 2 * 1000**2 * 32 * (4 + 2)


# ---- State


HELD = Tensors(base=14_000, frozen=100, trainable=500, trainable_bytes=2000, largest_block=400)
STATES: list[tuple[str, Sharding, dict[str, int], int]] = [
    ("alone", Sharding(), {"gradients": 2000, "optimizer": 4000, "communication": 0}, 0),
    ("ddp", Sharding(4), {"gradients": 2000, "optimizer": 4000, "communication": 2000}, 0),
    ("zero2", Sharding(4, 2, bucket=10), {"gradients": 500, "optimizer": 1500, "communication": 40}, 0),
    ("offload", Sharding(4, 2, True, 10), {"gradients": 0, "optimizer": 0, "communication": 40}, 2000),
    (
        "zero3",
        Sharding(4, 3, bucket=10, prefetch=7),
        {"base weights": 3500, "adapter weights": 600, "gradients": 500, "optimizer": 1000, "communication": 468},
        0,
    ),
]


@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (1024, 4096)])
def test_four_bit_weights_are_what_double_quantisation_stores(shape: tuple[int, int]) -> None:
    """Counted tensor by tensor, as bitsandbytes stores them; the loader's setting is the one that is counted."""
    weights = shape[0] * shape[1]
    packed = torch.empty(weights // 2, dtype=torch.uint8, device="meta")
    maxima = torch.empty(weights // 64, dtype=torch.uint8, device="meta")
    outer = torch.empty(len(maxima) // 256, dtype=torch.float32, device="meta")
    assert four_bit([weights]) == packed.nbytes + maxima.nbytes + outer.nbytes
    assert _four_bit(ModelConfig(load_in_4bit=True), "cuda")["quantization_config"].bnb_4bit_use_double_quant


@pytest.mark.parametrize(("how", "parts", "host"), [row[1:] for row in STATES], ids=[row[0] for row in STATES])
def test_state_is_cut_as_zero_cuts_it(how: Sharding, parts: dict[str, int], host: int) -> None:
    """500 float32 parameters on four GPUs: 2,000 bytes of gradients, 4,000 of moments, 2,000 of masters."""
    state = training_state(HELD, how)
    assert state.gpu == {"base weights": 14_000, "adapter weights": 2100} | parts
    assert state.total == sum(state.gpu.values())
    assert state.host == host


def test_adamw_holds_what_the_formula_says(tiny_folder: Path) -> None:
    trained, _, _, base = trainable(tiny_folder, "moelora", (HALF,))
    trained_parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained_parameters)
    trained(**batch(base))["loss"].backward()
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for key, t in state.items() if key != "step")
    size = sum(p.nbytes for p in trained_parameters)
    held = Tensors(0, 0, sum(p.numel() for p in trained_parameters), size, 0)
    state = training_state(held, Sharding())
    assert state.gpu["optimizer"] == moments
    assert state.gpu["gradients"] == sum(p.grad.nbytes for p in trained_parameters if p.grad is not None)
