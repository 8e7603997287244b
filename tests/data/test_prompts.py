"""The template and the answer mask, token for token, against two oracles.

For LLaMA's tokenizer, the oracle is SentencePiece itself with LLaVA's rules written out, on a vocabulary trained with
LLaMA's options; it uses no tokenizer of transformers. For the embedded base's byte-level tokenizer, it is the ids of
the whole string.
"""

import gzip
import json
from pathlib import Path

import pytest
import sentencepiece
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from clmoe.data.prompts import IGNORE, encode_prompt, encode_training, render
from clmoe.data.records import TrainRecord, Turn, iterate_train
from clmoe.errors import ClmoeError
from tests.data import tokenizers_for_tests as make
from tests.llama_vocabulary import llama_pieces, train_vocabulary

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
SEPARATOR = [("ASSISTANT: or USER: in a question? ", "It is a  dog,\n\nnaïve 狗 🐕 ASSISTANT: no"), ("What?", "dog")]
Tokenizers = dict[str, PreTrainedTokenizerFast]
Turns = list[tuple[str, str]]
Expected = tuple[list[int], list[int], list[int]]
"""Prompt, ids and labels."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def pieces(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def tokenizers(folder: Path) -> Tokenizers:
    """The tokenizers of LLaVA-1.5 and of the embedded base."""
    llama = LlamaTokenizer.from_pretrained(folder, extra_special_tokens={"image_token": MARK})
    llama.add_special_tokens({"pad_token": "<pad>"})
    return {"llama": llama, "shipped": make.shipped()}


def record(turns: Turns, has_image: bool = True) -> TrainRecord:
    return TrainRecord("k", "a.png" if has_image else None, tuple(Turn(*turn) for turn in turns))


def encode(turns: Turns, has_image: bool, tokenizer: PreTrainedTokenizerFast) -> Expected:
    prompt = encode_prompt(turns[0][0], has_image, tokenizer, IMAGE_TOKENS)
    return prompt, *encode_training(record(turns, has_image), tokenizer, IMAGE_TOKENS, 4096)


class Llava:
    """LLaVA's tokenisation and masking on a SentencePiece model."""

    def __init__(self, pieces: sentencepiece.SentencePieceProcessor, image_id: int) -> None:
        self.pieces, self.image_id = pieces, image_id

    def text(self, text: str) -> list[int]:
        """``<s>``, then the pieces; a space is put before the text, but none after a special token inside it."""
        first, *others = text.split("</s>")
        ids = [BEGIN, *self.pieces.encode(first)]
        for part in others:
            # text in the middle of a string: encode it after <unk>, which takes the added space, and cut that off
            ids += [END, *self.pieces.encode("⁇" + part)[len(self.pieces.encode("⁇")) :]]
        return ids

    def with_image(self, text: str) -> list[int]:
        """Tokenise the texts around the marks alone, all but the first without ``<s>``, and put images between them."""
        first, *others = (self.text(part) for part in text.split(MARK))
        return first + [token for other in others for token in [self.image_id, *other[1:]]]

    def expected(self, turns: Turns, has_image: bool) -> Expected:
        """Labels as ``preprocess_v1`` makes them: it counts the tokens of each round, one fewer from the second on,
        because a round that is tokenised alone starts with a space that it does not have in the conversation."""
        prompt = f"{SYSTEM} USER: {MARK + chr(10) if has_image else ''}{turns[0][0]} ASSISTANT:"
        conversation = f"{prompt} {turns[0][1]}</s>"
        conversation += "".join(f"USER: {question} ASSISTANT: {answer}</s>" for question, answer in turns[1:])
        ids = self.with_image(conversation)
        labels = list(ids)
        done = 1
        labels[0] = IGNORE
        for number, part in enumerate(conversation.split("</s>")[:-1]):
            instruction, _, _ = part.partition(" ASSISTANT: ")
            length = len(self.with_image(part)) - (number > 0)
            asked = len(self.with_image(instruction + " ASSISTANT: ")) - 2 - (number > 0)
            labels[done : done + asked] = [IGNORE] * asked
            done += length
        assert done == len(ids), "LLaVA would call this a tokenization mismatch and mask everything"
        prompt_ids = self.with_image(prompt)
        return (
            self.expand(prompt_ids, prompt_ids, self.image_id),
            self.expand(ids, ids, self.image_id),
            self.expand(labels, ids, IGNORE),
        )

    def expand(self, values: list[int], ids: list[int], fill: int) -> list[int]:
        """Replace the value at each image token with ``fill``, as many times as an image has tokens."""
        pairs = zip(values, ids, strict=True)
        return [v for value, token in pairs for v in ([fill] * IMAGE_TOKENS if token == self.image_id else [value])]


