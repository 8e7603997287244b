"""Nearest class mean: a sample belongs to the task whose mean feature is nearest."""

import torch
from torch import Tensor

from clmoe.config import LocatorConfig
from clmoe.locators.base import Asked, Locator


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
