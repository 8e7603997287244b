"""The embedded base's byte-level tokenizer, and some that fit no template."""

from tokenizers import Tokenizer, models, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from clmoe.config import ModelConfig
from clmoe.data.prompts import SYSTEM
from clmoe.utils.paths import resolve_model_path


def shipped() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(resolve_model_path(ModelConfig().path))


def appending_the_end() -> PreTrainedTokenizerFast:
    """A tokenizer that adds ``</s>`` to every text."""
    tokenizer = shipped()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def merging_across_answers() -> PreTrainedTokenizerFast:
    """A BPE without any splitting: in 'ASSISTANT: dog', the token ': d' crosses the start of the answer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", "<pad>"])
    tokenizer.train_from_iterator([f"{SYSTEM} USER: \nWhat is the dog?", *[": d"] * 99], trainer)
    return wrap(tokenizer, extra_special_tokens={"image_token": "<image>"})


def wrap(tokenizer: Tokenizer, **special: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | special
    )
