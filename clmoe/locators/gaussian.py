"""A Gaussian per task: a sample belongs to the task whose Gaussian makes its feature likeliest, or most typical."""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clmoe.config import LocatorConfig
from clmoe.errors import ClmoeError
from clmoe.locators.base import Asked, Locator

VARIANCE_FLOOR = 1e-6  # added to every dimension: a single or constant sample has no covariance


@dataclass(frozen=True)
class Options:
    """How many covariances there are, and what decides.

    Attributes:
        covariance: ``shared``, the mean of the tasks' own, weighted by their samples (linear discriminant analysis); or
            each task's ``own`` (quadratic). Own ones take ``8 D^2`` bytes per task, 134 MB at 4,096 dimensions.
        decision: the largest ``density``; or, with own covariances, the largest ``z_score``: the log density's standard
            score among those of the task's own records, which is LLaVA-CMoE's rule for its VAEs.
    """

    covariance: Literal["shared", "own"] = "shared"
    decision: Literal["density", "z_score"] = "density"

    def __post_init__(self) -> None:
        if self.decision == "z_score" and self.covariance == "shared":
            raise ClmoeError(
                "locator.options.decision=z_score needs locator.options.covariance=own: a shared covariance changes "
                "with every task, and so do the densities of the older ones"
            )


class Gaussian(Locator):
    """Each task's ``means [N, D]`` and covariances ``[N or 1, D, D]``, float64, shrunk as in Ledoit and Wolf (2004).

    With own covariances, ``typical [N, 2]`` holds the mean and standard deviation of the log densities of each task's
    own records.
    """

    Options = Options
    decisive = ("covariance",)

    def __init__(self, config: LocatorConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.means = self.covariances = self.typical = torch.zeros(0, dtype=torch.float64)
        self.count = torch.zeros(0, dtype=torch.int64)
        self._factors: Tensor | None = None  # of the covariances: D^3 operations, shared by batches of questions

    def fit(self, features: Tensor) -> None:
        """Add the next task's Gaussian; older tasks change only through a shared covariance."""
        from sklearn.covariance import ledoit_wolf  # a second, which only this locator needs

        self._factors, values = None, features.double().cpu()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Only one sample")  # its covariance is then the floor alone
            covariance = torch.from_numpy(ledoit_wolf(values.numpy())[0]).unsqueeze(0)
        before = float(self.count.sum())
        self.means = torch.cat([self.means, values.mean(0, keepdim=True)])
        self.count = torch.cat([self.count, torch.tensor([len(values)])])
        if self.options.covariance == "own" or not before:
            self.covariances = torch.cat([self.covariances, covariance])
        else:
            self.covariances = (before * self.covariances + len(values) * covariance) / float(self.count.sum())
        if self.options.covariance == "own":
            own = log_density(values, self.means[-1], cholesky(covariance)[0])
            deviation = own.std(unbiased=False).clamp(min=VARIANCE_FLOOR)
            self.typical = torch.cat([self.typical, torch.stack([own.mean(), deviation]).unsqueeze(0)])

    def scores(self, asked: Asked) -> Tensor:
        """Log densities, up to a constant that all tasks share, or their standard scores."""
        assert asked.features is not None
        if self._factors is None:
            self._factors = cholesky(self.covariances)
        values, factors = asked.features.double().cpu(), self._factors
        found = torch.stack(
            [log_density(values, mean, factors[i % len(factors)]) for i, mean in enumerate(self.means[: asked.tasks])],
            dim=1,
        )
        if self.options.decision == "density":
            return found
        mean, deviation = self.typical[: asked.tasks].unbind(1)
        return (found - mean) / deviation

    def state(self) -> dict[str, Tensor]:
        return {f"gaussian.{name}": getattr(self, name) for name in self._parts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._factors = None
        for name in self._parts:
            setattr(self, name, state[f"gaussian.{name}"])

    @property
    def _parts(self) -> list[str]:
        own = ["typical"] if self.options.covariance == "own" else []
        return ["means", "covariances", "count", *own]


def cholesky(covariances: Tensor) -> Tensor:
    """Lower factors ``[N, D, D]`` of covariances plus the floor."""
    return torch.linalg.cholesky(covariances + VARIANCE_FLOOR * torch.eye(covariances.shape[-1], dtype=torch.float64))


def log_density(values: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Log densities ``[M]`` of ``values [M, D]`` under one Gaussian, without the constant that all Gaussians share."""
    z = torch.linalg.solve_triangular(factor, (values - mean).t(), upper=False)
    return -0.5 * z.square().sum(0) - factor.diagonal().log().sum()
