"""A sample belongs to the task whose mean feature has the closest direction: of text (DISCO) or image and text (HiDe).

The papers take both features from CLIP. Here the frozen base gives them, so no further model is needed; the text's can
also come from a CLIP text tower that the user names.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clmoe.config import LocatorConfig, View
from clmoe.locators.base import Asked, Locator
from clmoe.utils.paths import resolve_model_path


@dataclass(frozen=True)
class Options:
    """Where the text's feature comes from.

    Attributes:
        text_encoder: folder or hub name of a CLIP model, whose text tower reads the question; empty means the base.
    """

    text_encoder: str = ""


class TextCentroid(Locator):
    """DISCO (ICCV 2025): the cosine between the feature of a question without its image and each task's mean of these.

    ``means [N, D]`` are float64.
    """

    view: ClassVar[View] = "text"
    Options = Options
    parts: ClassVar[int] = 1

    def __init__(self, config: LocatorConfig, seed: int) -> None:
        super().__init__(config, seed)
        if self.options.text_encoder:
            resolve_model_path(self.options.text_encoder)
        self.means = torch.zeros(0, dtype=torch.float64)

    def fit(self, features: Tensor) -> None:
        self.means = torch.cat([self.means, features.double().cpu().mean(0, keepdim=True)])

    def scores(self, asked: Asked) -> Tensor:
        """Cosines, averaged over the parts of a feature; a part of zeros, as for a missing image, counts as 0."""
        assert asked.features is not None
        halves = zip(
            asked.features.double().cpu().chunk(self.parts, 1), self.means[: asked.tasks].chunk(self.parts, 1),
            strict=True,
        )  # fmt: skip
        cosines = [normalize(own, dim=1) @ normalize(anchors, dim=1).t() for own, anchors in halves]
        return torch.stack(cosines).mean(0)

    def state(self) -> dict[str, Tensor]:
        return {"centroid.means": self.means}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.means = state["centroid.means"]

    def _settings(self) -> dict[str, Any]:
        named = self.options.text_encoder
        return super()._settings() | ({"text_encoder": named} if named else {})


class ImageTextCentroid(TextCentroid):
    """HiDe-LLaVA (ACL 2025): the mean of the cosines between images and between texts."""

    view: ClassVar[View] = "image_text"
    parts: ClassVar[int] = 2
