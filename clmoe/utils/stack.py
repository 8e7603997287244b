"""Where the supported versions of transformers and peft differ: each switch looks for a feature, and all are here."""

from typing import Any

import transformers
from peft.tuners.tuners_utils import BaseTuner
from transformers import CLIPImageProcessor, PreTrainedModel

CLIPImageProcessorPil: Any = getattr(transformers, "CLIPImageProcessorPil", CLIPImageProcessor)
"""CLIP's image processor on Pillow. Older versions (5.0) give that one the plain name, newer ones torchvision's."""

WITH_PILLOW = {"backend": "pil"} if hasattr(transformers, "CLIPImageProcessorPil") else {"use_fast": False}
"""Arguments of ``AutoProcessor.from_pretrained`` that choose it, whatever else is installed."""

NAMES_ADAPTERS = hasattr(BaseTuner, "_remove_adapter_name_from_key")
"""peft asks the tuner for the names in adapter files (from 0.21 on); else they are those of ``state_dict``."""


def recompute_activations(model: PreTrainedModel, **how: Any) -> None:
    """Turn on activation checkpointing, with these arguments of ``torch.utils.checkpoint.checkpoint``."""
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(how)
