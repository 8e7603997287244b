"""The vision tower's side: a local CLIP folder, or what is known of LLaVA-1.5's tower by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmoe.errors import ClmoeError
from clmoe.utils.files import read_json

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

LLAVA_TOWER = "openai/clip-vit-large-patch14-336"
UNUSED = re.compile(r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale$)|(^|\.)position_ids$")
"""What a whole CLIP holds besides the tower."""

_LARGE_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_MEAN = [0.48145466, 0.4578275, 0.40821073]
_STD = [0.26862954, 0.26130258, 0.27577711]
_FIELDS = (*_LARGE_336, "hidden_act", "layer_norm_eps", "num_channels")


@dataclass(frozen=True)
class Clip:
    """A vision tower without its weights. ``folder`` is None for one that is known by name only."""

    config: CLIPVisionConfig
    side: int
    patch: int
    images: CLIPImageProcessorPil
    folder: Path | None


def known_tower(name: str) -> Clip:
    """LLaVA-1.5's own tower: CLIP ViT-L/14 at 336 pixels.

    Raises:
        ClmoeError: another name.
    """
    from transformers import CLIPVisionConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    if name.rstrip("/").rpartition("/")[2] != LLAVA_TOWER.rpartition("/")[2]:
        raise ClmoeError(f"its vision tower is {name!r}; give that model's folder as --vision")
    side = _LARGE_336["image_size"]
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=_MEAN, image_std=_STD
    )
    return Clip(CLIPVisionConfig(**_LARGE_336), side, _LARGE_336["patch_size"], images, None)


def open_clip(folder: Path) -> Clip:
    """A CLIP folder in transformers' format, a whole CLIP or its vision model alone.

    Raises:
        ClmoeError: no CLIP, or files missing.
    """
    from transformers import CLIPVisionConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    values = read_json(folder / "config.json")
    kind = values.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ClmoeError(f"--vision {folder}: its config.json says model_type {kind!r}, not 'clip'")
    vision: dict[str, Any] = values["vision_config"] if kind == "clip" else values
    lacking = [name for name in _LARGE_336 if name not in vision and name != "projection_dim"]
    if lacking:
        raise ClmoeError(f"--vision {folder}: its config.json lacks {lacking[0]} of the vision model")
    if not (folder / "preprocessor_config.json").is_file():
        raise ClmoeError(f"--vision {folder}: preprocessor_config.json is missing: it says how images are scaled")
    config = CLIPVisionConfig(**{name: vision[name] for name in _FIELDS if name in vision})
    images: Any = CLIPImageProcessorPil.from_pretrained(folder)
    side, crop = vision["image_size"], dict(images.crop_size)
    if crop != {"height": side, "width": side}:
        raise ClmoeError(f"--vision {folder}: images are cropped to {crop}, the tower takes {side} pixels")
    return Clip(config, side, vision["patch_size"], images, folder)
