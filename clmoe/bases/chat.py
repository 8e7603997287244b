"""Inputs of the bases that come with a processor: its chat template, its image inputs, and labels for answers alone.

The rendered conversation is tokenised once, by the processor, which replaces an image's mark with its tokens. Labels
follow from the tokens' character offsets. An image comes before every answer, so its tokens move all answers by the
same number of characters, and the last end of a turn shows by how many.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from clmoe.bases.families import Family
from clmoe.bases.stack import WITH_PILLOW
from clmoe.data import images
from clmoe.data.batches import PromptItem, TrainItem
from clmoe.data.prompts import IGNORE, Spans, answer_labels
from clmoe.data.records import TrainRecord, Turn
from clmoe.errors import ClmoeError

PROBE = Turn("What is it?", "cat")
SIDE = 64  # pixels of the probe's image
TOKEN_TYPES = "token_type_ids"
OF_TEXT = {"input_ids", "attention_mask", "offset_mapping", "labels", TOKEN_TYPES}


class _ImagesOnly:
    """A processor without its part for videos: no record holds them, and only that part would need torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != "video_processor"]  # type: ignore[misc]


def open_processor(folder: str, config: PretrainedConfig, **cached: Any) -> ProcessorMixin:
    """A folder's processor; images go through Pillow, so that their pixels do not depend on the machine."""
    kind: Any = PROCESSOR_MAPPING[type(config)]
    if "video_processor" not in kind.get_attributes():
        return kind.from_pretrained(folder, **WITH_PILLOW, **cached)
    kind = type(kind.__name__, (_ImagesOnly, kind), {})
    settings, _ = kind.get_processor_dict(folder, **cached)
    parts = [
        AutoImageProcessor.from_pretrained(folder, **WITH_PILLOW, **cached),
        AutoTokenizer.from_pretrained(folder, **cached),
    ]
    return kind.from_args_and_dict(parts, settings, video_processor=None)


