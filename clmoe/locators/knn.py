"""A sample belongs to the task that most of the nearest stored samples come from; nearer ones count more."""

from dataclasses import dataclass

import torch
from torch import Tensor

from clmoe.config import LocatorConfig
from clmoe.locators.base import Asked, Locator
from clmoe.utils.schema import Steps

NEAREST = 1e-12  # floor of the distances, for a stored sample that is asked again


@dataclass(frozen=True)
class Options:
    """How many samples vote and are stored.

    Attributes:
        neighbours: samples that vote, each with the inverse of its distance.
        stored: features that are kept of each task, at most.
    """

    neighbours: Steps = 10
    stored: Steps = 500


class Knn(Locator):
    """The stored features of all tasks, ``[S, D]`` float32, and the task of each, ``[S]`` int64; Euclidean distance."""

    Options = Options
    decisive = ("stored",)

    def __init__(self, config: LocatorConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.stored, self.owner = torch.zeros(0), torch.zeros(0, dtype=torch.int64)

    def fit(self, features: Tensor) -> None:
        kept = features[: self.options.stored].float().cpu()  # they were drawn at random
        number = int(self.owner.max()) + 1 if len(self.owner) else 0
        self.stored = torch.cat([self.stored, kept])
        self.owner = torch.cat([self.owner, torch.full((len(kept),), number)])

    def scores(self, asked: Asked) -> Tensor:
        """The tasks' shares of the vote."""
        assert asked.features is not None
        exact = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(asked.features.double().cpu(), self.stored.double(), compute_mode=exact)
        near = distances.topk(min(self.options.neighbours, len(self.stored)), dim=1, largest=False)
        votes = 1 / near.values.clamp(min=NEAREST)
        shares = votes.new_zeros(len(votes), asked.tasks).scatter_add(1, self.owner[near.indices], votes)
        return shares / shares.sum(1, keepdim=True)

    def state(self) -> dict[str, Tensor]:
        return {"knn.stored": self.stored, "knn.owner": self.owner}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.stored, self.owner = state["knn.stored"], state["knn.owner"]
