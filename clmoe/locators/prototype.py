"""A sample belongs to the nearest centre, of plain features or of standardised ones."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clmoe.config import LocatorConfig
from clmoe.locators.base import Asked, Locator

STD_FLOOR = 1e-6


class NearestMean(Locator):
    """Euclidean distance to the mean of each task's training features, without any standardisation."""

    def __init__(self, config: LocatorConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.means: list[Tensor] = []

    def fit(self, features: Tensor) -> None:
        self.means.append(features.double().cpu().mean(0))

    def scores(self, asked: Asked) -> Tensor:
        assert asked.features is not None
        centres = torch.stack(self.means[: asked.tasks])
        return -torch.cdist(asked.features.double(), centres, compute_mode="donot_use_mm_for_euclid_dist")

    def state(self) -> dict[str, Tensor]:
        return {"means": torch.stack(self.means)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.means = list(state["means"])


@dataclass(frozen=True)
class Options:
    """*Open* in the paper: how a sample finds the nearest centre.

    Attributes:
        distance: distance to the centres.
        radius: ``normalised`` divides a task's distances by the root mean square distance of its own samples.
    """

    distance: Literal["euclidean", "cosine"] = "euclidean"
    radius: Literal["none", "normalised"] = "none"


class Prototype(Locator):
    """CL-MoE's task index (CVPR 2025, figure 2): features are standardised over all tasks' samples together.

    ``mean`` and population ``variance`` of each task are ``[N, D]`` float64, its ``count [N]`` int64.
    """

    Options = Options

    def __init__(self, config: LocatorConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.mean = self.variance = torch.zeros(0, dtype=torch.float64)
        self.count = torch.zeros(0, dtype=torch.int64)

    def fit(self, features: Tensor) -> None:
        values = features.double().cpu()
        self.mean = torch.cat([self.mean, values.mean(0, keepdim=True)])
        self.variance = torch.cat([self.variance, values.var(0, unbiased=False, keepdim=True)])
        self.count = torch.cat([self.count, torch.tensor([len(values)])])

    def standardisation(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``[D]`` of all tasks' samples together, by the law of total variance."""
        weight = (self.count.double() / self.count.sum()).unsqueeze(1)
        mean = (weight * self.mean).sum(0)
        variance = (weight * (self.variance + (self.mean - mean) ** 2)).sum(0)
        return mean, variance.sqrt().clamp(min=STD_FLOOR)

    def scores(self, asked: Asked) -> Tensor:
        assert asked.features is not None
        mean, std = self.standardisation()
        z = (asked.features.double().cpu() - mean) / std
        centres = (self.mean - mean) / std
        if self.options.distance == "cosine":
            distance = 1 - normalize(z, dim=1) @ normalize(centres, dim=1).t()
        else:
            distance = torch.cdist(z, centres, compute_mode="donot_use_mm_for_euclid_dist")
        if self.options.radius == "normalised":
            distance = distance / (self.variance / std**2).sum(1).sqrt().clamp(min=STD_FLOOR)
        return -distance

    def state(self) -> dict[str, Tensor]:
        return {f"prototype.{name}": getattr(self, name) for name in ("mean", "variance", "count")}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.mean, self.variance, self.count = (state[f"prototype.{name}"] for name in ("mean", "variance", "count"))
