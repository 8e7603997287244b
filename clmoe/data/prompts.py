"""LLaVA-1.5's conversation template (``vicuna_v1``) and the answer mask.

As in LLaVA, the texts before and after ``<image>`` are tokenised separately, with ``image_token_count`` copies of the
image token between them. LLaMA's tokenizer marks the beginning of the second text: the tokens after an image are ``▁``,
``<0x0A>``, while a single string gives ``<0x0A>`` alone. Only the first text gets a ``<s>``, if the tokenizer adds one.
docs/faults.md lists where ids and labels differ from those of the released training code.

The labels follow from the tokens' character offsets: they are exactly the tokens of `` answer</s>`` of every turn.
LLaVA's ``preprocess_v1`` leaves the same ones unmasked, unless it loses count (``ASSISTANT: `` in the text) and masks
all.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from clmoe.data.records import IMAGE_MARK, TrainRecord, Turn
from clmoe.data.rows import END
from clmoe.errors import ClmoeError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IGNORE = -100
"""Label of tokens that do not count in the loss."""

Spans = list[tuple[int, int]]


class Encoded(NamedTuple):
    """Token ids and labels of one conversation, of equal length; labels are IGNORE outside the answers."""

    input_ids: list[int]
    labels: list[int]


def prompt_text(question: str, has_image: bool) -> str:
    """The prompt that evaluation sends; it ends in ``ASSISTANT:`` without a space."""
    mark = f"{IMAGE_MARK}\n" if has_image else ""
    return f"{SYSTEM} USER: {mark}{question} ASSISTANT:"


def encode_training(
    record: TrainRecord, tokenizer: PreTrainedTokenizerFast, image_token_count: int, max_length: int
) -> Encoded:
    """Token ids and labels of a record, truncated on the right to ``max_length`` tokens, the image's included.

    Raises ClmoeError naming the record if the tokenizer does not fit the template, the text holds a special token
    (``</s>``, ``<image>``), or truncation leaves no answer token.
    """
    where = f"record {record.id!r}"
    has_image = record.image is not None
    image_tokens = image_token_count if has_image else 0
    text, spans = render(record.turns, has_image)
    ids, offsets = _tokenise(text, tokenizer, image_tokens, len(record.turns), where)
    labels = answer_labels(ids, offsets, spans, tokenizer.eos_token_id, where)
    prompt, _ = _tokenise(prompt_text(record.turns[0].question, has_image), tokenizer, image_tokens, 0, where)
    if ids[: len(prompt)] != prompt or any(label != IGNORE for label in labels[: len(prompt)]):
        differ = "the prompt's tokens are not the beginning of the training tokens"
        raise ClmoeError(f"{where}: {differ}; this tokenizer does not fit the vicuna_v1 template")
    encoded = Encoded(ids[:max_length], labels[:max_length])
    if all(label == IGNORE for label in encoded.labels):
        cut = f"{len(ids)} tokens, and no answer token is among the first {max_length}"
        raise ClmoeError(f"{where}: {cut}; raise the maximum length or shorten the record")
    return encoded


def encode_prompt(
    question: str, has_image: bool, tokenizer: PreTrainedTokenizerFast, image_token_count: int
) -> list[int]:
    """Token ids of the prompt up to ``ASSISTANT:``, never truncated. Raises ClmoeError as ``encode_training`` does."""
    text, image_tokens = prompt_text(question, has_image), image_token_count if has_image else 0
    return _tokenise(text, tokenizer, image_tokens, 0, f"question {question[:60]!r}")[0]


def render(turns: Sequence[Turn], has_image: bool) -> tuple[str, Spans]:
    """The conversation, and the characters of each `` answer</s>``. The next ``USER:`` follows ``</s>`` directly."""
    text, spans = "", []
    for number, turn in enumerate(turns):
        text += f"USER: {turn.question} ASSISTANT:" if number else prompt_text(turn.question, has_image)
        start = len(text)
        text += f" {turn.answer}{END}"
        spans.append((start, len(text)))
    return text, spans


def _tokenise(
    text: str, tokenizer: PreTrainedTokenizerFast, image_tokens: int, ends: int, where: str
) -> tuple[list[int], Spans]:
    """Ids and character offsets; raises ClmoeError if the special tokens are not those of the template."""
    if tokenizer.eos_token != END:
        raise ClmoeError(f"tokenizer: the end token is {tokenizer.eos_token!r}; the vicuna_v1 template needs {END!r}")
    if image_tokens and getattr(tokenizer, "image_token", None) != IMAGE_MARK:
        fix = f"add it with extra_special_tokens={{'image_token': '{IMAGE_MARK}'}}"
        raise ClmoeError(f"tokenizer: no image token {IMAGE_MARK!r}; {fix}")
    image_id: Any = getattr(tokenizer, "image_token_id", None)
    ids: list[int] = []
    offsets: Spans = []
    start = 0
    for part in text.split(IMAGE_MARK, 1) if image_tokens else [text]:
        if start:
            ids += [image_id] * image_tokens
            offsets += [(start - len(IMAGE_MARK), start)] * image_tokens
        found, places = _encoded(tokenizer, part, not start)
        ids += found
        offsets += [(left + start, right + start) for left, right in places]
        start = len(part) + len(IMAGE_MARK)
    for token, token_id, wanted in ((END, tokenizer.eos_token_id, ends), (IMAGE_MARK, image_id, image_tokens)):
        if ids.count(token_id) != wanted:
            fix = "remove it from the text or, if it is not there, fix the tokenizer: one special token, never appended"
            raise ClmoeError(f"{where}: {ids.count(token_id)} tokens {token}, but the template has {wanted}; {fix}")
    return ids, offsets


@lru_cache(maxsize=16)
def _encoded(tokenizer: PreTrainedTokenizerFast, text: str, first: bool) -> tuple[Sequence[int], Spans]:
    """Ids and offsets of a text. They are kept, since the text before an image is the same in every prompt."""
    encoded = tokenizer(text, add_special_tokens=first, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"]


def answer_labels(ids: list[int], offsets: Spans, spans: Spans, end_id: int, where: str) -> list[int]:
    """The ids of the tokens inside a span, IGNORE elsewhere. Each span must hold some answer and end in ``end_id``.

    Raises ClmoeError, which begins with ``where``, if one does not. A token of zero width (``<s>``, or white space in
    tokenizers that trim offsets) belongs to the span in which it begins.
    """
    labels = [IGNORE] * len(ids)
    lefts = [left for left, _ in offsets]
    for start, stop in spans:
        first, last = bisect_left(lefts, start), bisect_left(lefts, stop)
        if first and offsets[first - 1][1] > start:
            raise ClmoeError(f"{where}: a token reaches across the end of the prompt into the answer; wrong tokenizer")
        if last - first < 2 or ids[last - 1] != end_id or offsets[last - 1][1] != stop:
            raise ClmoeError(f"{where}: an answer's tokens do not end in one end token; the tokenizer does not fit")
        labels[first:last] = ids[first:last]
    return labels
