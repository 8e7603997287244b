"""The published folders as they are on the hub: files, indexes, tensor names, dtypes, settings; only sizes are cut.

Names and shapes are written out below, not taken from any class or table of the converter. LLaMA's 32,000 pieces and
CLIP's 336 pixels are real. Layers and widths are those of ``CUT``; ``SEVEN`` and ``THIRTEEN`` hold the real ones, which
are used without weights.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from torch import Tensor
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from tests.convert.sources import LLAMA, LLAVA, MEAN, STD
from tests.llama_vocabulary import llama_pieces, write_llama_pieces

VOCABULARY, ROWS, IMAGE, PAD = 32_000, 32_064, 32_000, 32_001
Sizes = dict[str, int]
"""V words, D width, F inner width, r half a head, B blocks; for CLIP C width, I inner width, L layers, T text width."""
CUT: Sizes = {"V": VOCABULARY, "D": 32, "F": 48, "r": 8, "B": 2, "C": 16, "I": 24, "L": 3, "T": 8}
SEVEN: Sizes = {"V": VOCABULARY, "D": 4096, "F": 11008, "r": 64, "B": 32, "C": 1024, "I": 4096, "L": 24, "T": 768}
THIRTEEN: Sizes = SEVEN | {"D": 5120, "F": 13824, "B": 40}
TOKENS, SIDE, PATCH = 576, 336, 14

# Name -> sizes of its dimensions; {n} counts layers.
LLAMA_KEYS = {
    "model.embed_tokens.weight": "V D",
    "model.layers.{n}.self_attn.q_proj.weight": "D D",
    "model.layers.{n}.self_attn.k_proj.weight": "D D",
    "model.layers.{n}.self_attn.v_proj.weight": "D D",
    "model.layers.{n}.self_attn.o_proj.weight": "D D",
    "model.layers.{n}.self_attn.rotary_emb.inv_freq": "r",
    "model.layers.{n}.mlp.gate_proj.weight": "F D",
    "model.layers.{n}.mlp.up_proj.weight": "F D",
    "model.layers.{n}.mlp.down_proj.weight": "D F",
    "model.layers.{n}.input_layernorm.weight": "D",
    "model.layers.{n}.post_attention_layernorm.weight": "D",
    "model.norm.weight": "D",
    "lm_head.weight": "V D",
}
PROJECTOR_KEYS = {
    "model.mm_projector.0.weight": "D C",
    "model.mm_projector.0.bias": "D",
    "model.mm_projector.2.weight": "D D",
    "model.mm_projector.2.bias": "D",
}
ENCODER_KEYS = {
    **{f"self_attn.{name}_proj.{end}": shape for name in "kvq" for end, shape in (("weight", "C C"), ("bias", "C"))},
    "self_attn.out_proj.weight": "C C", "self_attn.out_proj.bias": "C",
    "layer_norm1.weight": "C", "layer_norm1.bias": "C", "layer_norm2.weight": "C", "layer_norm2.bias": "C",
    "mlp.fc1.weight": "I C", "mlp.fc1.bias": "I", "mlp.fc2.weight": "C I", "mlp.fc2.bias": "C",
}  # fmt: skip
VISION_KEYS = {
    "vision_model.embeddings.class_embedding": "C",
    "vision_model.embeddings.position_ids": "1 577",
    "vision_model.embeddings.patch_embedding.weight": "C 3 14 14",
    "vision_model.embeddings.position_embedding.weight": "577 C",
    "vision_model.pre_layrnorm.weight": "C",
    "vision_model.pre_layrnorm.bias": "C",
    **{f"vision_model.encoder.layers.{{n}}.{name}": shape for name, shape in ENCODER_KEYS.items()},
    "vision_model.post_layernorm.weight": "C",
    "vision_model.post_layernorm.bias": "C",
}
CLIP_TEXT_KEYS = {
    "logit_scale": "",
    "text_projection.weight": "T T",
    "visual_projection.weight": "T C",
    "text_model.embeddings.position_ids": "1 77",
    "text_model.embeddings.token_embedding.weight": "49408 T",
    "text_model.embeddings.position_embedding.weight": "77 T",
    **{f"text_model.encoder.layers.{{n}}.{name}": shape.replace("C", "T") for name, shape in ENCODER_KEYS.items()},
    "text_model.final_layer_norm.weight": "T",
    "text_model.final_layer_norm.bias": "T",
}
CLIP_KEYS = CLIP_TEXT_KEYS | VISION_KEYS
HF_STARTS = {
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "vision_model.": "vision_tower.vision_model.",
    "": "language_model.",
}


def shapes(keys: dict[str, str], sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The name of every tensor, in all layers, with its shape."""
    found = {}
    for name, letters in keys.items():
        layers = sizes["B" if name.startswith("model.") else "L"] if "{n}" in name else 1
        shape = tuple(sizes.get(size) or int(size) for size in letters.split())
        found |= {name.format(n=n): shape for n in range(layers)}
    return found


