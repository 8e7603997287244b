"""O-LoRA (EMNLP 2023 Findings): a LoRA for each task, whose input directions are orthogonal to the older tasks'."""

from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor

from clmoe.bases.llava import LoadedBase
from clmoe.experts.layer import expert_layers, experts_by_linear, seeded
from clmoe.experts.model import freeze_experts, grow_experts
from clmoe.experts.routing import RouteTrace
from clmoe.methods.base import TaskContext, lora_parts_adapter
from clmoe.methods.lora import Lora
from clmoe.utils.schema import NotNegative


@dataclass(frozen=True)
class Options:
    """O-LoRA's own choices.

    Attributes:
        weight: lambda_1 of the orthogonality penalty, 0.5.
        norm: penalise absolute values (the released code) or squares (the paper) of the entries of ``A_i A_t^T``.
    """

    weight: NotNegative = 0.5
    norm: Literal["absolute", "squared"] = "absolute"


class AddedLora(Lora):
    """The tasks' LoRAs are experts without a router: all are added up, and the older ones stay frozen, bit for bit."""

    def adapter(self, base: LoadedBase) -> PeftConfig:
        return lora_parts_adapter(self.config, base, "sum", owners=[0])

    def begin_task(self, context: TaskContext) -> None:
        """Freeze what is there and add a fresh LoRA for the task: A random, B zero."""
        if context.previous is None:
            return
        device, factors = context.base.device, {}
        for name, layer in expert_layers(context.model).items():
            generator = seeded(self.config.seed, f"olora:{context.index}:{name}")
            fresh = {linear: experts.fresh(1, generator) for linear, experts in layer.experts.items()}
            factors[name] = {linear: (A.to(device), B.to(device)) for linear, (A, B) in fresh.items()}
        freeze_experts(context.model, context.index)
        grow_experts(context.model, context.index, factors)


class OLora(AddedLora):
    """The new LoRA's penalty is its overlap with the older ones."""

    Options = Options

    def extra_loss(self, model: PeftModel, trace: RouteTrace, batch: dict[str, Tensor]) -> Tensor | None:
        """``weight * sum over linears and older tasks i of sum |A_i A_t^T|``, the same for every batch."""
        overlaps = []
        for experts in experts_by_linear(model).values():
            if experts.frozen_A is not None:
                overlap = experts.frozen_A @ experts.A.t()  # type: ignore[union-attr]
                overlaps.append((overlap.abs() if self.options.norm == "absolute" else overlap.square()).sum())
        return self.options.weight * torch.stack(overlaps).sum() if overlaps else None


METHODS = {"olora": OLora}
