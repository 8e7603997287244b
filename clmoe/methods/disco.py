"""DISCO (federated continual instruction tuning, ICCV 2025): a LoRA per task, all of them mixed by the question's text.

Task t trains ``B_t A_t`` alone, from the bare base. At test time, in every block,

    y = W0 x + s * sum_i w_i B_i A_i x,    w = softmax_i( cos(f(q), c_i) / tau ),    tau = 0.05

with ``f(q)`` the feature of question ``q`` without its image and ``c_i`` its mean over task i's training questions
(``locators/centroid.py``). With another locator, its scores replace the cosines.

The released code computes one similarity per batch and so evaluates one question at a time, with the same result as
here. It adds the number of samples to a running sum of features instead of to its count, which hardly turns the
centre.
"""

from dataclasses import dataclass
from typing import ClassVar

from peft import PeftModel
from torch import Tensor

from clmoe.methods.bounds import Separate
from clmoe.utils.schema import Positive


@dataclass(frozen=True)
class Options:
    """DISCO's own choice.

    Attributes:
        temperature: tau of the softmax over the tasks, 0.05.
    """

    temperature: Positive = 0.05


class Disco(Separate):
    """Every sample uses all tasks' LoRAs, weighted by how near the locator finds each task."""

    Options: ClassVar[type] = Options
    answer_options = ("temperature",)

    def mixture(self, model: PeftModel, scores: Tensor) -> Tensor:
        return (scores / self.options.temperature).softmax(1)


METHODS = {"disco": Disco}
