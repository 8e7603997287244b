"""The template and the answer mask, against an oracle that tokenises the pieces one by one."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from clmoe.data.prompts import encode_prompt, encode_training, prompt_text, render
from clmoe.data.records import TrainRecord, Turn
from clmoe.errors import ClmoeError

from . import tokenizers_for_tests as make

IMAGE_TOKENS = 16
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)
ONE = (Turn("What animal is it?\nAnswer the question using a single word.", "Dog"),)
THREE = (
    *ONE,
    Turn("Where?  Two  spaces ", "[0.12, 0.30, 0.50, 0.94]"),
    Turn("ASSISTANT: or USER: in a question?", "It is a  dog,\n\nnaïve 狗 🐕 ASSISTANT: no"),
)


@pytest.fixture(scope="module", params=["byte_level", "byte_level_trimmed", "byte_level_no_bos", "llama"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return {
        "byte_level": lambda: make.byte_level(),
        "byte_level_trimmed": lambda: make.byte_level(trim=True),
        "byte_level_no_bos": lambda: make.byte_level(add_bos=False),
        "llama": make.llama,
    }[request.param]()


def oracle(turns: tuple[Turn, ...], has_image: bool, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Ids and labels from pieces tokenised one by one, cut at special tokens and before an answer's space."""

    # LLaMA's Metaspace marks the first piece of a text only; a special token in front makes it see a later one.
    def piece(text: str, first: bool) -> list[int]:
        if first:
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = tokenizer("</s>" + text, add_special_tokens=False)["input_ids"]
        assert ids[0] == tokenizer.eos_token_id
        return ids[1:]

    ids = tokenizer("")["input_ids"]  # <s> or nothing
    labels = [-100] * len(ids)
    for number, turn in enumerate(turns):
        question = f"USER: {turn.question} ASSISTANT:"
        if number:
            known = piece(question, first=False)
        elif has_image:
            image = [tokenizer.image_token_id] * IMAGE_TOKENS
            known = piece(f"{SYSTEM} USER: ", first=True) + image
            known += piece(f"\n{turn.question} ASSISTANT:", first=True)  # LLaVA: a text of its own
        else:
            known = piece(f"{SYSTEM} {question}", first=True)
        answer = [*piece(f" {turn.answer}", first=False), tokenizer.eos_token_id]
        ids, labels = ids + known + answer, labels + [-100] * len(known) + answer
    return ids, labels


def test_rendered_text_is_vicuna_v1() -> None:
    two = (Turn("q1", "a1"), Turn("q2", "a2"))
    assert render(two, True)[0] == f"{SYSTEM} USER: <image>\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>"
    assert render(two[:1], False)[0] == f"{SYSTEM} USER: q1 ASSISTANT: a1</s>"
    assert prompt_text("q1", True) == f"{SYSTEM} USER: <image>\nq1 ASSISTANT:"
    assert prompt_text("q1", False) == f"{SYSTEM} USER: q1 ASSISTANT:"


@pytest.mark.parametrize("turns", [ONE, THREE], ids=["one", "three"])
@pytest.mark.parametrize("image", ["a.png", None], ids=["image", "text"])
def test_ids_and_labels_equal_the_oracle(
    turns: tuple[Turn, ...], image: str | None, tokenizer: PreTrainedTokenizerFast
) -> None:
    encoded = encode_training(TrainRecord("k", image, turns), tokenizer, IMAGE_TOKENS, 4096)
    ids, labels = oracle(turns, image is not None, tokenizer)
    assert encoded.input_ids == ids
    assert encoded.labels == labels
    assert ids.count(tokenizer.image_token_id) == (IMAGE_TOKENS if image else 0)


