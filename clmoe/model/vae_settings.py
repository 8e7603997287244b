"""Settings of the task locator's VAEs; free of torch, because configurations are read before it is imported."""

from dataclasses import dataclass
from typing import Literal

from clmoe.errors import ClmoeError


@dataclass(frozen=True)
class VaeSettings:
    """All *open* in the paper but ``eta``, ``weight_kl`` (1e-3 each, so 1 : 1 in a phase of its own).

    Attributes:
        latent, hidden: widths.
        draws: latent draws per reconstruction probability.
        steps, batch_size, learning_rate: of the fit.
        eta, weight_kl: weights of the reconstruction and of the KL divergence in the loss.
        held_out: share of the features kept for the primitive, where it is computed on such.
        primitive_on, primitive_last: the primitive's instances: ``held_out``, or ``primitive_last`` of those trained
            on, which are then all.
        objective: ``log`` maximises log p_rec; ``density`` the literal p_rec of the paper.
        feature_floor, sigma_floor, primitive_floor: smallest standard deviations, of a feature, of the decoder and
            latent, and of the primitive.
    """

    latent: int = 64
    hidden: int = 512
    draws: int = 8
    steps: int = 2000
    batch_size: int = 128
    learning_rate: float = 1e-3
    held_out: float = 0.1
    primitive_on: Literal["held_out", "train_last"] = "held_out"
    primitive_last: int = 1000
    objective: Literal["log", "density"] = "log"
    eta: float = 1e-3
    weight_kl: float = 1e-3
    feature_floor: float = 1e-3
    sigma_floor: float = 1e-2
    primitive_floor: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("latent", "hidden", "draws", "batch_size", "primitive_last"):
            if getattr(self, name) < 1:
                raise ClmoeError(f"options.locator.{name} must be at least 1")
        if not 0 < self.held_out < 1:
            raise ClmoeError("options.locator.held_out must lie between 0 and 1")
        for name in ("feature_floor", "sigma_floor", "primitive_floor"):
            if getattr(self, name) <= 0:
                raise ClmoeError(f"options.locator.{name} must be positive")
