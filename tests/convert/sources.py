"""Tiny checkpoints in the formats that others publish, with their keys, file names, dtypes and kinds of shape.

Everything comes from the modules of one model of transformers' own class, the reference, so the converter's tables have
no part in writing what it reads.
"""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.llama_vocabulary import train_vocabulary

VOCABULARY, ROWS = 400, 448
IMAGE, PAD = VOCABULARY, VOCABULARY + 1
BLOCKS, WIDTH, FFN = 2, 48, 64
TOWER_LAYERS, TOWER_WIDTH, SIDE, PATCH = 3, 32, 28, 14
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
LLAMA = {
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": WIDTH, "initializer_range": 0.02,
    "intermediate_size": FFN, "max_position_embeddings": 512, "num_attention_heads": 4, "num_hidden_layers": BLOCKS,
    "num_key_value_heads": 4, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0", "use_cache": True,
    "vocab_size": VOCABULARY,
}  # fmt: skip
LLAVA = {
    "architectures": ["LlavaLlamaForCausalLM"], "freeze_mm_mlp_adapter": False, "image_aspect_ratio": "pad",
    "mm_hidden_size": TOWER_WIDTH, "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None,
    "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "tune_mm_mlp_adapter": False, "use_mm_proj": True,
}  # fmt: skip
VISION = {
    "hidden_act": "quick_gelu", "hidden_size": TOWER_WIDTH, "image_size": SIDE, "intermediate_size": 40,
    "layer_norm_eps": 1e-05, "num_attention_heads": 2, "num_hidden_layers": TOWER_LAYERS, "patch_size": PATCH,
    "projection_dim": 24,
}  # fmt: skip
VIT_L_336 = {
    "hidden_act": "quick_gelu", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
"""The vision settings of openai/clip-vit-large-patch14-336."""


def reference() -> LlavaForConditionalGeneration:
    """transformers' own LLaVA with random weights that 16 bits hold exactly."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**LLAMA | {"vocab_size": ROWS, "pad_token_id": None, "torch_dtype": None}),
        image_token_index=IMAGE,
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = LlavaForConditionalGeneration(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases too, so that swapping any two shows
                parameter.add_(torch.randn_like(parameter) * 0.2).copy_(parameter.half().float())
    return model


def half(module: nn.Module, start: str) -> dict[str, Tensor]:
    """A module's tensors in 16 bits, under its own names with the prefix ``start``."""
    return {f"{start}{name}": tensor.half().clone() for name, tensor in module.state_dict().items()}


def llama_tensors(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """The decoder under LLaMA's names, with the rotary buffers that older versions saved."""
    found = half(model.model.language_model, "model.") | half(model.lm_head, "lm_head.")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        found[name] = found[name][:VOCABULARY].clone()
    return found | {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.rand(6).half() for n in range(BLOCKS)}


def projector_tensors(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """The projector under the keys of ``mm_projector.bin``: a sequence of linear, GELU, linear."""
    projector = model.model.multi_modal_projector
    return half(projector.linear_1, "model.mm_projector.0.") | half(projector.linear_2, "model.mm_projector.2.")


def tower_tensors(model: LlavaForConditionalGeneration, start: str) -> dict[str, Tensor]:
    """The tower under the names of CLIP's vision model."""
    tower = model.model.vision_tower
    return half(getattr(tower, "vision_model", tower), start)  # one level deeper in transformers 5.0


def write_shards(folder: Path, tensors: dict[str, Tensor], pickled: bool) -> None:
    folder.mkdir(parents=True)
    save_torch_state_dict(tensors, folder, max_shard_size=100_000, safe_serialization=not pickled)


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2))


def liuhaotian(folder: Path, tensors: dict[str, Tensor], pickled: bool = False, **changes: Any) -> Path:
    """A folder like liuhaotian/llava-v1.5-7b: sharded weights, config.json, generation_config.json, tokenizer.model."""
    write_shards(folder, tensors, pickled)
    write_json(folder / "config.json", {"model_type": "llava"} | LLAMA | LLAVA | changes)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    return train_vocabulary(folder)


def vicuna(folder: Path, tensors: dict[str, Tensor], pickled: bool = False) -> Path:
    """A folder like lmsys/vicuna-7b-v1.5."""
    write_shards(folder, tensors, pickled)
    write_json(folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | LLAMA)
    write_json(folder / "generation_config.json", {"do_sample": True, "temperature": 0.9, "top_p": 0.6})
    return train_vocabulary(folder)


def clip(folder: Path, tower: dict[str, Tensor], pickled: bool = False) -> Path:
    """A folder like openai/clip-vit-large-patch14-336: a whole CLIP in one file, including its text side."""
    whole = tower | {
        "logit_scale": torch.tensor(4.6),
        "text_projection.weight": torch.rand(24, 16),
        "visual_projection.weight": torch.rand(24, TOWER_WIDTH),
        "text_model.embeddings.token_embedding.weight": torch.rand(8, 16),
        "text_model.embeddings.position_ids": torch.arange(8)[None],
        "vision_model.embeddings.position_ids": torch.arange((SIDE // PATCH) ** 2 + 1)[None],
    }
    folder.mkdir(parents=True)
    save_torch_state_dict(whole, folder, safe_serialization=not pickled)
    return clip_configuration(folder, VISION)


def clip_configuration(folder: Path, vision: dict[str, Any]) -> Path:
    """Everything in a CLIP folder except the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    vision = vision | {"model_type": "clip_vision_model", "num_beams": 1, "torch_dtype": None}
    write_json(folder / "config.json", {"model_type": "clip", "text_config": {}, "vision_config": vision})
    images = {
        "crop_size": vision["image_size"], "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "image_mean": MEAN, "image_std": STD, "resample": 3, "size": vision["image_size"],
        "feature_extractor_type": "CLIPFeatureExtractor",
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", images)
    return folder


def batch() -> dict[str, Tensor]:
    """Two prompts of different lengths about two pictures, left-padded."""
    image = [IMAGE] * (SIDE // PATCH) ** 2
    long = [1, 20, 31, *image, 45, 399, 7, 260, 261]
    short = [1, *image, 50, 270]
    ids = torch.tensor([long, [PAD] * (len(long) - len(short)) + short])
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Logits ``[2, T, V]`` of the batch over the original vocabulary; zero where there is padding."""
    inputs = batch()
    return model(**inputs).logits[..., :VOCABULARY] * inputs["attention_mask"][..., None]