@pytest.mark.parametrize("has_image", [True, False])
def test_prompt_is_what_training_saw_before_the_answer(has_image: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    record = TrainRecord("k", "a.png" if has_image else None, ONE)
    ids, labels = encode_training(record, tokenizer, IMAGE_TOKENS, 4096)
    prompt = encode_prompt(ONE[0].question, has_image, tokenizer, IMAGE_TOKENS)
    first_label = next(n for n, label in enumerate(labels) if label != -100)
    assert prompt == ids[:first_label]
    starts_with_bos = tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
    assert (prompt[0] == tokenizer.bos_token_id) == starts_with_bos


def test_a_long_record_is_cut_at_the_right(tokenizer: PreTrainedTokenizerFast) -> None:
    record = TrainRecord("k", "a.png", THREE)
    whole = encode_training(record, tokenizer, IMAGE_TOKENS, 4096)
    first_label = next(n for n, label in enumerate(whole.labels) if label != -100)
    cut = encode_training(record, tokenizer, IMAGE_TOKENS, first_label + 1)
    assert cut == (whole.input_ids[: first_label + 1], whole.labels[: first_label + 1])
    with pytest.raises(ClmoeError, match="record 'k'"):
        encode_training(record, tokenizer, IMAGE_TOKENS, first_label)


@pytest.mark.parametrize("field", ["question", "answer"])
@pytest.mark.parametrize("token", ["</s>", "<image>"])
def test_special_tokens_in_the_text_are_refused(token: str, field: str, tokenizer: PreTrainedTokenizerFast) -> None:
    turn = Turn(f"what {token} is it", "dog") if field == "question" else Turn("what", f"dog {token} cat")
    for image in ("a.png", None):
        with pytest.raises(ClmoeError, match=f"record 'k': .*{token}"):
            encode_training(TrainRecord("k", image, (turn,)), tokenizer, IMAGE_TOKENS, 4096)
    if field == "question":
        with pytest.raises(ClmoeError, match=f"question .*{token}"):
            encode_prompt(turn.question, True, tokenizer, IMAGE_TOKENS)


RECORD = TrainRecord("k", "a.png", (Turn("What is the dog?", "dog"),))


def test_a_token_across_the_answer_border_is_an_error() -> None:
    with pytest.raises(ClmoeError, match="record 'k'"):
        encode_training(RECORD, make.merging_across_answers(), IMAGE_TOKENS, 4096)


def test_an_end_token_added_by_the_tokenizer_is_an_error() -> None:
    tokenizer = make.byte_level(add_eos=True)
    with pytest.raises(ClmoeError, match=r"record 'k'.*</s>"):
        encode_training(RECORD, tokenizer, IMAGE_TOKENS, 4096)
    with pytest.raises(ClmoeError, match=r"question 'What.*</s>"):
        encode_prompt("What?", True, tokenizer, IMAGE_TOKENS)


def test_a_prompt_that_is_no_prefix_of_training_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a training template that drifts from the prompt (here: by one comma) must lead to."""
    good = prompt_text(RECORD.turns[0].question, True) + " dog</s>"
    drifted = good.replace("helpful, detailed", "helpful detailed")
    spans = [(len(drifted) - len(" dog</s>"), len(drifted))]
    monkeypatch.setattr("clmoe.data.prompts.render", lambda turns, has_image: (drifted, spans))
    with pytest.raises(ClmoeError, match="record 'k'"):
        encode_training(RECORD, make.byte_level(), IMAGE_TOKENS, 4096)


def test_tokenizers_that_lack_what_the_template_needs() -> None:
    base = make.byte_level()
    with pytest.raises(ClmoeError, match="<pad>"):
        encode_training(RECORD, make.wrap(base.backend_tokenizer, eos="<pad>"), IMAGE_TOKENS, 4096)
    plain = make.wrap(Tokenizer.from_str(_without_image(base)), extra={})
    with pytest.raises(ClmoeError, match="image_token"):
        encode_training(RECORD, plain, IMAGE_TOKENS, 4096)
    text_only = TrainRecord("k", None, RECORD.turns)
    assert encode_training(text_only, plain, IMAGE_TOKENS, 4096) == encode_training(text_only, base, IMAGE_TOKENS, 4096)


def _without_image(tokenizer: PreTrainedTokenizerFast) -> str:
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "<image>"]
    return json.dumps(data)
