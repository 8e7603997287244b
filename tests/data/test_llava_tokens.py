"""``vicuna_v1`` token for token as LLaVA-1.5 makes it, on a vocabulary trained with LLaMA's options.

The oracle is SentencePiece itself with LLaVA's rules written out: no tokenizer of transformers takes part in it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from transformers import LlamaTokenizer

from clmoe.bases.llava import load_base
from clmoe.data.prompts import IGNORE, encode_prompt, encode_training
from clmoe.data.records import TrainRecord, Turn
from tests.llama_vocabulary import train_vocabulary

IMAGE_TOKENS = 5
MARK, BEGIN, END = "<image>", 1, 2
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SUFFIX = "\nAnswer the question using a single word or phrase."
CONVERSATIONS = {
    "one": [("What animal is it?" + SUFFIX, "dog")],
    "three": [
        ("What is the shape?" + SUFFIX, "A circle"),
        ("And the\n\ncolour?  Two  spaces", "red"),
        ("12?", "it is 3"),
    ],
    "numbers": [("Please provide the box of: the red box.", "[0.12, 0.30, 0.50, 0.94]")],
    "bytes": [("狗 means what animal? 🐕", "naïve\n狗, a dog"), ("Is it “so”?", "it is\ttwo")],
    "digits first": [("1 + 1 =", "2")],
    "newline first": [("\nWhat?", ", it is")],
    "no words": [("?", ".")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def pieces(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> LlamaTokenizer:
    made = LlamaTokenizer.from_pretrained(folder, extra_special_tokens={"image_token": MARK})
    made.add_special_tokens({"pad_token": "<pad>"})
    return made


class Llava:
    """LLaVA's tokenisation and masking on a SentencePiece model."""

    def __init__(self, pieces: sentencepiece.SentencePieceProcessor, image_id: int) -> None:
        self.pieces, self.image_id = pieces, image_id

    def text(self, text: str) -> list[int]:
        """``<s>``, then the pieces: a space is put before the text, and none after a special token inside it."""
        ids = [BEGIN]
        for number, part in enumerate(text.split("</s>")):
            ids += [END] if number else []
            # text in the middle of a string: encode behind <unk>, which takes the added space, and cut that off
            ids += self.pieces.encode("⁇" + part)[self._cut() :] if number and part else []
            ids += self.pieces.encode(part) if not number else []
        return ids

    def _cut(self) -> int:
        return len(self.pieces.encode("⁇"))

    def with_image(self, text: str) -> list[int]:
        """The texts around the mark, each tokenised alone and without its ``<s>`` except the first; images between."""
        first, *others = (self.text(part) for part in text.split(MARK))
        return first + [token for other in others for token in [self.image_id, *other[1:]]]

    def conversation(self, turns: list[tuple[str, str]], has_image: bool) -> str:
        text = SYSTEM + " "
        for number, (question, answer) in enumerate(turns):
            mark = MARK + "\n" if has_image and not number else ""
            text += f"USER: {mark}{question} ASSISTANT: {answer}</s>"
        return text

    def masked(self, turns: list[tuple[str, str]], has_image: bool) -> tuple[list[int], list[int]]:
        """Ids and labels by ``preprocess_v1``: rounds are counted in tokens, one less from the second on, because a
        round that is tokenised alone opens with a space that it does not have in the conversation."""
        encode = self.with_image if has_image else self.text
        conversation = self.conversation(turns, has_image)
        ids = encode(conversation)
        labels = list(ids)
        done = 1
        labels[0] = IGNORE
        for number, part in enumerate(conversation.split("</s>")):
            if not part:
                break
            instruction, _, _ = part.partition(" ASSISTANT: ")
            length = len(encode(part))
            asked = len(encode(instruction + " ASSISTANT: ")) - 2
            if number:
                length, asked = length - 1, asked - 1
            labels[done : done + asked] = [IGNORE] * asked
            done += length
        labels[done:] = [IGNORE] * len(labels[done:])
        assert done == len(ids), "LLaVA would call this a tokenization mismatch and mask everything"
        return ids, labels

    def expand(self, values: list[int], ids: list[int], fill: int) -> list[int]:
        """One image token becomes many."""
        pairs = zip(values, ids, strict=True)
        return [v for value, token in pairs for v in ([fill] * IMAGE_TOKENS if token == self.image_id else [value])]


@pytest.fixture(scope="module")
def llava(pieces: sentencepiece.SentencePieceProcessor, tokenizer: LlamaTokenizer) -> Llava:
    return Llava(pieces, tokenizer.image_token_id)


def test_the_vocabulary_has_the_traits_that_the_rules_were_made_for(
    pieces: sentencepiece.SentencePieceProcessor,
) -> None:
    assert pieces.encode("USER:", out_type=str) == ["▁", "USER", ":"]
    assert pieces.encode("\n1 狗", out_type=str) == ["▁", "<0x0A>", "1", "▁", "<0xE7>", "<0x8B>", "<0x97>"]
    assert pieces.encode("10  ", out_type=str)[:3] == ["▁", "1", "0"]


@pytest.mark.parametrize("has_image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_training_tokens_and_labels_are_llavas(
    name: str, has_image: bool, llava: Llava, tokenizer: LlamaTokenizer
) -> None:
    turns = CONVERSATIONS[name]
    ids, labels = llava.masked(turns, has_image)
    record = TrainRecord("k", "a.png" if has_image else None, tuple(Turn(*turn) for turn in turns))
    ours = encode_training(record, tokenizer, IMAGE_TOKENS, 4096)
    assert ours.input_ids == llava.expand(ids, ids, llava.image_id)
    assert ours.labels == llava.expand(labels, ids, IGNORE)
    assert sum(label == END for label in ours.labels) == len(turns)


@pytest.mark.parametrize("has_image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_are_llavas(name: str, has_image: bool, llava: Llava, tokenizer: LlamaTokenizer) -> None:
    question = CONVERSATIONS[name][0][0]
    text = f"{SYSTEM} USER: {MARK + chr(10) if has_image else ''}{question} ASSISTANT:"
    ids = llava.with_image(text)
    assert encode_prompt(question, has_image, tokenizer, IMAGE_TOKENS) == llava.expand(ids, ids, llava.image_id)


def test_a_question_that_holds_the_separator_is_still_learned(llava: Llava, tokenizer: LlamaTokenizer) -> None:
    """LLaVA masks such a conversation as a whole; the documented difference."""
    turn = Turn("What does ASSISTANT: mean?", "it is two")
    ours = encode_training(TrainRecord("k", "a.png", (turn,)), tokenizer, IMAGE_TOKENS, 4096)
    assert [label for label in ours.labels if label != IGNORE] == [*llava.text("it is two")[1:], END]


def test_the_shipped_byte_level_tokenizer_gives_what_one_string_gives() -> None:
    """The playground's base was trained on whole strings; tokenising around the image must change nothing for it."""
    from clmoe.config import ModelConfig

    tokenizer = load_base(ModelConfig()).tokenizer
    for turns in CONVERSATIONS.values():
        record = TrainRecord("k", "a.png", tuple(Turn(*turn) for turn in turns))
        whole = Llava.conversation(None, turns, True)  # type: ignore[arg-type]
        ids = tokenizer(whole.replace(MARK, MARK * IMAGE_TOKENS))["input_ids"]
        assert encode_training(record, tokenizer, IMAGE_TOKENS, 4096).input_ids == ids
