"""LLaVA-1.5's conversation template (``vicuna_v1``) and the answer mask.

A conversation is one string with at most one ``<image>``. As in LLaVA, the texts before and after the mark are
tokenised separately, and ``image_token_count`` copies of the image token come between them. This matters for LLaMA's
tokenizer: it marks the beginning of the second text, so the tokens after an image are ``▁``, ``<0x0A>``, where a
single string gives ``<0x0A>`` alone. Byte-level tokenizers give the same either way. The tokenizer's own setting
decides whether the first text gets a ``<s>``, in training and in prompts alike; the second text never does.

The labels follow from the tokens' character offsets: they are exactly the tokens of `` answer</s>`` of every turn,
whatever the tokenizer does with spaces, and equal what LLaVA's ``preprocess_v1`` leaves unmasked. Where that function
loses count and masks a whole conversation with a warning (text that holds ``ASSISTANT: ``, a tokenizer that it does not
know), they are still these tokens. Two checks turn a tokenizer that does not fit the template into an error instead of
a silent zero loss: no token may reach across the border of an answer, and the tokens of the first prompt (what
evaluation sends) must be a prefix of the training tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from clmoe.data.records import IMAGE_MARK, TrainRecord, Turn
from clmoe.errors import ClmoeError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
END = "</s>"
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

    Raises:
        ClmoeError: the tokenizer does not fit the template, the text holds a special token (``</s>``, ``<image>``), or
            truncation leaves no answer token. The message names the record.
    """
    where = f"record {record.id!r}"
    has_image = record.image is not None
    text, spans = render(record.turns, has_image)
    ids, offsets = _tokenise(text, tokenizer, has_image, len(record.turns), where)
    labels = _answer_labels(ids, offsets, spans, tokenizer.eos_token_id, where)
    prompt, _ = _tokenise(prompt_text(record.turns[0].question, has_image), tokenizer, has_image, 0, where)
    if ids[: len(prompt)] != prompt or any(label != IGNORE for label in labels[: len(prompt)]):
        raise ClmoeError(
            f"{where}: the prompt's tokens are not the beginning of the training tokens, so training and "
            "evaluation would differ; this tokenizer does not fit the vicuna_v1 template"
        )
    if has_image:
        position = ids.index(tokenizer.image_token_id)
        ids = _expand(ids, position, image_token_count)
        labels = _expand(labels, position, image_token_count)
    total = len(ids)
    ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORE for label in labels):
        raise ClmoeError(
            f"{where}: {total} tokens, and no answer token is among the first {max_length}; "
            "raise the maximum length or shorten the record"
        )
    return Encoded(ids, labels)


def encode_prompt(
    question: str, has_image: bool, tokenizer: PreTrainedTokenizerFast, image_token_count: int
) -> list[int]:
    """Token ids of the prompt up to ``ASSISTANT:``, never truncated. Raises ClmoeError as ``encode_training``."""
    where = f"question {question[:60]!r}"
    ids, _ = _tokenise(prompt_text(question, has_image), tokenizer, has_image, 0, where)
    return _expand(ids, ids.index(tokenizer.image_token_id), image_token_count) if has_image else ids


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
    text: str, tokenizer: PreTrainedTokenizerFast, has_image: bool, ends: int, where: str
) -> tuple[list[int], Spans]:
    """Ids and character offsets; checks that the special tokens are those of the template and no others."""
    if tokenizer.eos_token != END:
        raise ClmoeError(f"tokenizer: the end token is {tokenizer.eos_token!r}; the vicuna_v1 template needs {END!r}")
    if has_image and getattr(tokenizer, "image_token", None) != IMAGE_MARK:
        raise ClmoeError(
            f"tokenizer: no image token {IMAGE_MARK!r}; "
            f"add it with extra_special_tokens={{'image_token': '{IMAGE_MARK}'}}"
        )
    image_id: Any = getattr(tokenizer, "image_token_id", None)
    before, _, after = text.partition(IMAGE_MARK) if has_image else (text, "", "")
    ids, offsets = _tokens(before, 0, tokenizer, True)
    if has_image:
        start = len(before) + len(IMAGE_MARK)
        later_ids, later_offsets = _tokens(after, start, tokenizer, False)
        ids, offsets = [*ids, image_id, *later_ids], [*offsets, (len(before), start), *later_offsets]
    for token, token_id, wanted in ((END, tokenizer.eos_token_id, ends), (IMAGE_MARK, image_id, has_image)):
        if ids.count(token_id) != wanted:
            raise ClmoeError(
                f"{where}: {ids.count(token_id)} tokens {token}, the template has {int(wanted)}; remove it from the "
                "text or, if it is not there, fix the tokenizer: one special token, never appended"
            )
    return ids, offsets


def _tokens(text: str, start: int, tokenizer: PreTrainedTokenizerFast, with_special: bool) -> tuple[list[int], Spans]:
    """Ids of one text and their character offsets, shifted by ``start``; ``<s>`` in front only ``with_special``."""
    encoded = tokenizer(text, add_special_tokens=with_special, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), [(left + start, right + start) for left, right in encoded["offset_mapping"]]


def _answer_labels(ids: list[int], offsets: Spans, spans: Spans, end_id: int, where: str) -> list[int]:
    """The ids of the tokens inside a span, IGNORE elsewhere. Each span must hold some answer and end in ``end_id``.

    A token of no width (``<s>``, or white space in tokenizers that trim offsets) belongs to the span that it begins in.
    """
    labels = [IGNORE] * len(ids)
    position = 0
    for start, stop in spans:
        while position < len(ids) and offsets[position][0] < start:
            if offsets[position][1] > start:
                raise ClmoeError(f"{where}: a token reaches across 'ASSISTANT:' into the answer; wrong tokenizer")
            position += 1
        first = position
        while position < len(ids) and offsets[position][0] < stop:
            labels[position] = ids[position]
            position += 1
        if position - first < 2 or ids[position - 1] != end_id or offsets[position - 1][1] != stop:
            raise ClmoeError(f"{where}: the tokens of an answer do not end in one {END}; the tokenizer does not fit")
    return labels


def _expand(values: list[int], position: int, count: int) -> list[int]:
    """``count`` copies of the value at ``position`` in place of one."""
    return values[:position] + [values[position]] * count + values[position + 1 :]
