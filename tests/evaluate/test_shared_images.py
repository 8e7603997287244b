"""Questions of one image on one prefix: the answers, margins and features of questions asked one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clmoe.evaluate.evaluation import Checkpoint
from torch import Tensor
from transformers import GenerationConfig

from clmoe.bases.inputs import SharedPrompts, prompt_dataset, prompt_inputs, read_prompts
from clmoe.bases.llava import LoadedBase
from clmoe.config import EvaluationConfig
from clmoe.data.batches import PromptItem, collate_prompts
from clmoe.data.records import Question, load_questions
from clmoe.evaluate.generate import Answer, Answerer, open_answerer
from clmoe.evaluate.generate import greedy as greedy_module
from clmoe.experts.forward import last_prompt_features
from clmoe.experts.model import adapted_base
from clmoe.experts.routing import routing
from clmoe.locators.base import FeatureStore
from clmoe.train.checkpoint import read_checkpoint
from tests.runs import Runs
from tests.support import TASKS, prompt_batches

METHODS = ("lora", "clmoe", "llava_cmoe")
SETTINGS = {"llava_cmoe": ("adapter.train_projector=false", "options.probe_min_steps=2", "options.locator.steps=20")}
FIVE = ("What is it?", "Which colour is it?", "How many things are there on it?", "Are you sure?", "left or right?")


@pytest.fixture
def questions(mini_yaml: Path) -> tuple[list[Question], Path]:
    """Four images with five questions each, scattered; one with a single question; three questions without image."""
    folder = mini_yaml.parent / "colour"
    rows = load_questions(folder / "test.json", folder / "images")
    asked = [dataclasses.replace(rows[k], text=text, question_id=f"{k}-{text}") for text in FIVE for k in range(4)]
    asked += [rows[5], *(Question(f"text-{text}", None, text, "", {}) for text in FIVE[:3])]
    return asked, folder / "images"


@pytest.fixture(params=METHODS)
def answerer(request: pytest.FixtureRequest, runs: Runs, tiny_base: LoadedBase) -> Answerer:
    """After two tasks."""
    method = request.param
    done = read_checkpoint(runs.chain(method, *SETTINGS.get(method, ()))[1])
    checkpoint = Checkpoint(done.folder, done.identity, TASKS[1], done.lineage.tasks, done.config, done.lineage.base)
    return open_answerer(checkpoint, tiny_base)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is given to be generated from."""
    seen: list[Any] = []
    real = greedy_module.prefill

    def watched(llava: Any, prompts: Any, selection: Any, room: int) -> Any:
        seen.append(prompts)
        return real(llava, prompts, selection, room)

    monkeypatch.setattr(greedy_module, "prefill", watched)
    return seen


def ask(answerer: Answerer, asked: tuple[list[Question], Path], **settings: Any) -> list[Answer]:
    answerer.config = dataclasses.replace(EvaluationConfig(), **settings)
    return answerer.answer(asked[0], asked[1], 4, "random" if answerer.method.finds_task else "located")


def test_answers_are_those_given_one_by_one(
    answerer: Answerer, questions: tuple[list[Question], Path], batches: list[Any]
) -> None:
    alone = ask(answerer, questions, batch_size=1)
    assert not any(isinstance(batch, SharedPrompts) for batch in batches)
    for size in (7, 64):
        batches.clear()
        together = ask(answerer, questions, batch_size=size)
        assert any(isinstance(batch, SharedPrompts) for batch in batches)
        assert [a.text for a in together] == [a.text for a in alone]
        assert [a.task for a in together] == [a.task for a in alone]
        for a, b in zip(together, alone, strict=True):
            assert a.margin == pytest.approx(b.margin, abs=1e-4)
    assert len({a.text for a in alone}) > 2
    if answerer.method.finds_task:
        assert {a.task for a in alone} == {0, 1}


def test_a_prefix_is_shared_within_image_and_router(
    answerer: Answerer, questions: tuple[list[Question], Path], batches: list[Any]
) -> None:
    answers = ask(answerer, questions, exact=False)
    (batch,) = batches
    pairs = {(q.image, a.task) for q, a in zip(questions[0], answers, strict=True)}
    assert len(batch.first) == len(pairs)
    images = len(batch.prefixes["pixel_values"])
    assert images == len({pair for pair in pairs if pair[0] is not None})
    assert 5 <= images < 21


