"""Load LLaVA-1.5 (transformers' own class) with its processor, and read the frozen base's features."""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast
from transformers.utils.logging import disable_progress_bar

from clmoe.config import ModelConfig
from clmoe.errors import ClmoeError
from clmoe.model.fingerprint import base_fingerprint
from clmoe.system.paths import resolve_model_path

FeatureKind = Literal["last", "pooled"]


@dataclass(frozen=True)
class LoadedBase:
    """The frozen LLaVA and what turns records into its inputs.

    Attributes:
        image_token_count: how many tokens one image becomes.
        fingerprint: identity of config and weights, see ``base_fingerprint``.
    """

    model: LlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    image_processor: BaseImageProcessor
    image_token_count: int
    fingerprint: str

    @property
    def device(self) -> torch.device:
        return self.model.device


def count_image_tokens(model: LlavaForConditionalGeneration) -> int:
    """Patches of one image, plus the class token with the ``full`` feature strategy."""
    embeddings = model.model.vision_tower.embeddings
    patches = int(embeddings.num_patches)
    return patches + (model.config.vision_feature_select_strategy == "full")


def load_base(config: ModelConfig, device: torch.device | str = "cpu") -> LoadedBase:
    """Load model, tokenizer and image processor; all parameters frozen, evaluation mode.

    Raises:
        ClmoeError: the folder is not a LLaVA in transformers' format, or weights are missing in it.
    """
    disable_progress_bar()
    folder = resolve_model_path(config.path)
    fingerprint = base_fingerprint(folder)
    try:
        # Given another model's folder, from_pretrained below would build a random LLaVA of 7B parameters.
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind != "llava":
            raise ValueError(f"its config.json says model_type {kind!r}, not 'llava'")
        loaded = LlavaForConditionalGeneration.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            use_safetensors=True,  # a pickle could run code
            output_loading_info=True,
        )
        model, report = cast(tuple[LlavaForConditionalGeneration, dict[str, set[str]]], loaded)
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(f"its files lack {len(missing)} tensors, {missing[0]} first")
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ClmoeError(f"model {config.path} cannot be loaded: {reason}") from error
    model.requires_grad_(False).eval().to(device)
    model.name_or_path = config.path  # goes into adapter files, which must not depend on where the repository lies
    return LoadedBase(model, processor.tokenizer, processor.image_processor, count_image_tokens(model), fingerprint)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that ignore left padding: ``[B, T]`` int64, so that a padded row is computed as a lone one."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def last_prompt_features(
    model: LlavaForConditionalGeneration, batch: dict[str, Tensor], kind: FeatureKind = "last"
) -> Tensor:
    """Hidden state of the last prompt token, ``[B, D]`` float32, for a left-padded prompt batch.

    The locator's feature (LLaVA-CMoE section 3.3, F_end). Call it with the adapter disabled.

    Args:
        kind: ``last`` is the state after the last layer and the final norm; ``pooled`` the mean over the outputs of
            all decoder layers (the ablation of the paper's Table 5).
    """
    positions = position_ids(batch["attention_mask"])
    return prompt_feature(
        model.model(**batch, position_ids=positions, use_cache=False, output_hidden_states=kind == "pooled"), kind
    )


def prompt_feature(output: LlavaModelOutputWithPast, kind: FeatureKind) -> Tensor:
    """The feature of each row's last token ``[B, D]`` float32; ``pooled`` needs all hidden states in ``output``."""
    if kind == "last":
        return output.last_hidden_state[:, -1].float()  # type: ignore[index]
    # the first entry is the embedding, no layer's output
    return torch.stack([hidden[:, -1].float() for hidden in output.hidden_states[1:]]).mean(0)  # type: ignore[index]
