"""ProgLoRA (Findings of ACL 2025): a LoRA per task, weighted for each sample by keys that are learned with them.

    y = W0 x + s * sum_{i <= t} w_i B_i A_i x
    w = softmax_i( k_i . q / sqrt(d) ),    q = MLP( max over the prompt's tokens of their embeddings )

``w`` is computed once per sample and holds in all layers. Task t trains ``B_t A_t``, its key ``k_t`` and the MLP;
older LoRAs and keys are frozen, bit for bit. At test time, no task is given or looked for.

The MLP is Linear(D, hidden), Linear(hidden, D), SiLU, LayerNorm, its linears without bias, and ``d = D`` the width of
the embeddings. All this is the released code's; we could not read the paper. Its "task recall", which corrects the
weights of old tasks after the MLP has moved on, is not in that code, and not here.

The maximum is over the first question and its image, in training too, where the answer would give itself away, and the
weights hold for the answer. The released code takes it over all that it reads: the answer in training, and each
generated token alone. It also subtracts the batch's largest score from the old tasks' scores and from the new one's
separately, so that a sample's weights depend on the samples beside it.
"""

from dataclasses import dataclass

from peft import PeftConfig
from torch import Tensor

from clmoe.bases.llava import LoadedBase
from clmoe.experts.layer import seeded
from clmoe.experts.model import find_guide
from clmoe.experts.routing import RouteSelection
from clmoe.methods.base import TaskContext, lora_parts_adapter
from clmoe.methods.olora import AddedLora
from clmoe.utils.schema import Count


@dataclass(frozen=True)
class Options:
    """ProgLoRA's own choice.

    Attributes:
        hidden: width between the MLP's two linears, 100.
    """

    hidden: Count = 100


class ProgLora(AddedLora):
    """Every sample uses all tasks' LoRAs, weighted by attention over the tasks."""

    Options = Options

    def adapter(self, base: LoadedBase) -> PeftConfig:
        config = lora_parts_adapter(self.config, base, "task", owners=[0])
        config.guide = [base.model.config.get_text_config().hidden_size, self.options.hidden]
        return config

    def begin_task(self, context: TaskContext) -> None:
        """Freeze what is there, and add the task's LoRA and key."""
        super().begin_task(context)
        guide = find_guide(context.model)
        assert guide is not None
        if context.previous is not None:
            guide.begin(seeded(self.config.seed, f"proglora:{context.index}"))

    def plain_selection(self) -> RouteSelection:
        """Route whole prompts, and keep their weights for the tokens that follow."""
        kept: dict[str, Tensor] = {}
        return RouteSelection(whole=True, kept=kept)


METHODS = {"proglora": ProgLora}
