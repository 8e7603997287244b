"""Small tokenizers trained on the spot."""

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from clmoe.data.prompts import SYSTEM

EXTRA = {"image_token": "<image>"}
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def corpus() -> Iterator[str]:
    words = "dog cat red blue left right two what animal is it colour shape box circle square"
    for word in words.split():
        yield f"{SYSTEM} USER: \nWhat is the {word}?\nAnswer using a single word. ASSISTANT: {word}"
        yield f"USER: Name the {word}. ASSISTANT: It is a {word}, [0.12, 0.30]."


def byte_level(
    add_bos: bool = True, add_eos: bool = False, trim: bool = False, extra: dict[str, str] = EXTRA
) -> PreTrainedTokenizerFast:
    """GPT-2 style byte-level BPE; with trim the offsets leave out leading spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    single = f"{'<s> ' if add_bos else ''}$A{' </s>' if add_eos else ''}"
    template = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    steps = [processors.ByteLevel(trim_offsets=True), template] if trim else [template]
    tokenizer.post_processor = processors.Sequence(steps)
    return wrap(tokenizer, extra=extra)


def merging_across_answers() -> PreTrainedTokenizerFast:
    """A BPE without any splitting: 'ASSISTANT: dog' becomes tokens that reach across the answer's border."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(corpus(), trainer)
    return wrap(tokenizer)


def wrap(tokenizer: Tokenizer, eos: str = "</s>", extra: dict[str, str] = EXTRA) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=extra,
    )
