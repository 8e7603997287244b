"""A LLaVA-1.5 of about a million parameters from transformers' own classes, for the playground and the tests."""

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

from clmoe.bases.stack import CLIPImageProcessorPil

PAD, BEGIN, END, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
EMBEDDING_STD = 0.05


@dataclass(frozen=True)
class TinySizes:
    """Sizes of the model; the defaults are the playground's (1.5 M parameters with its tokenizer).

    The tower has one layer more than it uses: as in LLaVA-1.5, features are taken before the last layer.
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
        """Tokens of an image in the language model: one per patch."""
        return (self.image_size // self.patch_size) ** 2


def build_tiny(
    texts: Iterable[str], seed: int, sizes: TinySizes = TinySizes(), vocabulary: int = 4096
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A freshly initialised model in fp32 and its processor.

    Args:
        texts: train the tokenizer; each of their words becomes one token as long as `vocabulary` suffices.
        seed: of the weights; the global torch generator is left alone.
    """
    tokenizer = _tokenizer(texts, vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(_config(tokenizer, sizes)).float()
        _initialise(model, sizes)
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    images = CLIPImageProcessorPil(
        size={"shortest_edge": sizes.image_size},
        crop_size={"height": sizes.image_size, "width": sizes.image_size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return model.eval(), LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=sizes.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
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
