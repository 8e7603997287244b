"""A tiny random base of every family, in transformers' format: model, tokenizer, image processor, chat template."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS, HIDDEN, FFN = 2, 32, 48
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CORPUS = (
    "Which colour is it? A. red B. green C. blue How many things are there? one two three Are you sure? yes no",
    "On which side is it, left or right? user assistant system model USER: ASSISTANT: You are a helpful assistant.",
)

# Modelled on the families' published templates, for one image and text.
CHATML = (
    "{% for m in messages %}@SYSTEM@<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}@IMAGE@"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONEVISION = (  # as in the published one, answers do not begin where the prompt ends
    "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}<image>"
    "{% else %}\n{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
VICUNA = (
    "{% for m in messages %}{{ m.role | upper }}: {% for c in m.content %}{% if c.type == 'image' %}<image>\n"
    "{% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}:{% if m.content[0].type != 'image' %} {% endif %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% for c in m.content %}{% if c.type == 'image' %}<start_of_image>{% else %}{{ c.text | trim }}{% endif %}"
    "{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN_VISION = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": HIDDEN}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Tiny:
    """How to make a family's base.

    Attributes:
        end: the token that ends a turn; ``specials`` are the other special tokens.
        named: attributes of the tokenizer (such as ``image_token``) and the special tokens that they stand for.
        config: makes the fields of the model's config, given a function from a token to its id.
        processor: settings of the processor besides its parts.
        bos, begins: the tokenizer's beginning token, and whether the tokenizer puts it before every text.
    """

    images: dict[str, Any]
    template: str
    end: str
    specials: tuple[str, ...]
    config: Callable[[Callable[[str], int]], dict[str, Any]]
    named: dict[str, str] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    bos: str | None = None
    begins: bool = True


def _qwen(**vision: Any) -> Tiny:
    def config(token: Callable[[str], int]) -> dict[str, Any]:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        return {
            "vision_config": {"depth": 2, "num_heads": 2, "patch_size": 14, **vision},
            "text_config": {**TEXT, "rope_parameters": rope},
            "image_token_id": token("<|image_pad|>"),
            "video_token_id": token("<|video_pad|>"),
            "vision_start_token_id": token("<|vision_start|>"),
            "vision_end_token_id": token("<|vision_end|>"),
        }

    size = {"shortest_edge": 28**2, "longest_edge": 56**2}
    return Tiny(
        images={"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "size": size},
        template=CHATML.replace("@IMAGE@", QWEN_IMAGE).replace("@SYSTEM@", SYSTEM),
        end="<|im_end|>",
        specials=("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        config=config,
    )


def _idefics(kind: str) -> Tiny:
    side = {"longest_edge": 56}
    return Tiny(
        images={"image_processor_type": f"{kind}ImageProcessor", "size": side, "max_image_size": {"longest_edge": 28}},
        template=IDEFICS,
        end="<end_of_utterance>",
        specials=(
            *("<|im_start|>", "<image>", "<fake_token_around_image>", "<global-img>"),
            *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
        ),
        config=lambda token: {
            "vision_config": {**VISION, "model_type": f"{kind.lower()}_vision"},
            "text_config": {**TEXT, "model_type": "llama"},
            "image_token_id": token("<image>"),
            "scale_factor": 2,
        },
        processor={"image_seq_len": 1},
    )


FAMILIES = {
    "llava_next": Tiny(
        images={
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": 28},
            "crop_size": {"height": 28, "width": 28},
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        },
        template=VICUNA,
        end="</s>",
        bos="<s>",
        specials=("<image>",),
        named={"image_token": "<image>"},
        config=lambda token: {
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "text_config": {**TEXT, "model_type": "llama"},
            "image_token_index": token("<image>"),
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        },
        processor={"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_onevision": Tiny(
        images={
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": 28, "width": 28},
            "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56]],
        },
        template=ONEVISION,
        end="<|im_end|>",
        specials=("<|im_start|>", "<image>", "<video>"),
        config=lambda token: {
            "vision_config": {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
            "text_config": {**TEXT, "model_type": "qwen2"},
            "image_token_index": token("<image>"),
            "video_token_index": token("<video>"),
            "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56]],
        },
        processor={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
    ),
    "qwen2_vl": _qwen(embed_dim=16, hidden_size=HIDDEN, mlp_ratio=2),
    "qwen2_5_vl": _qwen(**QWEN_VISION, window_size=56, fullatt_block_indexes=[1]),
    "qwen3_vl": _qwen(**QWEN_VISION, num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
    "internvl": Tiny(
        images={
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 28, "width": 28},
            "crop_to_patches": True,
            "max_patches": 4,
        },
        template=CHATML.replace("@IMAGE@", "<IMG_CONTEXT>\n").replace("@SYSTEM@", ""),
        end="<|im_end|>",
        specials=("<|im_start|>", "<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        config=lambda token: {
            "vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
            "text_config": {**TEXT, "model_type": "qwen2"},
            "image_token_id": token("<IMG_CONTEXT>"),
            "image_seq_length": 1,
        },
        processor={"image_seq_length": 1},
    ),
    "smolvlm": _idefics("SmolVLM"),
    "idefics3": _idefics("Idefics3"),
    "gemma3": Tiny(
        images={"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}},
        template=GEMMA,
        end="<end_of_turn>",
        bos="<bos>",
        specials=("<eos>", "<start_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        config=lambda token: {
            "vision_config": {**VISION, "vision_use_head": False},
            "text_config": {**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            "mm_tokens_per_image": 4,
            "boi_token_index": token("<start_of_image>"),
            "eoi_token_index": token("<end_of_image>"),
            "image_token_index": token("<image_soft_token>"),
        },
        processor={"image_seq_length": 4},
    ),
}


def save_family(name: str, folder: Path) -> Path:
    """Write the family's folder as the hub would hold it. The end token's logit is always 0, so answers are long."""
    tiny = FAMILIES[name]
    tokenizer = _tokenizer(tiny)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fields = tiny.config(tokenizer.convert_tokens_to_ids)
        fields["text_config"] |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        fields["text_config"] |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[name](**fields, tie_word_embeddings=False))
        for parameter in model.parameters():  # with the published 0.02, all answers would be the same
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.lm_head.weight.data[tokenizer.convert_tokens_to_ids(tiny.end)] = 0
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(tiny.images))
    (folder / "processor_config.json").write_text(json.dumps(tiny.processor))
    if tiny.template:
        (folder / "chat_template.jinja").write_text(tiny.template)
    return folder


def save_wide(name: str, folder: Path) -> Path:
    """Write the family's folder without weights; its decoder has four blocks of published proportions, 512 wide."""
    save_family(name, folder)
    values = json.loads((folder / "config.json").read_text())
    text, vision = values["text_config"], values["vision_config"]
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    text |= {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, **heads}
    text.pop("layer_types", None)
    if "mrope_section" in text.get("rope_parameters", {}):
        text["rope_parameters"]["mrope_section"] = [8, 12, 12]
    if name.startswith("qwen"):
        vision["hidden_size" if name == "qwen2_vl" else "out_hidden_size"] = 512
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").unlink()
    return folder


def _tokenizer(tiny: Tiny) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows the family's special tokens."""
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<pad>", tiny.end, *([tiny.bos] if tiny.bos else []), *tiny.specials]
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            min_frequency=1,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if tiny.bos and tiny.begins:
        bpe.post_processor = TemplateProcessing(
            single=f"{tiny.bos} $A", special_tokens=[(tiny.bos, bpe.token_to_id(tiny.bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>" if "<eos>" in specials else tiny.end,
        bos_token=tiny.bos,
        extra_special_tokens=tiny.named or list(tiny.specials),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
