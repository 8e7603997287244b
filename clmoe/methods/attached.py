"""Sizes of a model and of what a method attaches to it, as the memory formulas take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from clmoe.system.memory import FLOAT32, Attached, LlavaShapes, Tensors, four_bit
from clmoe.utils.tensors import trainable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from peft import LoraConfig, PeftModel
    from torch import Tensor, nn
    from transformers import LlavaForConditionalGeneration

    from clmoe.methods.base import Method


@dataclass(frozen=True)
class TrainingShapes:
    """All that decides how much memory a method's first task takes."""

    llava: LlavaShapes
    attached: Attached
    tensors: Tensors
    dtype_bytes: int
    adapter_bytes: int


def llava_shapes(model: LlavaForConditionalGeneration) -> LlavaShapes:
    """Sizes of a LLaVA, with or without weights."""
    from clmoe.bases.llava import count_image_tokens

    text, vision = cast(Any, model.config.text_config), cast(Any, model.config.vision_config)
    return LlavaShapes(
        hidden=text.hidden_size,
        ffn=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_size=text.head_dim,
        blocks=text.num_hidden_layers,
        vocabulary=model.lm_head.out_features,
        vision_hidden=vision.hidden_size,
        vision_layers=vision.num_hidden_layers,
        image_tokens=count_image_tokens(model),
        patches=int(model.model.vision_tower.embeddings.num_patches) + 1,
    )


def attached_to(model: PeftModel, method: Method) -> Attached:
    """What every block of an adapted model carries."""
    from clmoe.experts.config import ExpertConfig
    from clmoe.experts.model import expert_config, expert_layers

    adapter, projector = method.config.adapter, any("modules_to_save" in n for n, _ in model.named_parameters())
    targets, dropout = tuple(adapter.targets), adapter.dropout > 0
    if not isinstance(model.peft_config[model.active_adapter], ExpertConfig):
        rank = cast("LoraConfig", model.peft_config[model.active_adapter]).r
        return Attached("lora", targets, 1, rank, dropout=dropout, projector=projector)
    config = expert_config(model)
    experts = next(iter(next(iter(expert_layers(model).values())).experts.values()))
    return Attached(
        cast(Any, config.router_scope),
        targets,
        experts.count,
        config.rank,
        top_k=config.router_top_k is not None and config.router_top_k < experts.count,
        balance=hasattr(method.options, "balance_weight"),
        dropout=dropout,
        grown=experts.A is not None and experts.frozen_A is not None,
        projector=projector,
    )


def base_tensors(base: LlavaForConditionalGeneration, quantised: bool) -> tuple[int, int]:
    """Bytes of the base, and of one decoder block. ``quantised``: the blocks' linears are held in four bits."""
    blocks: Iterable[nn.Module] = base.model.language_model.layers
    saved = [_saved(block) if quantised else 0 for block in blocks]
    block = max(_bytes(layer.parameters()) - less for layer, less in zip(blocks, saved, strict=True))
    return _bytes(base.parameters()) + _bytes(base.buffers()) - sum(saved), block


def _saved(block: nn.Module) -> int:
    """Bytes that four-bit linears take less."""
    from torch import nn

    weights = [module.weight for module in block.modules() if isinstance(module, nn.Linear)]
    return _bytes(weights) - four_bit(weight.numel() for weight in weights)


def training_shapes(
    model: PeftModel, method: Method, base: tuple[int, int], llava: LlavaShapes, dtype_bytes: int
) -> TrainingShapes:
    """Read an adapted model; ``base`` is what ``base_tensors`` found before the adapter came."""
    from clmoe.experts.model import adapter_tensors

    trained = trainable(model).values()
    stored = _bytes(adapter_tensors(model).values())
    frozen = _bytes(b for name, b in model.named_buffers() if "clmoe_" in name)
    tensors = Tensors(base[0], frozen, sum(p.numel() for p in trained), _bytes(trained), base[1])
    return TrainingShapes(llava, attached_to(model, method), tensors, dtype_bytes, stored)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def locator_bytes(method: Method, width: int) -> int:
    """What a method that finds tasks stores per task: centre and spread, and a VAE where it has one."""
    if not method.finds_task:
        return 0
    centre = 2 * width * 2 * FLOAT32  # float64
    if method.task_vae is None:
        return centre
    import torch

    from clmoe.locators.vae import TaskVae

    with torch.device("meta"):
        return centre + _bytes(TaskVae(width, method.task_vae).state_dict().values())
