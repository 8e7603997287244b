"""Sequential LoRA: one adapter, fine-tuned on task after task. The baseline that forgets."""

from peft import PeftConfig

from clmoe.bases.llava import LoadedBase
from clmoe.methods.base import Method, lora_adapter, lora_scaling


class Lora(Method):
    """Nothing is frozen but the base; the newest task writes over the older ones."""

    def adapter(self, base: LoadedBase) -> PeftConfig:
        return lora_adapter(self.config)

    def effective_scale(self) -> float:
        return lora_scaling(self.config.adapter)


METHODS = {"lora": Lora}
