"""The bounds that a method is compared against: all tasks at once, one LoRA per task, and no training at all."""

from peft import PeftModel
from torch import Tensor

from clmoe.config import Config
from clmoe.errors import ClmoeError
from clmoe.experts.config import ExpertConfig
from clmoe.experts.layer import expert_layers
from clmoe.experts.model import attach_adapter, detach_adapter, freeze_experts, grow_experts, tensor_name
from clmoe.experts.routing import RouteSelection
from clmoe.methods.base import ADAPTER_FILE, Method, TaskContext, lora_parts_adapter
from clmoe.methods.lora import Lora
from clmoe.utils.tensors import load_tensors


class Multitask(Lora):
    """LoRA on the union of all tasks, trained once; ``training.steps`` is the number per task."""

    chain = "union"


class Separate(Lora):
    """A separate LoRA for every task, trained from the bare base; its only risk is mistaking a sample's task."""

    chain = "fresh"
    keeps_parts = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.adapter.train_projector:
            raise ClmoeError(
                f"{config.method} keeps a LoRA per task, but all tasks share one projector: set "
                "adapter.train_projector=false"
            )

    def parts(self, context: TaskContext) -> ExpertConfig:
        """The adapter that will hold all tasks' LoRAs, still empty."""
        return lora_parts_adapter(self.config, context.base, "task", owners=[])

    def end_task(self, context: TaskContext) -> None:
        """Append the trained LoRA to the parent's, as the experts of an adapter that picks by task."""
        trained = load_tensors(context.trained / ADAPTER_FILE)
        if context.previous is None:
            detach_adapter(context.model)
            context.model = attach_adapter(context.base.model, self.parts(context))
        else:
            context.load(context.previous)
        factors = {}
        for name, layer in expert_layers(context.model).items():
            A, B = (trained[tensor_name(name, f"lora_{f}.weight")].to(context.base.device) for f in "AB")
            factors[name] = dict.fromkeys(layer.experts, (A, B))
        grow_experts(context.model, context.index, factors)
        freeze_experts(context.model, context.index + 1)

    def selection(self, model: PeftModel, tasks: Tensor) -> RouteSelection:
        """Every sample uses its task's LoRA."""
        return RouteSelection(router=tasks.to(model.device))


class ZeroShot(Method):
    """The frozen base, asked the tasks' questions without any training."""

    chain = "none"


METHODS = {"multitask": Multitask, "separate": Separate, "zero_shot": ZeroShot}