@pytest.fixture(scope="module")
def llava(pieces: sentencepiece.SentencePieceProcessor, tokenizers: Tokenizers) -> Llava:
    return Llava(pieces, tokenizers["llama"].image_token_id)


@pytest.mark.parametrize("has_image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompts_ids_and_labels_are_llavas(name: str, has_image: bool, llava: Llava, tokenizers: Tokenizers) -> None:
    found = encode(CONVERSATIONS[name], has_image, tokenizers["llama"])
    assert found == llava.expected(CONVERSATIONS[name], has_image)


@pytest.mark.parametrize("has_image", [True, False], ids=["image", "text"])
def test_ids_are_those_of_the_whole_string_and_labels_those_of_the_answers(
    has_image: bool, tokenizers: Tokenizers
) -> None:
    """Oracle: the embedded base's own ids of the whole string; its tokens are bytes, so decoding loses nothing."""
    tokenizer = tokenizers["shipped"]
    for turns in (*CONVERSATIONS.values(), SEPARATOR):
        prompt, ids, labels = encode(turns, has_image, tokenizer)
        begin = f"{SYSTEM} USER: {MARK * IMAGE_TOKENS + chr(10) if has_image else ''}"
        said = [f"{question} ASSISTANT: {answer}</s>" for question, answer in turns]
        assert ids == tokenizer(begin + "USER: ".join(said))["input_ids"]
        assert prompt == tokenizer(f"{begin}{turns[0][0]} ASSISTANT:")["input_ids"] == ids[: len(prompt)]
        kept = [label for label in labels if label != IGNORE]
        assert tokenizer.decode(kept) == "".join(f" {answer}</s>" for _, answer in turns)
        assert all(label in (token, IGNORE) for token, label in zip(ids, labels, strict=True))


def test_a_question_that_holds_the_separator_is_still_learned(llava: Llava, tokenizers: Tokenizers) -> None:
    """LLaVA masks the whole conversation; this difference is documented in docs/faults.md."""
    _, _, labels = encode([("What does ASSISTANT: mean?", "it is two")], True, tokenizers["llama"])
    assert [label for label in labels if label != IGNORE] == [*llava.text("it is two")[1:], END]


@pytest.mark.parametrize("name", ["llama", "shipped"])
def test_a_long_record_is_cut_at_the_right(name: str, tokenizers: Tokenizers) -> None:
    long, tokenizer = record(CONVERSATIONS["three"]), tokenizers[name]
    ids, labels = encode_training(long, tokenizer, IMAGE_TOKENS, 4096)
    kept = next(n for n, label in enumerate(labels) if label != IGNORE) + 1
    assert encode_training(long, tokenizer, IMAGE_TOKENS, kept) == (ids[:kept], labels[:kept])
    with pytest.raises(ClmoeError, match="record 'k'"):
        encode_training(long, tokenizer, IMAGE_TOKENS, kept - 1)


@pytest.mark.parametrize("turn", [("what {} is it", "dog"), ("what", "dog {} cat")], ids=["question", "answer"])
@pytest.mark.parametrize("token", ["</s>", "<image>"])
@pytest.mark.parametrize("name", ["llama", "shipped"])
def test_special_tokens_in_the_text_are_refused(
    name: str, token: str, turn: tuple[str, str], tokenizers: Tokenizers
) -> None:
    question, answer = (text.format(token) for text in turn)
    for has_image in (True, False):
        with pytest.raises(ClmoeError, match=f"record 'k': .*{token}"):
            encode_training(record([(question, answer)], has_image), tokenizers[name], IMAGE_TOKENS, 4096)
    if token in question:
        with pytest.raises(ClmoeError, match=f"question .*{token}"):
            encode_prompt(question, True, tokenizers[name], IMAGE_TOKENS)


# ---- Conversations that the released training code was run on, with LLaMA's own vocabulary

RELEASED = json.loads(gzip.decompress(Path(__file__).with_name("released_tokens.json.gz").read_bytes()))
USER = [2, 3148, 1001, 29901], [2, 11889, 29901]  # after </s>, the released code has "▁US", "ER"
OTHER_IDS = {  # differences that docs/faults.md names: released ids, and ours; all other ids must be equal
    "turns: newline first": ([29871, 13, 5618, 1286], [1724, 1286]),
    "answer leading newline": ([29871, 13, 26169], [11203]),
    "answer spaces around": ([29871, 11203, 29871, 2], [11203, 2]),
    "answer trailing newline": ([11203, 13, 2], [11203, 2]),
    "question trailing blank text only": ([29973, 29871, 319], [29973, 319]),
    "question trailing newline turn 2": ([29973, 13, 319], [29973, 319]),
    "nbsp around answer": ([20246, 26169, 30081], [11203]),
    "answer holds <s>": ([1, 29871, 11203], [1, 11203]),
    "answer holds <unk>": ([0, 29871, 11203], [0, 11203]),
}
LEARNED = {  # what we learn of conversations that the released code masks as a whole
    "answer holds ASSISTANT:": [372, 4083, 319, 1799, 9047, 13566, 29901, 22172, 2],
    "question holds ASSISTANT:": [263, 6297, 2],
    "answer holds <unk>": [29871, 0, 11203, 2],
}
REFUSED = {
    "empty answer turn 2": "value", "blank answer": "value", "two images": "value", "image in second turn": "value",
    "image mark, no image field": "value", "gpt first": "from", "trailing human": "",
}  # fmt: skip


def swapped(pairs: list[tuple[int, int]], there: list[int], ours: list[int]) -> list[tuple[int, int]]:
    """Ids and labels with each run ``there`` replaced by ``ours``, which is masked if the run's last token was."""
    result, n, same = [], 0, there[0] == ours[0]
    while n < len(pairs):
        run = pairs[n : n + len(there)]
        if [token for token, _ in run] == there:
            result += run[:same] + [(token, IGNORE if run[-1][1] == IGNORE else token) for token in ours[same:]]
            n += len(there)
        else:
            result.append(pairs[n])
            n += 1
    return result


@pytest.mark.parametrize("name", RELEASED)
def test_released_conversations(name: str, tmp_path: Path) -> None:
    tokenizer = LlamaTokenizer(*llama_pieces(), add_bos_token=True, extra_special_tokens={"image_token": MARK})
    released, file = RELEASED[name], tmp_path / "train.json"
    (tmp_path / "a.jpg").touch()
    row = {"id": "k", "image": released["image"], "conversations": released["conversations"]}
    file.write_text(json.dumps([{key: value for key, value in row.items() if value}]))
    if name in REFUSED:
        with pytest.raises(ClmoeError, match=rf"train.json: row 0 .*'conversations.*{REFUSED[name]}'"):
            list(iterate_train(file, tmp_path))
        return
    (read,) = iterate_train(file, tmp_path)
    found = encode_training(read, tokenizer, 1, 2048)
    expected = list(zip(released["ids"], released["labels"], strict=True))
    for there, ours in (USER, OTHER_IDS.get(name, USER), ([-200], [tokenizer.image_token_id])):
        expected = swapped(expected, there, ours)
    assert found.input_ids == [token for token, _ in expected]
    labels = [label for _, label in expected]
    if name in LEARNED:
        assert set(labels) == {IGNORE} and [label for label in found.labels if label != IGNORE] == LEARNED[name]
    else:
        assert found.labels == labels
        asked = next(n for n, label in enumerate(labels) if label != IGNORE)  # the length of a test prompt
        prompt = encode_prompt(read.turns[0].question, read.image is not None, tokenizer, 1)
        assert prompt == found.input_ids[:asked] and prompt[-5:] == [319, 1799, 9047, 13566, 29901]


# ---- Tokenizers that do not fit

RECORD = record([("What is the dog?", "dog")])


def test_tokens_across_the_answer_border_and_an_added_end_token_are_errors() -> None:
    across, appended = make.merging_across_answers(), make.appending_the_end()
    with pytest.raises(ClmoeError, match=r"record 'k'.*across"):
        encode_training(RECORD, across, IMAGE_TOKENS, 4096)
    with pytest.raises(ClmoeError, match=r"record 'k'.*</s>"):
        encode_training(RECORD, appended, IMAGE_TOKENS, 4096)
    with pytest.raises(ClmoeError, match=r"question 'What.*</s>"):
        encode_prompt("What?", True, appended, IMAGE_TOKENS)


def test_a_prompt_that_is_no_prefix_of_training_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training template that drifts from the prompt's (here by one comma) must raise an error."""
    text, spans = render(RECORD.turns, True)
    drifted = text.replace("helpful, detailed", "helpful detailed"), [(a - 1, b - 1) for a, b in spans]
    monkeypatch.setattr("clmoe.data.prompts.render", lambda turns, has_image: drifted)
    with pytest.raises(ClmoeError, match="record 'k'"):
        encode_training(RECORD, make.shipped(), IMAGE_TOKENS, 4096)


def test_tokenizers_that_lack_what_the_template_needs() -> None:
    base = make.shipped()
    with pytest.raises(ClmoeError, match="<pad>"):
        encode_training(RECORD, make.wrap(base.backend_tokenizer, eos_token="<pad>"), IMAGE_TOKENS, 4096)
    plain = make.wrap(base.backend_tokenizer)
    with pytest.raises(ClmoeError, match="image_token"):
        encode_training(RECORD, plain, IMAGE_TOKENS, 4096)
    text_only = TrainRecord("k", None, RECORD.turns)
    assert encode_training(text_only, plain, IMAGE_TOKENS, 4096) == encode_training(text_only, base, IMAGE_TOKENS, 4096)