@dataclass(frozen=True)
class Chat:
    """Turns records into a base's inputs through ``processor``.

    Attributes:
        template: the chat template, in Jinja.
        end: the token that ends an answer: the template's, or the tokenizer's if the template writes none
            (``appended``).
    """

    processor: ProcessorMixin
    family: Family
    template: str
    end: str = ""
    appended: bool = False
    _sizes: dict[tuple[int, int], int] = field(default_factory=dict, compare=False)

    @classmethod
    def open(cls, processor: ProcessorMixin, family: Family) -> "Chat":
        """Raises ValueError for no template, an unknown input, or a template that labels cannot be read from."""
        template = family.template or processor.chat_template or processor.tokenizer.chat_template
        template = template.get("default") if isinstance(template, dict) else template
        if not template:
            raise ValueError("its processor has no chat template: the row in clmoe/bases/families.py must give one")
        bare = cls(processor, family, template)
        user = [{"role": "user", "content": [{"type": "text", "text": PROBE.question}]}]
        prompt = bare._text(user, ask=True)
        whole = bare._text([*user, _said(PROBE.answer)])
        found = bare._special.search(whole, len(prompt)) if whole.startswith(prompt) else None
        chat = cls(processor, family, template, found[0] if found else processor.tokenizer.eos_token, found is None)
        try:
            chat._check()
        except ClmoeError as error:
            raise ValueError(str(error)) from error
        return chat

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.processor.tokenizer

    @property
    def end_id(self) -> int:
        return cast(int, self.tokenizer.convert_tokens_to_ids(self.end))

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Any special token, the longest first."""
        words = sorted((str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special), key=len)
        return re.compile("|".join(map(re.escape, reversed(words))))

    def made_by(self) -> list[str]:
        """What decides the inputs of a record, for the names of cached results."""
        return [self.tokenizer.backend_tokenizer.to_str(), self.processor.to_json_string(), self.template]

    # ---- Items

    def train_item(self, record: TrainRecord, image: Image.Image | None, max_length: int) -> TrainItem:
        """A record, cut off on the right at ``max_length`` tokens. Raises ClmoeError naming it, also if no answer token
        is left."""
        if record.masked:
            ids = torch.tensor([self.end_id])
            extra = self._extra({TOKEN_TYPES: torch.zeros_like(ids)[None]})
            return TrainItem(ids, None, torch.full_like(ids, IGNORE), extra=extra)
        where = f"record {record.id!r}"
        found, labels = self._labelled(record.turns, image, where)
        if all(label == IGNORE for label in labels[:max_length]):
            cut = f"{len(labels)} tokens, and no answer token is among the first {max_length}"
            raise ClmoeError(f"{where}: {cut}; raise the maximum length or shorten the record")
        extra = self._extra(found, max_length)
        return TrainItem(found["input_ids"][0, :max_length], None, torch.tensor(labels[:max_length]), extra=extra)

    def prompt_item(self, question: str, image: Image.Image | None) -> PromptItem:
        """A question up to where the answer begins, never cut off. Raises ClmoeError like ``train_item``."""
        where = f"question {question[:60]!r}"
        found = self._encode(self.render([Turn(question, "")], image is not None, where, ask=True)[0], image, where)
        if self.family.typed_answers:
            found[TOKEN_TYPES] = torch.zeros_like(found["input_ids"])
        return PromptItem(found["input_ids"][0], None, extra=self._extra(found))

    def answer_tokens(self, record: TrainRecord, image_root: Path, max_length: int) -> tuple[int, int]:
        """A record's answer tokens within ``max_length`` tokens, and beyond; an image's content does not matter."""
        where = f"record {record.id!r}"
        size = None if record.image is None else images.size_of(image_root / record.image)
        text, _ = self.render(record.turns, size is not None, where)
        if len(text.encode()) + self._probe_tokens(size) <= max_length:  # a token is at least a byte
            return 1, 0
        blank = None if size is None else Image.new("RGB", size)
        answers = [label != IGNORE for label in self._labelled(record.turns, blank, where)[1]]
        return sum(answers[:max_length]), sum(answers[max_length:])

    def _probe_tokens(self, size: tuple[int, int] | None) -> int:
        """Tokens of the probe with an image of this size: more than the image takes."""
        key = size or (0, 0)
        if key not in self._sizes:
            blank = None if size is None else Image.new("RGB", size)
            self._sizes[key] = len(self.prompt_item(PROBE.question, blank).input_ids)
        return self._sizes[key]

    # ---- Text

    def render(self, turns: Sequence[Turn], has_image: bool, where: str, ask: bool = False) -> tuple[str, Spans]:
        """The conversation, and the characters of each answer with its end; with ``ask``, the first question alone."""
        messages: list[dict[str, Any]] = []
        prompts = []
        for number, turn in enumerate(turns):
            if found := self._special.search(turn.question) or self._special.search(turn.answer):
                raise ClmoeError(f"{where}: the text holds the special token {found[0]}; remove it")
            content = [{"type": "image"}] if has_image and not number else []
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.question}]})
            prompts.append(self._text(messages, ask=True))
            if ask:
                return prompts[0], []
            messages.append(_said(turn.answer + (self.end if self.appended else "")))
        text, spans = self._text(messages), []
        for prompt, turn in zip(prompts, turns, strict=True):
            start, stop = len(prompt), text.find(self.end, len(prompt)) + len(self.end)
            if not text.startswith(prompt) or stop <= start or turn.answer.strip() not in text[start:stop]:
                raise ClmoeError(f"{where}: the chat template does not write an answer and {self.end} after its prompt")
            spans.append((start, stop))
        return text, spans

    def _text(self, messages: list[dict[str, Any]], ask: bool = False) -> str:
        how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": ask}
        return str(self.tokenizer.apply_chat_template(messages, chat_template=self.template, **how))

    # ---- Tokens

    def _encode(self, text: str, image: Image.Image | None, where: str) -> dict[str, Tensor]:
        """What the processor or tokenizer makes of one text, with a first dimension of 1 and its ``offset_mapping``."""
        begun = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        how = {"add_special_tokens": not begun, "return_offsets_mapping": True, "return_tensors": "pt"}
        try:
            if image is None:
                return dict(self.tokenizer([text], **how))
            return dict(self.processor(images=[image], text=[text.removesuffix(self.family.tail)], **how))
        except (ValueError, TypeError, RuntimeError) as error:
            raise ClmoeError(f"{where}: the processor cannot read it: {error}") from error

    def _labelled(
        self, turns: Sequence[Turn], image: Image.Image | None, where: str
    ) -> tuple[dict[str, Tensor], list[int]]:
        """What ``_encode`` gives for a conversation, and a label for each token."""
        text, spans = self.render(turns, image is not None, where)
        found = self._encode(text, image, where)
        ids, offsets = found["input_ids"][0].tolist(), found["offset_mapping"][0].tolist()
        ends = [place for place, token in enumerate(ids) if token == self.end_id]
        if len(ends) != text.count(self.end):
            raise ClmoeError(f"{where}: {len(ends)} tokens {self.end}, but the text has {text.count(self.end)}")
        moved = offsets[ends[-1]][0] - text.rindex(self.end)
        spans = [(start + moved, stop + moved) for start, stop in spans]
        labels = answer_labels(ids, [(left, right) for left, right in offsets], spans, self.end_id, where)
        if self.family.typed_answers:
            first = next(place for place, label in enumerate(labels) if label != IGNORE)
            found[TOKEN_TYPES] = (torch.arange(len(ids)) >= first).long()[None]
        else:  # transformers 5.0 does not train Gemma 3 on texts alone without them
            found.setdefault(TOKEN_TYPES, torch.zeros_like(found["input_ids"]))
        return found, labels

    def _extra(self, found: dict[str, Tensor], max_length: int | None = None) -> dict[str, Tensor]:
        """The model's other inputs: ``[T]`` int64 by token, or as the processor made them for an image."""
        wanted = {name: found[name] for name in ("pixel_values", *self.family.inputs) if name in found}
        return {name: value[0, :max_length] if name.endswith(TOKEN_TYPES) else value for name, value in wanted.items()}

    def _check(self) -> None:
        """Raise ClmoeError or ValueError unless the tokens of a probe are what this class expects."""
        blank = Image.new("RGB", (SIDE, SIDE))
        found, labels = self._labelled([PROBE], blank, "a probe")
        prompt = self.prompt_item(PROBE.question, blank).input_ids.tolist()
        whole = found["input_ids"][0].tolist()
        if whole[: len(prompt)] != prompt or any(label != IGNORE for label in labels[: len(prompt)]):
            raise ValueError("the tokens of its prompt are not the beginning of the tokens of a whole conversation")
        if odd := found.keys() - OF_TEXT - {"pixel_values", *self.family.inputs}:
            raise ValueError(
                f"its processor makes {sorted(odd)}, which its row in clmoe/bases/families.py does not name"
            )


def _said(answer: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}
