"""MoELoRA (CoIN, NeurIPS 2024): LoRA experts under a dense softmax router; nothing frozen, no balance loss."""

from peft import PeftConfig

from clmoe.bases.llava import LoadedBase
from clmoe.methods.base import Method, expert_adapter, expert_scaling, mean_gate


class MoeLora(Method):
    """All experts and routers train on every task."""

    def adapter(self, base: LoadedBase) -> PeftConfig:
        return expert_adapter(self.config, base)

    def effective_scale(self) -> float:
        return expert_scaling(self.config.adapter) * mean_gate(self.config.adapter)


METHODS = {"moelora": MoeLora}
