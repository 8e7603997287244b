"""Find a sample's task from the frozen base's feature of its prompt: the prototype index of CL-MoE."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import normalize

from clmoe.model.adapter import adapted_llava
from clmoe.model.llava import FeatureKind, last_prompt_features
from clmoe.model.prefill import SharedPrompts, shared_prompt_features
from clmoe.utils.tensors import load_tensors, save_tensors

STD_FLOOR = 1e-6


def base_features(model: PeftModel, batch: dict[str, Tensor] | SharedPrompts, kind: FeatureKind = "last") -> Tensor:
    """Features ``[B, D]`` float32 on the CPU of left-padded prompts, with the adapter and a tuned projector off."""
    with model.disable_adapter():
        if isinstance(batch, SharedPrompts):
            return shared_prompt_features(adapted_llava(model), batch, kind).cpu()
        return last_prompt_features(adapted_llava(model), batch, kind).cpu()


@dataclass
class PrototypeIndex:
    """Centre and spread of every task's features; a sample belongs to the nearest centre (CL-MoE, figure 2).

    Features are standardised per dimension with the mean and deviation of all tasks together, which follow from the
    stored moments (law of total variance), so no earlier sample is needed.

    Attributes:
        mean, variance: ``[N, D]`` float64 per task (population variance).
        count: ``[N]`` int64 samples behind them.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    @classmethod
    def empty(cls, width: int) -> "PrototypeIndex":
        none = torch.zeros(0, width, dtype=torch.float64)
        return cls(none, none.clone(), torch.zeros(0, dtype=torch.int64))

    @classmethod
    def load(cls, path: Path) -> "PrototypeIndex":
        """Read the index from ``locator.safetensors``."""
        tensors = load_tensors(path)
        return cls(*(tensors[f"prototype.{name}"] for name in ("mean", "variance", "count")))

    def save(self, path: Path) -> None:
        names = {"mean": self.mean, "variance": self.variance, "count": self.count}
        save_tensors({f"prototype.{name}": tensor.contiguous() for name, tensor in names.items()}, path)

    def append(self, features: Tensor) -> None:
        """Add the next task from its training features ``[M, D]``."""
        values = features.double().cpu()
        self.mean = torch.cat([self.mean, values.mean(0, keepdim=True)])
        self.variance = torch.cat([self.variance, values.var(0, unbiased=False, keepdim=True)])
        self.count = torch.cat([self.count, torch.tensor([len(values)])])

    def standardisation(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation ``[D]`` of all tasks' samples together."""
        weight = (self.count.double() / self.count.sum()).unsqueeze(1)
        mean = (weight * self.mean).sum(0)
        variance = (weight * (self.variance + (self.mean - mean) ** 2)).sum(0)
        return mean, variance.sqrt().clamp(min=STD_FLOOR)

    def scores(
        self,
        features: Tensor,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        radius: Literal["none", "normalised"] = "none",
    ) -> Tensor:
        """Distance of ``features [B, D]`` to each centre, ``[B, N]`` float64, smaller is nearer.

        ``normalised`` divides by the task's radius, the root mean square distance of its own samples to its centre.
        """
        mean, std = self.standardisation()
        z = (features.double().cpu() - mean) / std
        centres = (self.mean - mean) / std
        if distance == "cosine":
            result = 1 - normalize(z, dim=1) @ normalize(centres, dim=1).t()
        else:
            result = torch.cdist(z, centres, compute_mode="donot_use_mm_for_euclid_dist")
        if radius == "normalised":
            result = result / (self.variance / std**2).sum(1).sqrt().clamp(min=STD_FLOOR)
        return result
