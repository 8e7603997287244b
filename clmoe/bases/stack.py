"""Where the supported versions of transformers and peft differ: every switch is here, and looks for a feature."""

from inspect import signature
from typing import Any

import torch
import transformers
from peft.tuners.tuners_utils import BaseTuner
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaModel, PreTrainedModel

_HAS_BACKENDS = hasattr(transformers, "CLIPImageProcessorPil")

CLIPImageProcessorPil: Any = getattr(transformers, "CLIPImageProcessorPil" if _HAS_BACKENDS else "CLIPImageProcessor")
"""CLIP's image processor on Pillow. Older versions (5.0) give the plain name to it, newer ones to torchvision's."""

WITH_PILLOW = {"backend": "pil"} if _HAS_BACKENDS else {"use_fast": False}
"""Arguments of ``AutoProcessor.from_pretrained`` that choose it, whatever else is installed."""

NAMES_ADAPTERS = hasattr(BaseTuner, "_remove_adapter_name_from_key")
"""peft asks the tuner for the names in adapter files (from 0.21 on); else they are those of ``state_dict``."""

CACHE = "cache" if "cache" in signature(LlavaModel.forward).parameters else "past_key_values"
"""What models call the keys and values of earlier tokens that they take and return (the shorter name from 5.24 on)."""


def tower_names(family: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a model of this type, so that files of every version fit.

    In transformers 5.0 the image encoder has its parts one level deeper than in files that 5.23 wrote, such as the
    embedded base's. llava-hf's files have that level, and fit both.
    """
    if family != "llava":
        return {}
    with torch.device("meta"):
        if not hasattr(CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=1)), "vision_model"):
            return {}
    names = {
        r"^language_model\.model\.": "model.language_model.",
        r"^language_model\.lm_head\.": "lm_head.",
        r"^multi_modal_projector\.": "model.multi_modal_projector.",
        r"^vision_tower\.": "model.vision_tower.",
        r"^model\.vision_tower\.(?!vision_model\.)": "model.vision_tower.vision_model.",
    }
    return {"key_mapping": names}


def recompute_activations(model: PreTrainedModel, **how: Any) -> None:
    """Turn on activation checkpointing, with these arguments of ``torch.utils.checkpoint.checkpoint``."""
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(how)
    # only reentrant checkpoints need an input with gradients, which would also go back through the frozen vision tower
    model.disable_input_require_grads()
