"""A CLIP text tower that the user names, whose features DISCO and HiDe-LLaVA use to compare questions."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, CLIPTextModelWithProjection

from clmoe.errors import ClmoeError
from clmoe.utils.paths import resolve_model_path
from clmoe.utils.processes import device

KEY = "locator.options.text_encoder"


class TextTower:
    """Projected text features; a text is cut where the tower's positions end (CLIP's at 77 tokens)."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.longest: int = model.config.max_position_embeddings

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """``[M, D]`` float32 on the CPU, one row per text."""
        read = self.tokenizer(
            list(texts),
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.longest,
            return_tensors="pt",
        ).to(self.model.device)
        output = self.model(input_ids=read["input_ids"], attention_mask=read["attention_mask"])
        return output.text_embeds.float().cpu()


@lru_cache(maxsize=1)
def open_text_tower(path: str) -> TextTower:
    """Load a CLIP model's text tower, in float32, by folder or hub name. Raises ClmoeError if it is not one."""
    folder = resolve_model_path(path)
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind not in ("clip", "clip_text_model"):
            raise ValueError(f"a model of type {kind}")
        model = CLIPTextModelWithProjection.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ClmoeError(f"{KEY}: {path} is not a CLIP text tower ({text}); give CLIP's folder or hub name") from error
    return TextTower(model.eval().to(device()), tokenizer)