def test_without_sharing_nothing_is(
    answerer: Answerer, questions: tuple[list[Question], Path], batches: list[Any]
) -> None:
    shared = ask(answerer, questions)
    batches.clear()
    plain = ask(answerer, questions, share_images=False)
    assert not any(isinstance(batch, SharedPrompts) for batch in batches)
    assert [a.text for a in plain] == [a.text for a in shared]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_is_transformers_own(
    answerer: Answerer, questions: tuple[list[Question], Path], attention: str
) -> None:
    """Oracle: ``generate`` of one prompt at a time."""
    llava = adapted_base(answerer.model)  # type: ignore[arg-type]
    llava.set_attn_implementation(attention)
    base, tokenizer = answerer.base, answerer.base.tokenizer
    items = read_prompts(prompt_dataset(base, questions[0][:10], questions[1]), range(10))
    routes = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 0, 0]).tolist() if answerer.method.finds_task else [None] * 10
    texts, _ = answerer.generate(items, answerer.selection(routes), 4)
    plan = GenerationConfig(
        max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    for row, item in enumerate(items):
        with torch.no_grad(), routing(answerer.selection([routes[row]])):
            said = llava.generate(**collate_prompts([item], tokenizer.pad_token_id), generation_config=plan)
        whole = tokenizer.decode(said[0, len(item.input_ids) :], skip_special_tokens=True)
        assert texts[row] == whole


def test_watching_shows_every_text_so_far(answerer: Answerer, questions: tuple[list[Question], Path]) -> None:
    items = read_prompts(prompt_dataset(answerer.base, questions[0][:8], questions[1]), range(8))
    seen: list[list[str]] = []
    routes = [0] * 8 if answerer.method.finds_task else [None] * 8
    texts, _ = answerer.generate(items, answerer.selection(routes), 4, seen.append)
    assert len(seen) == 3
    for row, text in enumerate(texts):
        assert all(text.startswith(so_far[row]) for so_far in seen)


@pytest.mark.parametrize("kind", ["last", "pooled"])
def test_features_are_those_of_whole_prompts(
    kind: Any, runs: Runs, new_base: Callable[[], LoadedBase], questions: tuple[list[Question], Path]
) -> None:
    base, bare = new_base(), new_base()
    done = read_checkpoint(runs.chain("clmoe")[1])
    checkpoint = Checkpoint(done.folder, done.identity, TASKS[1], done.lineage.tasks, done.config, done.lineage.base)
    model: Any = open_answerer(checkpoint, base).model
    found = FeatureStore(base, kind, 7, None, True).features(model, *questions)
    whole = prompt_batches(bare, prompt_dataset(bare, *questions), 1)
    expected: Tensor = torch.cat([last_prompt_features(bare.model, batch, kind) for batch in whole])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_features_share_images_and_their_files_say_so(
    runs: Runs, tiny_base: LoadedBase, questions: tuple[list[Question], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from clmoe.methods import features

    groups: list[int] = []

    def counted(model: Any, batch: Any, kind: Any) -> Tensor:
        groups.append(len(batch.first) if isinstance(batch, SharedPrompts) else 0)
        return torch.zeros(len(batch.group) if isinstance(batch, SharedPrompts) else len(batch["input_ids"]), 2)

    monkeypatch.setattr(features, "base_features", counted)
    shared, plain = (FeatureStore(tiny_base, "last", 64, None, share) for share in (True, False))
    for store in (shared, plain):
        assert len(store.features(None, *questions)) == 24  # type: ignore[arg-type]
    assert groups == [6, 0], "five images and what has none"
    assert shared._key(*questions) != plain._key(*questions)


def test_an_image_of_a_redone_row_is_read_alone(
    answerer: Answerer, questions: tuple[list[Question], Path], batches: list[Any]
) -> None:
    """A close call is decided by the very computation of a lone question."""
    answers = ask(answerer, questions, margin=1e9)
    assert all(a.redone for a in answers)
    first, *lone = batches
    assert isinstance(first, SharedPrompts)
    assert [len(batch["input_ids"]) for batch in lone] == [1] * 24


def test_prompts_of_equal_pixels_in_other_tensors_are_not_taken_for_one_image(tiny_base: LoadedBase) -> None:
    """Identity is the tensor's: what it holds is never compared."""
    side = 28
    picture = torch.zeros(3, side, side)
    image = tiny_base.tokenizer.image_token_id
    ids = [torch.tensor([1, image, image, image, image, 5, k]) for k in range(4)]
    same = prompt_inputs(tiny_base, [PromptItem(row, picture) for row in ids], [()] * 4)
    other = prompt_inputs(tiny_base, [PromptItem(row, picture.clone()) for row in ids], [()] * 4)
    assert isinstance(same, SharedPrompts)
    assert isinstance(other, dict)