def numbers(keys: dict[str, str], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Random tensors with these names that bfloat16 holds exactly; position ids and frequencies as in the real file."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes(keys, CUT).items():
        wide = 0.4 if len(shape) == 1 else 1.5 / math.sqrt(max(shape[1:], default=1))
        drawn = torch.randn(shape, generator=draw) * wide + ("norm" in name and name.endswith("weight"))
        found[name] = drawn.bfloat16().to(dtype)
        if name.endswith("position_ids"):
            found[name] = torch.arange(shape[1])[None]
        elif name.endswith("inv_freq"):
            found[name] = (10_000.0 ** (-torch.arange(shape[0]) / shape[0])).to(dtype)
    return found


def hf_name(name: str) -> str | None:
    """The name in llava-hf's folder; None for a tensor that is not there."""
    if name.endswith(("inv_freq", "position_ids")) or name.startswith(("text_", "visual_", "logit_")):
        return None
    start = next(start for start in HF_STARTS if name.startswith(start))
    return HF_STARTS[start] + name.removeprefix(start)


# ---- Folders


def write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def write_shards(folder: Path, tensors: dict[str, Tensor], shards: int, pickled: bool) -> None:
    """Write ``pytorch_model-00001-of-00002.bin`` or ``model-...safetensors`` with an index, or one file without one."""
    folder.mkdir(parents=True)
    stem, end = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names, files = list(tensors), {}
    for n in range(shards):
        file = f"{stem}-{n + 1:05}-of-{shards:05}.{end}" if shards > 1 else f"{stem}.{end}"
        part = {name: tensors[name] for name in names[n * len(names) // shards : (n + 1) * len(names) // shards]}
        torch.save(part, folder / file) if pickled else save_file(part, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    if shards > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        write(folder / f"{stem}.{end}.index.json", {"metadata": {"total_size": size}, "weight_map": files})


def special(text: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": text, **flags}


def write_slow_tokenizer(folder: Path, length: int) -> None:
    """Write tokenizer.model, tokenizer_config.json and special_tokens_map.json as transformers 4.31 left them."""
    write_llama_pieces(folder)
    marks = {"bos_token": special("<s>"), "eos_token": special("</s>"), "unk_token": special("<unk>")}
    settings = {
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": False,
        "model_max_length": length, "pad_token": None, "padding_side": "right", "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }  # fmt: skip
    write(folder / "tokenizer_config.json", settings | marks)
    plain = {name: {k: v for k, v in mark.items() if k != "__type"} for name, mark in marks.items()}
    write(folder / "special_tokens_map.json", plain | {"pad_token": "<unk>"})


def text_config() -> dict[str, Any]:
    heads = CUT["D"] // (2 * CUT["r"])
    return LLAMA | {
        "hidden_size": CUT["D"], "intermediate_size": CUT["F"], "num_hidden_layers": CUT["B"], "vocab_size": VOCABULARY,
        "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 4096,
    }  # fmt: skip


def vision_config() -> dict[str, Any]:
    return {
        "hidden_act": "quick_gelu", "hidden_size": CUT["C"], "image_size": SIDE, "intermediate_size": CUT["I"],
        "num_attention_heads": 2, "num_hidden_layers": CUT["L"], "patch_size": PATCH, "projection_dim": CUT["T"],
        "model_type": "clip_vision_model",
    }  # fmt: skip


def vicuna(folder: Path, tensors: dict[str, Tensor], pickled: bool) -> Path:
    """The folder of lmsys/vicuna-7b-v1.5."""
    write_shards(folder, tensors, 2, pickled)
    write(folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | text_config())
    sampling = {"max_length": 4096, "temperature": 0.9, "top_p": 0.6}
    write(folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": 1} | sampling)
    write_slow_tokenizer(folder, 4096)
    return folder


def liuhaotian(folder: Path, tensors: dict[str, Tensor], pickled: bool) -> Path:
    """liuhaotian/llava-v1.5-7b: the projector is in the shards, and again in a file beside them."""
    write_shards(folder, tensors, 2, pickled)
    more = {"freeze_mm_vision_resampler": False, "tune_mm_vision_resampler": False, "unfreeze_mm_vision_tower": False}
    values = {"model_type": "llava_llama", "max_length": 4096} | text_config() | LLAVA | more
    write(folder / "config.json", values | {"mm_hidden_size": CUT["C"]})
    write(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    torch.save({name: t for name, t in tensors.items() if "mm_projector" in name}, folder / "mm_projector.bin")
    write_slow_tokenizer(folder, 2048)
    return folder


def pretrained_projector(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5; returns the path of its mm_projector.bin."""
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "mm_projector.bin")
    stage = {"tune_mm_mlp_adapter": True, "image_aspect_ratio": "square", "mm_hidden_size": CUT["C"]}
    write(folder / "config.json", {"model_type": "llava"} | text_config() | LLAVA | stage)
    write(folder / "trainer_state.json", {"epoch": 1.0, "global_step": 2181})
    return folder / "mm_projector.bin"


def write_images(folder: Path, **more: Any) -> None:
    images = {"do_center_crop": True, "do_normalize": True, "do_resize": True, "image_mean": MEAN, "image_std": STD}
    write(folder / "preprocessor_config.json", images | {"resample": 3} | more)


def clip(folder: Path, tensors: dict[str, Tensor], pickled: bool) -> Path:
    """openai/clip-vit-large-patch14-336: float32, one file, text side and position_ids included."""
    write_shards(folder, tensors, 1, pickled)
    text = {"hidden_size": CUT["T"], "intermediate_size": CUT["I"], "model_type": "clip_text_model"}
    values = {
        "architectures": ["CLIPModel"], "initializer_factor": 1.0, "logit_scale_init_value": 2.6592,
        "model_type": "clip", "projection_dim": CUT["T"], "text_config": text, "text_config_dict": None,
        "torch_dtype": "float32", "transformers_version": None, "vision_config": vision_config(),
        "vision_config_dict": None,
    }  # fmt: skip
    write(folder / "config.json", values)
    write_images(folder, crop_size=SIDE, size=SIDE, feature_extractor_type="CLIPFeatureExtractor")
    return folder


def llava_hf(folder: Path, tensors: dict[str, Tensor], pickled: bool = False) -> Path:
    """llava-hf/llava-1.5-7b-hf: three shards with its own tensor names, all in float16, and 32,064 vocabulary rows."""
    ours = {hf_name(name): tensor.half() for name, tensor in tensors.items() if hf_name(name)}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        ours[name] = torch.cat([ours[name], ours[name][: ROWS - VOCABULARY] * 0.5])
    write_shards(folder, ours, 3, pickled)
    widths = text_config()
    text = {
        key: widths[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    }
    text |= {"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    text |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": ROWS}
    values = {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": IMAGE,
        "model_type": "llava", "pad_token_id": PAD, "projector_hidden_act": "gelu", "text_config": text,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.36.0.dev0",
        "vision_config": vision_config() | {"vocab_size": VOCABULARY}, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "vocab_size": ROWS,
    }  # fmt: skip
    write(folder / "config.json", values)
    write(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD})
    square = {"height": SIDE, "width": SIDE}
    kind = {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    write_images(folder, crop_size=square, size={"shortest_edge": SIDE}, do_convert_rgb=True, **kind)
    processor = {"image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": PATCH}
    processor |= {"processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default"}
    write(folder / "processor_config.json", processor)
    write_fast_tokenizer(folder)
    return folder


def write_fast_tokenizer(folder: Path) -> None:
    """Write tokenizer.model, the two added tokens, and tokenizer.json as transformers 4.36 made it from that model."""
    vocabulary, merges = llama_pieces()
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    marks = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    write_slow_tokenizer(folder, 4096)
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "added_tokens.json", {"<image>": IMAGE, "<pad>": PAD})
    entries = {str(tokenizer.token_to_id(mark)): special(mark) | {"special": True} for mark in marks}
    for entry in entries.values():
        del entry["__type"]
    settings = {
        "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": entries, "bos_token": "<s>",
        "clean_up_tokenization_spaces": False, "eos_token": "</s>", "legacy": False, "pad_token": "<pad>",
        "model_max_length": 10**30, "padding_side": "left", "processor_class": "LlavaProcessor", "unk_token": "<unk>",
        "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer", "trust_remote_code": False,
        "use_default_system_prompt": False,
    }  # fmt: skip
    write(folder / "tokenizer_config.json", settings)


# ---- What the parts compute, read by transformers from their own folders


def batch() -> dict[str, Tensor]:
    """A question about a picture of 576 tokens and one without a picture, left-padded."""
    image = torch.tensor([1, 319, 13563, *[IMAGE] * TOKENS, 29871, 13, 5618, 338, 372, 29973])
    text = torch.tensor([*[PAD] * (len(image) - 5), 1, 3148, 1001, 29901, 1724])
    ids = torch.stack([image, text])
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels}


@torch.no_grad()
def logits_of_parts(language: Path, vision: Path, projector: dict[str, Tensor]) -> Tensor:
    """Logits ``[2, T, V]`` of a LLaMA and a CLIP, loaded by transformers' own classes, joined by LLaVA-1.5's formula.

    Haotian Liu et al., arXiv 2310.03744: the patches of CLIP's second-to-last layer pass through two linears with GELU
    and replace the ``<image>`` tokens.
    """
    config = LlamaConfig(**text_config() | {"torch_dtype": None})
    llama = LlamaForCausalLM.from_pretrained(language, config=config, dtype=torch.float32)
    tower = CLIPVisionModel.from_pretrained(vision, dtype=torch.float32)
    inputs = batch()
    kept = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    w0, b0, w2, b2 = (tensor.float() for tensor in projector.values())
    features = torch.nn.functional.gelu(kept @ w0.t() + b0) @ w2.t() + b2
    ids = inputs["input_ids"]
    states = llama.get_input_embeddings()(ids.clamp(max=VOCABULARY - 1))
    states[ids == IMAGE] = features.flatten(0, 1)
    found = llama(inputs_embeds=states, attention_mask=inputs["attention_mask"]).logits
    return found * inputs["attention_mask"][..., None]
