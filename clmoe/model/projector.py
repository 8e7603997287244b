"""The tuned projector: peft's copy of LLaVA's, kept in float32 on a base of any type."""

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector


class Float32Projector(nn.Module):
    """LLaVA's projector with float32 weights, computed in its input's type as the experts are.

    peft copies the base's type. In bfloat16 a learning rate of 2e-5 would round most updates away, moments included. A
    weight that never trained gives the base's own output, bit for bit.
    """

    def __init__(self, projector: LlavaMultiModalProjector) -> None:
        super().__init__()
        self.linear_1, self.act, self.linear_2 = projector.linear_1.float(), projector.act, projector.linear_2.float()

    def forward(self, image_features: Tensor) -> Tensor:
        """``[I, N, D_vision]`` -> ``[I, N, D]``."""
        return _cast_linear(self.linear_2, self.act(_cast_linear(self.linear_1, image_features)))


def _cast_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def keep_float32(model: PeftModel) -> None:
    """Turn the adapter's copy of the projector into a float32 one; its values are still those of the base's type."""
    for wrapper in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
        for adapter, projector in wrapper.modules_to_save.items():
            wrapper.modules_to_save[adapter] = Float32Projector(projector)  # type: ignore[arg-type]


@torch.no_grad()
def restore_float32(model: PeftModel, saved: dict[str, Tensor]) -> None:
    """As ``keep_float32``, with the values of an adapter file, which peft has just rounded to the base's type."""
    keep_float32(model)
    for name, module in model.named_modules():
        if isinstance(module, Float32Projector):
            prefix = name.partition(".modules_to_save.")[0]
            for inner, parameter in module.named_parameters():
                parameter.copy_(saved[f"{prefix}.{inner}"])
