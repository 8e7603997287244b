"""A small vocabulary trained by SentencePiece with LLaMA's options, in a folder as LLaMA models ship it."""

import json
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from clmoe.data.prompts import SYSTEM


def _corpus() -> Iterator[str]:
    """As in LLaMA's own vocabulary, ``USER`` becomes a token (here from the middle of words) and ``▁USER`` none."""
    yield from SYSTEM.split(". ")
    words = "dog cat red blue left right two what animal is it colour shape box circle square"
    for word in words.split():
        yield f"What is the {word}? Answer the question using a single word or phrase."
        yield f"ASSISTANT: It is a {word}, [0.12, 0.30]. ASSISTANT: {word}"
        yield f"the{word}USER aUSERs"


def train_vocabulary(folder: Path) -> Path:
    """``tokenizer.model`` and the settings beside it, as in lmsys/vicuna-7b-v1.5; returns the folder.

    LLaMA's options: BPE, bytes as a fallback, every digit on its own, no normalisation, white space kept, a space
    put before every text, and ``<unk> <s> </s>`` as the first three pieces without a padding piece.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_corpus(),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99995,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {"add_bos_token": True, "model_max_length": 4096, "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
