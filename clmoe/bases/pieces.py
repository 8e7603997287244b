"""Token ids as SentencePiece gives them for a ``tokenizer.model``, which is all that Vicuna and old LLaVAs have.

SentencePiece merges by the pieces' scores. transformers 5.23 orders the merges by piece number instead and so splits
runs of blanks differently: "Hi  Hello" becomes 6324 259 10994 and not 6324 29871 15043.
"""

from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from clmoe.data.prompts import SYSTEM
from clmoe.data.records import IMAGE_MARK
from clmoe.errors import ClmoeError

PAD = "<pad>"
Ids = dict[str, list[int]]
"""The ids of texts, without a ``<s>``."""
SETTINGS = {"extra_special_tokens": {"image_token": IMAGE_MARK}, "padding_side": "left"}
PROBES = (
    SYSTEM + " USER: What is it?\nAnswer the question using a single word or phrase. ASSISTANT:",
    "Hi  Hello   three    four                 many blanks  ",
    "[0.12, 0.30, 0.50, 0.94] 1 + 234,567 = 2024-11-28",
    "\nlines\n\n\n  and\ttabs\r\n\n",
    "naïve “café” Ωμέγα 狗 한국 עברית \u00a0🐕👩‍🚀 e\u0301",
)
"""Texts on which tokenizers are compared. None begins with a blank, nor does any prompt: SentencePiece would put a
second one before it, and transformers would not."""


def read_pieces(file: Path, **settings: Any) -> tuple[LlamaTokenizer, Ids]:
    """A tokenizer that merges by a ``tokenizer.model``'s scores, and the ids that SentencePiece gives the probes.

    One more probe holds all words of the vocabulary, two blanks apart. Raises ClmoeError unless SentencePiece reads the
    file.
    """
    try:
        pieces = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise ClmoeError(f"{file}: not a SentencePiece model: {error}") from error
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = generate_merges(vocabulary, {piece: pieces.get_score(i) for piece, i in vocabulary.items()})
    words = "  ".join(piece[1:] for piece in vocabulary if piece[0] == "▁" and piece[1:].isalpha())
    ids = {text: pieces.encode(text) for text in (*PROBES, words)}
    return LlamaTokenizer(vocabulary, merges, add_bos_token=True, **settings), ids


def different(tokenizer: PreTrainedTokenizerFast, ids: Ids) -> str:
    """How the tokenizer differs from these ids of the probes, apart from a ``<s>`` before each; empty if not at all."""
    for text, wanted in ids.items():
        found = tokenizer(text, verbose=False)["input_ids"]
        found = found[found[:1] == [tokenizer.bos_token_id] :]
        if found != wanted:
            at = next((n for n, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), 0)
            ours, theirs = found[at : at + 5], wanted[at : at + 5]
            return f"gives {ours} from token {at} of {text[:40]!r}... on, but the original gives {theirs}"
    return ""


def repaired(tokenizer: PreTrainedTokenizerFast, folder: Path, image_id: int) -> PreTrainedTokenizerFast:
    """A LLaVA folder's tokenizer or, if only ``tokenizer.model`` is there, one that follows its scores.

    Raises ClmoeError if ids are not SentencePiece's, or if ``<image>`` does not have its id from config.json.
    """
    file, made = folder / "tokenizer.model", folder / "tokenizer.json"
    if getattr(tokenizer, "image_token", None) is None and tokenizer.convert_ids_to_tokens(image_id) == IMAGE_MARK:
        # llava-hf's folders have named it since transformers 4.46, older ones only hold it
        tokenizer.image_token, tokenizer.image_token_id = IMAGE_MARK, image_id
    if not file.is_file():
        return tokenizer
    own, ids = read_pieces(file, **SETTINGS)
    if not made.is_file():
        own.add_special_tokens({"pad_token": PAD})
        tokenizer = own
    reason = different(tokenizer, ids)
    if not reason and tokenizer.image_token_id != image_id:
        reason = f"puts {IMAGE_MARK} at {tokenizer.image_token_id}, but config.json at {image_id}"
    if reason:
        fix = f"{made.name} and {file.name} differ: remove the wrong one" if made.is_file() else "use another one"
        raise ClmoeError(f"{folder}: the tokenizer {reason}; {fix}")
    return tokenizer
