"""The model itself is asked which task a sample belongs to, and answers with a letter (MR-LoRA)."""

from typing import ClassVar

from torch import Tensor

from clmoe.locators.base import Asked, Locator


class GeneratedLetter(Locator):
    """The task whose letter is likeliest; only for methods that teach the model to say it."""

    looks: ClassVar[bool] = False
    asks: ClassVar[bool] = True

    def scores(self, asked: Asked) -> Tensor:
        assert asked.features is not None
        return asked.features.double()
