"""A LLaVA-1.5 of about a million parameters from transformers' own classes, for playground and tests."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PAD, BEGIN, END, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
EMBEDDING_STD = 0.05


@dataclass(frozen=True)
class TinySizes:
    """Sizes of the model; the defaults are the playground's (1.5 M parameters with its tokenizer).

    The tower has one layer more than it uses: like LLaVA-1.5, features are taken before the last layer.
    """

    image_size: int = 56
    patch_size: int = 14
    vision_hidden: int = 96
    vision_layers: int = 4
    vision_heads: int = 4
    vision_ffn: int = 384
    text_hidden: int = 128
    text_layers: int = 4
    text_heads: int = 4
    text_ffn: int = 344
    positions: int = 1024

    @property
    def image_tokens(self) -> int:
        """Tokens an image takes in the language model: one per patch."""
        return (self.image_size // self.patch_size) ** 2


def build_tiny(
    texts: Iterable[str], seed: int, sizes: TinySizes = TinySizes(), vocabulary: int = 4096
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A freshly initialised model in fp32 and its processor.

    Args:
        texts: what the tokenizer is trained on; every word that occurs in it becomes one token, as long as
            `vocabulary` suffices.
        seed: seeds the weights (the global torch generator is left as it was).
    """
    processor = build_processor(train_tokenizer(texts, vocabulary), sizes)
    config = _config(processor.tokenizer, sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).float()
        _initialise(model, sizes)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.bos_token_id = processor.tokenizer.bos_token_id
    return model.eval(), processor


def train_tokenizer(texts: Iterable[str], vocabulary: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that splits digits, puts <s> first, and knows <image> and </s>."""
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=1,
        special_tokens=[PAD, BEGIN, END, UNKNOWN, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, bpe.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, sizes: TinySizes) -> LlavaProcessor:
    """The processor of the tiny model: images resized to its side, scaled to -1..1."""
    side = sizes.image_size
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=sizes.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _config(tokenizer: PreTrainedTokenizerFast, sizes: TinySizes) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=sizes.vision_hidden,
        intermediate_size=sizes.vision_ffn,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        projection_dim=sizes.vision_hidden,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.text_hidden,
        intermediate_size=sizes.text_ffn,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        num_key_value_heads=sizes.text_heads,
        max_position_embeddings=sizes.positions,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        image_seq_length=sizes.image_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def _initialise(model: LlavaForConditionalGeneration, sizes: TinySizes) -> None:
    """Fan-in initialisation of projector and language model; at this width a std of 0.02 learns slowly."""
    residual = 1 / math.sqrt(2 * sizes.text_layers)
    for part in (model.model.multi_modal_projector, model.model.language_model):
        for name, module in part.named_modules():
            if isinstance(module, nn.Linear):
                scale = residual if name.endswith(("o_proj", "down_proj")) else 1.0
                nn.init.normal_(module.weight, std=scale / math.sqrt(module.in_features))
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=EMBEDDING_STD)
    nn.init.normal_(model.lm_head.weight, std=EMBEDDING_STD)
