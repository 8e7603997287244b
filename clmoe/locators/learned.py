"""A sample belongs to the task whose prototype, learned with the task's soft prompt, has the closest direction."""

from typing import ClassVar

from torch import Tensor

from clmoe.locators.base import Asked
from clmoe.locators.centroid import ImageTextCentroid


class LearnedPrototype(ImageTextCentroid):
    """ModalPrompt (EMNLP 2025): one prototype for image and text; only for methods that learn them."""

    learned: ClassVar[bool] = True

    def scores(self, asked: Asked) -> Tensor:
        """The mean of the cosines between a task's prototype and the features of image and text."""
        assert asked.prototypes is not None
        self.means = asked.prototypes.detach().double().cpu().repeat(1, 2)
        return super().scores(asked)

    def state(self) -> dict[str, Tensor]:
        """Nothing: the prototypes are the adapter's."""
        return {}
