"""HiDe-LLaVA (ACL 2025): a LoRA per task, all fused into one below the last block and mixed by image and text in it.

Task t trains ``B_t A_t`` alone, from the bare base. At test time

    below the last block    y = W0 x + s * sum_i B_i A_i x
    in the last block       y = W0 x + s * sum_i w_i B_i A_i x,    w = softmax_i( S_i / tau ),    tau = 0.1
    S_i = ( cos(f_v, c_v,i) + cos(f_t, c_t,i) ) / 2

with ``f_v`` and ``f_t`` the features of image and question and ``c`` their means over task i's training samples
(``locators/centroid.py``). With another locator, its scores replace ``S``.

The released code adds up the factors instead of the products, ``(sum_i B_i) (sum_j A_j) x``, and so includes the cross
terms ``B_i A_j``: ``options.variant=released``. It starts its centres from noise, which stays in their means with the
weight of one sample, and it computes one similarity for a batch of one. Neither difference is worth an option.
"""

from dataclasses import dataclass
from typing import Literal

from clmoe.bases.llava import decoder_layers
from clmoe.experts.config import ExpertConfig
from clmoe.experts.layer import expert_layers
from clmoe.experts.model import expert_config
from clmoe.methods.base import TaskContext
from clmoe.methods.disco import Disco
from clmoe.utils.schema import Positive


@dataclass(frozen=True)
class Options:
    """HiDe's own choices.

    Attributes:
        temperature: tau of the softmax over the tasks, 0.1.
        variant: below the last block, add up the tasks' products B A (``published``) or their factors (``released``).
    """

    temperature: Positive = 0.1
    variant: Literal["published", "released"] = "published"


class HiDe(Disco):
    """The last block weights the tasks by the sample; the blocks before it use all tasks alike."""

    Options = Options

    def parts(self, context: TaskContext) -> ExpertConfig:
        config = super().parts(context)
        config.pick_from = len(decoder_layers(context.base.model)) - 1
        return config

    def end_task(self, context: TaskContext) -> None:
        """Append the trained LoRA; as released, add its factors to the sums in the blocks before the last."""
        super().end_task(context)
        config = expert_config(context.model)
        for layer in expert_layers(context.model).values():
            if self.options.variant == "published" or int(layer.block) >= config.pick_from:
                continue
            for experts in layer.experts.values():
                A, B = experts.packed()
                experts.frozen_A = A.view(-1, experts.rank, A.shape[1]).sum(0)
                experts.frozen_B = B.view(len(B), -1, experts.rank).sum(1)
            config.layout[layer.block] = layer.routers.owners = [0]


METHODS = {"hide": HiDe}
