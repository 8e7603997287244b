"""Load LLaVA-1.5 (transformers' own class) with its processor, and read the frozen base's features."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast
from transformers.utils.import_utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from clmoe.config import ModelConfig
from clmoe.errors import ClmoeError
from clmoe.model.fingerprint import base_fingerprint
from clmoe.model.vision_cache import VisionCache, attach_cache
from clmoe.utils.paths import resolve_model_path

FeatureKind = Literal["last", "pooled"]


@dataclass(frozen=True)
class LoadedBase:
    """The frozen LLaVA and what turns records into its inputs.

    Attributes:
        image_token_count: how many tokens one image becomes.
        fingerprint: identity of config and weights, see ``base_fingerprint``.
        vision: features of images on disk, where the environment asks for them.
    """

    model: LlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    image_processor: BaseImageProcessor
    image_token_count: int
    fingerprint: str
    vision: VisionCache | None = None

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
        ClmoeError: the folder is not a LLaVA in transformers' format, its files and its config.json do not agree about
            the tensors, what attention or 4-bit weights need is not there, or ``CLMOE_VISION`` does not fit the model.
    """
    check_means(config, torch.device(device))
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
            ignore_mismatched_sizes=True,  # reported below, by name
            **(_four_bit(config, device) if config.load_in_4bit else {}),
        )
        model, report = cast(tuple[LlavaForConditionalGeneration, dict[str, set[Any]]], loaded)
        _check_report(report)
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ClmoeError(f"model {config.path} cannot be loaded: {reason}") from error
    model.requires_grad_(False).eval()
    if not config.load_in_4bit:  # quantised weights were put in their place while loading
        cast(torch.nn.Module, model).to(device)
    model.name_or_path = config.path  # goes into adapter files, which must not depend on where the repository lies
    base = LoadedBase(model, processor.tokenizer, processor.image_processor, count_image_tokens(model), fingerprint)
    return replace(base, vision=attach_cache(base))


def check_means(config: ModelConfig, device: torch.device) -> None:
    """What ``attention`` and ``load_in_4bit`` need is installed and fits; nothing is loaded for it.

    Raises:
        ClmoeError: it is not; the message names the package or the setting to change.
    """
    if config.attention == "flash_attention_2":
        if not is_flash_attn_2_available():
            raise ClmoeError(
                "model.attention flash_attention_2 needs the package flash-attn and a CUDA device: "
                "pip install 'clmoe[flash]', or model.attention=sdpa"
            )
        if config.dtype == "float32":
            raise ClmoeError("model.attention flash_attention_2 computes in 16 bits: set model.dtype=bfloat16")
    if config.load_in_4bit:
        if find_spec("bitsandbytes") is None:
            raise ClmoeError("model.load_in_4bit needs the package bitsandbytes: pip install 'clmoe[4bit]'")
        if device.type != "cuda":
            raise ClmoeError(f"model.load_in_4bit needs a CUDA device, this process computes on {device.type}")


def _four_bit(config: ModelConfig, device: torch.device | str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for NF4 weights in the language model's blocks (QLoRA, arXiv 2305.14314).

    Tower, projector and head stay as they are: a tuned projector is a copy of the base's, and the head decides the
    margins of answers. The quantised linears keep ``in_features`` and ``out_features``, which experts are built from.
    """
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )
    return {"quantization_config": quantisation, "device_map": {"": device}}


def _check_report(report: dict[str, set[Any]]) -> None:
    """Every tensor of the files has its place in the model and the other way round.

    Raises:
        ValueError: not so; the first one is named.
    """
    for problem, keys in (("lack", "missing_keys"), ("hold, beyond the model's,", "unexpected_keys")):
        names = sorted(report[keys])
        if names:
            raise ValueError(f"its files {problem} {len(names)} tensors, {names[0]} first")
    for name, found, needed in sorted(report["mismatched_keys"]):
        raise ValueError(f"{name} has shape {list(found)} in its files, config.json makes it {list(needed)}")


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
