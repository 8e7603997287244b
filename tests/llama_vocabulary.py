"""Vocabulary folders as LLaMA models ship them: a small one, trained with LLaMA's options, and LLaMA's own."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from clmoe.data.prompts import SYSTEM


def _corpus() -> Iterator[str]:
    """As in LLaMA's own vocabulary, ``USER`` becomes a token (here from the middle of words) and ``▁USER`` does not."""
    yield from SYSTEM.split(". ")
    words = "dog cat red blue left right two what animal is it colour shape box circle square"
    for word in words.split():
        yield f"What is the {word}? Answer the question using a single word or phrase."
        yield f"ASSISTANT: It is a {word}, [0.12, 0.30]. ASSISTANT: {word}"
        yield f"the{word}USER aUSERs"


def train_vocabulary(folder: Path) -> Path:
    """Write ``tokenizer.model`` and the settings beside it, as in lmsys/vicuna-7b-v1.5; return the folder.

    LLaMA's options are BPE with byte fallback, every digit on its own, no normalisation, white space kept, a space
    before every text, and ``<unk> <s> </s>`` as the first three pieces, without a padding piece.
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


def llama_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """LLaMA's 32,000 pieces and its merges in order, as far as the released conversations and the probes need them.

    They are cut from the tokenizer.json in PyPI's wordllama 0.4.0. A piece that occurs in no such text has a
    placeholder name and no merge.
    """
    data = json.loads(gzip.decompress((Path(__file__).parent / "data/llama_pieces.json.gz").read_bytes()))
    names = dict.fromkeys(range(32_000)) | {number: piece for piece, number in data["vocab"].items()}
    vocabulary = {piece or f"<unused {number}>": number for number, piece in names.items()}
    return vocabulary, [tuple(merge.split(" ")) for merge in data["merges"]]


def write_llama_pieces(folder: Path) -> Path:
    """Write these pieces as ``tokenizer.model``, as Vicuna has it; return the folder.

    A piece's score falls with the rank of its merge, and runs of blanks merge last of all.
    """
    vocabulary, merges = llama_pieces()
    train_vocabulary(folder)
    proto = ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    kinds = [piece.type for piece in proto.pieces[:259]]
    del proto.pieces[:]
    scores = {left + right: -float(rank) for rank, (left, right) in reversed(list(enumerate(merges)))}
    for piece, number in vocabulary.items():
        score = -1e9 if set(piece) == {"▁"} and len(piece) > 1 else scores.get(piece, -1e6 if number else 0.0)
        kind = kinds[number] if number < 259 else ModelProto.SentencePiece.NORMAL
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.vocab_size = len(vocabulary)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return folder
