"""Gradients of the frozen weights under the adapters, which KeepLoRA decomposes."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from clmoe.bases.inputs import train_dataset
from clmoe.experts.forward import enable_checkpointing
from clmoe.experts.layer import ExpertLayer, expert_layers
from clmoe.methods.base import TaskContext, loss_gradients


def weight(layer: ExpertLayer) -> Tensor:
    """The frozen weight of a patched linear, ``[dout, din]``."""
    return cast(Tensor, layer.base_layer.weight)


def frozen_gradients(context: TaskContext, share: float, blocks: int) -> Iterator[dict[str, Tensor]]:
    """Yield ``blocks`` blocks' linears with the mean gradients of their weights, ``[dout, din]`` float32.

    The mean is over an evenly spaced ``share`` of the task's records, without dropout. Each dictionary is emptied
    before the next one is computed.
    """
    training, layers = context.config.training, expert_layers(context.model)
    dataset = train_dataset(context.base, context.records, context.image_root, training.max_length)
    rows = torch.linspace(0, len(dataset) - 1, max(1, int(share * len(dataset)))).long().tolist()
    numbers = list(dict.fromkeys(layer.block for layer in layers.values()))
    model, size = context.model.eval(), training.micro_batch_size or training.batch_size
    if training.gradient_checkpointing:  # transformers recomputes activations in training mode only
        enable_checkpointing(model)
        model.train()
        for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
            dropout.eval()
    for start in range(0, len(numbers), blocks):
        here = numbers[start : start + blocks]
        group = {name: weight(layer) for name, layer in layers.items() if layer.block in here}
        for parameter in group.values():
            parameter.requires_grad_(True)
        try:
            found = loss_gradients(model, context.base, dataset, rows, list(group.values()), size, "sample")
        finally:
            for parameter in group.values():
                parameter.requires_grad_(False)
        gradients = dict(zip(group, found, strict=True))
        del found
        yield gradients
        gradients.clear()
    model.eval()
