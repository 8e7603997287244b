"""One adapter, fine-tuned on task after task: LoRA, and MoELoRA (CoIN, NeurIPS 2024). The baselines that forget."""

from peft import PeftConfig

from clmoe.bases.llava import LoadedBase
from clmoe.config import Config
from clmoe.errors import ClmoeError
from clmoe.methods.base import (
    Method,
    expert_adapter,
    expert_rank,
    expert_scaling,
    lora_adapter,
    lora_scaling,
    mean_gate,
)


class Lora(Method):
    """Only the base is frozen; the newest task overwrites the older ones."""

    def adapter(self, base: LoadedBase) -> PeftConfig:
        return lora_adapter(self.config, base)

    def effective_scale(self) -> float:
        return lora_scaling(self.config.adapter)


class MoeLora(Method):
    """LoRA experts under a dense softmax router; all train on every task, without a balance loss.

    ``as_trained`` is the configuration with the gate of training, from which the scale of the update follows.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.as_trained, adapter = config, config.adapter
        expert_rank(adapter)
        if not self.grows and (adapter.router_top_k or 0) > adapter.experts:
            raise ClmoeError(f"adapter.router_top_k {adapter.router_top_k} is more than {adapter.experts} experts")

    def adapter(self, base: LoadedBase) -> PeftConfig:
        return expert_adapter(self.as_trained, base)

    def effective_scale(self) -> float:
        return expert_scaling(self.as_trained.adapter) * mean_gate(self.as_trained.adapter)


METHODS = {"lora": Lora, "moelora": MoeLora}
