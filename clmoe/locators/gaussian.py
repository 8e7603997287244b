"""A Gaussian per task: a sample belongs to the task under which its feature is likeliest (discriminant analysis)."""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from clmoe.config import LocatorConfig
from clmoe.locators.base import Asked, Locator

VARIANCE_FLOOR = 1e-6  # added to every dimension: a single or constant sample has no covariance


@dataclass(frozen=True)
class Options:
    """How many covariances there are.

    Attributes:
        covariance: ``shared``, the mean of the tasks' own, weighted by their samples (linear discriminant analysis); or
            each task's ``own`` (quadratic). Own ones take ``8 D^2`` bytes a task, 134 MB at 4,096 dimensions.
    """

    covariance: Literal["shared", "own"] = "shared"


class Gaussian(Locator):
    """Each task's ``means [N, D]`` and covariances ``[N or 1, D, D]``, float64, shrunk as Ledoit and Wolf (2004) do."""

    Options = Options
    decisive = ("covariance",)

    def __init__(self, config: LocatorConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.means = self.covariances = torch.zeros(0, dtype=torch.float64)
        self.count = torch.zeros(0, dtype=torch.int64)
        self._factors: Tensor | None = None  # of the covariances: D^3 operations that batches of questions share

    def fit(self, features: Tensor) -> None:
        self._factors, values = None, features.double().cpu()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Only one sample")  # the floor alone is left of its covariance
            covariance = torch.from_numpy(ledoit_wolf(values.numpy())[0]).unsqueeze(0)
        before = float(self.count.sum())
        self.means = torch.cat([self.means, values.mean(0, keepdim=True)])
        self.count = torch.cat([self.count, torch.tensor([len(values)])])
        if self.options.covariance == "own" or not before:
            self.covariances = torch.cat([self.covariances, covariance])
        else:
            self.covariances = (before * self.covariances + len(values) * covariance) / float(self.count.sum())

    def scores(self, asked: Asked) -> Tensor:
        """Log densities, up to a constant that all tasks share."""
        assert asked.features is not None
        if self._factors is None:
            floor = VARIANCE_FLOOR * torch.eye(self.means.shape[1], dtype=torch.float64)
            self._factors = torch.linalg.cholesky(self.covariances + floor)
        found = []
        for task, mean in enumerate(self.means[: asked.tasks]):
            factor = self._factors[task % len(self._factors)]
            z = torch.linalg.solve_triangular(factor, (asked.features.double().cpu() - mean).t(), upper=False)
            found.append(-0.5 * z.square().sum(0) - factor.diagonal().log().sum())
        return torch.stack(found, dim=1)

    def state(self) -> dict[str, Tensor]:
        return {f"gaussian.{name}": getattr(self, name) for name in ("means", "covariances", "count")}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._factors = None
        self.means, self.covariances, self.count = (
            state[f"gaussian.{name}"] for name in ("means", "covariances", "count")
        )
