"""Answers: in batches the same as one by one, and from Python, with reasons that the tests compute separately."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationConfig

import clmoe
from clmoe.bases.inputs import SharedPrompts, prompt_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.config import EvaluationConfig
from clmoe.data.batches import collate_prompts
from clmoe.data.records import Question, load_questions
from clmoe.errors import ClmoeError
from clmoe.evaluate import answer
from clmoe.evaluate.answer import Answer, Answerer
from clmoe.evaluate.loaded import Explanation, LoadedCheckpoint
from clmoe.experts.forward import adapted_base, base_features
from clmoe.experts.layer import expert_layers
from clmoe.experts.routing import RouteSelection, routing
from clmoe.locators import make_locator
from clmoe.locators.base import Asked
from clmoe.methods import method_class
from clmoe.utils.files import read_json
from tests.evaluate.opened import checkpoints, opened
from tests.runs import Runs
from tests.support import TASKS, prompt_batches, tiny_config

QUESTION = "How many things are there?"


def loaded_of(runs: Runs, base: LoadedBase, method: str) -> LoadedCheckpoint:
    """A loaded checkpoint of two tasks."""
    return LoadedCheckpoint(opened(runs, base, method), list(TASKS[:2]))


@pytest.fixture
def image(mini_yaml: Path) -> Path:
    return mini_yaml.parent / "count" / "images" / "4.png"


def inputs(loaded: LoadedCheckpoint, image: Path) -> dict[str, torch.Tensor]:
    base = loaded.answerer.base
    dataset = prompt_dataset(base, [Question("x", image.name, QUESTION, "", {})], image.parent)
    return prompt_batches(base, dataset, 1)[0]


@pytest.mark.parametrize("method", ["lora", "moelora", "clmoe", "llava_cmoe"])
def test_the_watched_text_ends_as_the_batch_answer(method: str, runs: Runs, tiny_base: LoadedBase, image: Path) -> None:
    loaded = loaded_of(runs, tiny_base, method)
    seen: list[Explanation] = []
    final = loaded.explain(image, QUESTION, 6, watch=seen.append)
    assert final.text == loaded.answer(image, QUESTION, 6)
    assert len(seen) == 6, "the reasons come before the first of six tokens, the text so far before each other one"
    assert seen[0].text == ""
    texts = [partial.text for partial in seen] + [final.text]
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(texts))
    assert len(set(texts)) > 3
    assert all((e.task, e.scores, e.routers) == (final.task, final.scores, final.routers) for e in seen)
    if method == "lora":
        assert (final.task, final.scores, final.routers) == (None, {}, [])


@pytest.mark.parametrize("method", ["moelora", "clmoe", "llava_cmoe"])
def test_the_weights_are_those_the_experts_are_mixed_with(
    method: str, runs: Runs, tiny_base: LoadedBase, image: Path
) -> None:
    """Oracle: what the router banks hand to the experts in a forward pass of our own."""
    loaded = loaded_of(runs, tiny_base, method)
    explained = loaded.explain(image, QUESTION, 1, locator="last")
    model = loaded.answerer.model
    given: dict[str, torch.Tensor] = {}
    for name, layer in expert_layers(model).items():
        layer.routers.register_forward_hook(lambda module, args, out, name=name: given.__setitem__(name, out))
    chosen = {
        "moelora": RouteSelection(),
        "clmoe": RouteSelection(task=torch.tensor([1]), beta=0.5),
        "llava_cmoe": RouteSelection(router=torch.tensor([1])),
    }
    with torch.no_grad(), routing(chosen[method]):
        adapted_base(model)(**inputs(loaded, image))
    assert len(given) == len(explained.routers) == (2 if method == "llava_cmoe" else 6)
    for router, (name, weights) in zip(explained.routers, given.items(), strict=True):
        assert f"layers.{router.block}.mlp" in name
        assert name.endswith(router.linear or "mlp")
        assert router.weights == pytest.approx(weights[0].mean(0).tolist(), abs=1e-6)
        assert sum(router.weights) == pytest.approx(1, abs=1e-5)
    owners = [router.owners for router in explained.routers]
    if method == "llava_cmoe":
        plan = read_json(checkpoints(runs, method)[1] / "expansion.json")
        assert owners == [[0] * 4 + [1] * block["added"] for block in plan[-1]["blocks"].values()]
        older = loaded.explain(image, QUESTION, 1, locator="oracle", task=TASKS[0])
        assert all(len(router.weights) == 4 for router in older.routers), "the older router reaches the older experts"
    else:
        assert owners == [[0] * 4] * 6


@pytest.mark.parametrize("method", ["clmoe", "llava_cmoe"])
def test_scores_are_the_sealed_locators(method: str, runs: Runs, tiny_base: LoadedBase, image: Path) -> None:
    loaded = loaded_of(runs, tiny_base, method)
    explained = loaded.explain(image, QUESTION, 1)
    feature = base_features(loaded.answerer.model, inputs(loaded, image), "last")
    locator = make_locator(loaded.answerer.method.config.locator, 0)
    locator.load(checkpoints(runs, method)[1] / "locator.safetensors")
    scores = locator.scores(Asked(["x"], 2, feature))[0].tolist()
    assert explained.scores == pytest.approx(dict(zip(TASKS, scores, strict=False)), rel=1e-5)
    assert explained.task == TASKS[int(np.argmax(scores))]


def test_locators_choose_the_task(runs: Runs, tiny_base: LoadedBase, image: Path) -> None:
    loaded = loaded_of(runs, tiny_base, "clmoe")
    by_task = {task: loaded.explain(image, QUESTION, 1, locator="oracle", task=task) for task in TASKS[:2]}
    assert [explained.task for explained in by_task.values()] == list(TASKS[:2])
    assert by_task[TASKS[0]].scores == by_task[TASKS[1]].scores
    assert by_task[TASKS[0]].routers != by_task[TASKS[1]].routers
    assert loaded.explain(image, QUESTION, 1, locator="last").task == TASKS[1]
    drawn = {loaded.explain(image, f"Is it {n}?", 1, locator="random").task for n in range(8)}
    assert drawn == set(TASKS[:2]), "the draw depends on the question"
    for name in ("last", "random"):
        assert loaded.explain(image, QUESTION, 3, locator=name).text == loaded.answer(image, QUESTION, 3, name)
    for name, task, named in (
        ("oracle", "color", "'colour'"), ("oracle", None, "oracle"),
        ("", "colour", "oracle"), ("vae", None, "clmoe eval"),
    ):  # fmt: skip
        with pytest.raises(ClmoeError, match=named):
            loaded.explain(image, QUESTION, locator=name, task=task)


def test_an_image_may_be_a_path_or_a_pil_image_or_missing(
    runs: Runs, tiny_base: LoadedBase, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pixels give the same answer, however they come."""
    loaded = loaded_of(runs, tiny_base, "clmoe")
    seen: list[torch.Tensor | None] = []
    real = loaded.answerer.generate
    monkeypatch.setattr(
        loaded.answerer, "generate", lambda items, *rest: seen.append(items[0].pixel_values) or real(items, *rest)
    )
    picture = Image.open(image)
    for kind in (image, str(image), picture, picture.convert("RGBA")):
        loaded.answer(kind, QUESTION, 1)
    assert all(torch.equal(pixels, seen[0]) for pixels in seen)
    assert loaded.answer(picture.convert("CMYK"), QUESTION, 6), "a PIL image of any mode that a file may have"
    seen.clear()
    assert loaded.answer(None, QUESTION, 6)
    assert seen == [None]
    for wrong in (3, b"png", np.zeros((3, 3, 3))):
        with pytest.raises(ClmoeError, match=r"image: .*Path.*None.*answer\("):
            loaded.answer(wrong, QUESTION)


def test_a_wrong_call_says_the_right_one(runs: Runs, tiny_base: LoadedBase, image: Path) -> None:
    loaded, picture = loaded_of(runs, tiny_base, "clmoe"), Image.open(image)
    for call, named in (
        (lambda: loaded.answer(picture), r"'question'.*answer\("),
        (lambda: loaded.answer(QUESTION, picture), r"question: .*answer\("),
        (lambda: loaded.explain(picture), r"'question'.*explain\("),
        (lambda: loaded.answer(picture, QUESTION, max_new_tokens="3"), r"max_new_tokens: .*answer\("),
        (lambda: loaded.answer(picture, QUESTION, max_new_tokens=0), "max_new_tokens: 0"),
        (lambda: loaded.answer(picture, QUESTION, tokens=3), r"'tokens'.*answer\("),
        (lambda: loaded.answer(picture, " "), "question"),
        (lambda: clmoe.load(None), r"folder: .*clmoe\.load\("),
        (lambda: clmoe.run("lora"), r"'benchmark'.*clmoe\.run\("),
        (lambda: clmoe.run("lora", "mini", order=["a", "b"]), r"order: .*clmoe\.run\("),
        (lambda: clmoe.run("lora", "mini", settings=3), r"settings: .*clmoe\.run\("),
        (lambda: clmoe.run("lora", "mini", seed="0"), r"seed: .*clmoe\.run\("),
    ):
        with pytest.raises(ClmoeError, match=named):
            call()


# ---- Batches

FIVE = ("What is it?", "Which colour is it?", "How many things are there on it?", "Are you sure?", "left or right?")
Questions = tuple[list[Question], Path]


@pytest.fixture
def mixed(mini_yaml: Path) -> Questions:
    """Questions of two tasks, so that prompts have different lengths; some have no image."""
    root = mini_yaml.parent
    mixed = []
    for task in TASKS[:2]:
        for question in load_questions(root / task / "test.json", root / task / "images"):
            image = None if question.image is None else f"{task}/images/{question.image}"
            mixed.append(dataclasses.replace(question, image=image))
    return mixed[::2] + mixed[1::2], root


@pytest.fixture
def shared(mini_yaml: Path) -> Questions:
    """Four images with five questions each, scattered; one with a single question; three questions without an image."""
    folder = mini_yaml.parent / "colour"
    rows = load_questions(folder / "test.json", folder / "images")
    asked = [dataclasses.replace(rows[k], text=text, question_id=f"{k}-{text}") for text in FIVE for k in range(4)]
    asked += [rows[5], *(Question(f"text-{text}", None, text, "", {}) for text in FIVE[:3])]
    return asked, folder / "images"


@pytest.fixture(params=["lora", "clmoe", "llava_cmoe"])
def answerer(request: pytest.FixtureRequest, runs: Runs, tiny_base: LoadedBase) -> Answerer:
    return opened(runs, tiny_base, request.param)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The prompts that are read before each generation."""
    seen: list[Any] = []
    real = answer.prefill
    monkeypatch.setattr(
        answer, "prefill", lambda model, prompts, *rest: seen.append(prompts) or real(model, prompts, *rest)
    )
    return seen


def ask(answerer: Answerer, asked: Questions, locator: str = "", **settings: Any) -> list[Answer]:
    answerer.config = dataclasses.replace(EvaluationConfig(), **settings)
    return answerer.answer(*asked, 4, locator)


def test_answers_are_those_given_one_by_one(answerer: Answerer, shared: Questions, batches: list[Any]) -> None:
    alone = ask(answerer, shared, "random", batch_size=1)
    assert not any(isinstance(batch, SharedPrompts) for batch in batches)
    for size, share in ((7, True), (64, True), (7, False)):
        batches.clear()
        together = ask(answerer, shared, "random", batch_size=size, share_images=share)
        assert any(isinstance(batch, SharedPrompts) for batch in batches) == share
        assert [(a.text, a.task) for a in together] == [(a.text, a.task) for a in alone]
        for a, b in zip(together, alone, strict=True):
            assert a.margin == pytest.approx(b.margin, abs=1e-4)
    assert len({a.text for a in alone}) > 2, "all answers are equal: the order of answers would not be tested"
    if answerer.method.keeps_parts:
        assert {a.task for a in alone} == {0, 1}


def test_every_question_is_located_and_gets_its_answer_in_order(
    runs: Runs, tiny_base: LoadedBase, mixed: Questions
) -> None:
    """Answers fit their questions even if a question comes twice; known answers are not computed again."""
    locating = opened(runs, tiny_base, "clmoe")
    finished: list[list[tuple[str, Answer]]] = []
    locating.config = EvaluationConfig(batch_size=5)
    twice = [*mixed[0], *mixed[0][:3]]
    answers = locating.answer(twice, mixed[1], 4, finish=finished.append)
    assert [a.task for a in answers] == [TASKS.index(q.question_id.split("-")[0]) for q in twice]
    assert [len(batch) for batch in finished] == [5, 5, 5, 5, 5, 2]
    assert [a.text for a in answers[:3]] == [a.text for a in answers[-3:]]
    by_id = {name: answer for batch in finished for name, answer in batch}
    assert answers == [by_id[question.question_id] for question in twice]
    lacking = {name: answer for batch in finished[1:] for name, answer in batch}
    again: list[list[tuple[str, Answer]]] = []
    assert locating.answer(mixed[0], mixed[1], 4, known=by_id, finish=again.append) == answers[:-3]
    assert again == []
    assert locating.answer(twice, mixed[1], 4, known=lacking, finish=again.append) == answers
    assert again == finished[:1]


def test_close_calls_are_answered_again_alone(answerer: Answerer, shared: Questions, batches: list[Any]) -> None:
    """Images of close calls are computed again too, because the computation for a lone question decides."""
    margins = [a.margin for a in ask(answerer, shared, "random", exact=False)]
    threshold = sorted(margins)[len(margins) // 2]
    batches.clear()
    redone = [a.redone for a in ask(answerer, shared, "random", exact=True, margin=threshold)]
    assert redone == [margin < threshold for margin in margins]
    first, *lone = batches
    assert isinstance(first, SharedPrompts)
    assert [len(batch["input_ids"]) for batch in lone] == [1] * sum(redone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_is_transformers_own(answerer: Answerer, shared: Questions, attention: str) -> None:
    """Oracle: texts and logits of ``generate``, one prompt at a time. The watched texts are the answers' beginnings."""
    llava = adapted_base(answerer.model)
    llava.set_attn_implementation(attention)
    base, tokenizer = answerer.base, answerer.base.tokenizer
    items = prompt_dataset(base, shared[0][:10], shared[1]).__getitems__(range(10))
    routes = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 0, 0]).tolist() if answerer.method.keeps_parts else [None] * 10
    seen: list[list[str]] = []
    texts, margins = answerer.generate(items, answerer.selection(routes), 4, seen.append)
    assert len(seen) == 3
    plan = GenerationConfig(
        max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    for row, item in enumerate(items):
        with torch.no_grad(), routing(answerer.selection([routes[row]])):
            said = llava.generate(**collate_prompts([item], tokenizer.pad_token_id), generation_config=plan)
        assert texts[row] == tokenizer.decode(said.sequences[0, len(item.input_ids) :], skip_special_tokens=True)
        gaps = [logits[0].topk(2).values.diff().abs().item() for logits in said.logits]
        assert margins[row] == pytest.approx(min(gaps), abs=1e-4)
        assert all(texts[row].startswith(so_far[row]) for so_far in seen)


class Scripted(nn.Module):
    """Replaces the head: row ``b`` says the token of ``script[b][t]`` at step ``t``, ahead of all others by its gap."""

    def __init__(self, script: list[list[tuple[int, float]]], vocabulary: int) -> None:
        super().__init__()
        self.script, self.vocabulary, self.step = script, vocabulary, 0

    def forward(self, hidden: Tensor) -> Tensor:
        logits = torch.zeros(*hidden.shape[:2], self.vocabulary)
        for row, said in enumerate(self.script):
            token, gap = said[min(self.step, len(said) - 1)]
            logits[row, :, token] = gap
        self.step += 1
        return logits


def test_stops_at_the_end_token(tiny_base: LoadedBase) -> None:
    """What comes after ``</s>`` is neither said nor counted in the margin; the batch stops once all rows have ended."""
    tokenizer = tiny_base.tokenizer
    end = tokenizer.eos_token_id
    red, green = (tokenizer(f" {word}", add_special_tokens=False).input_ids for word in ("red", "green"))
    assert len(red) == len(green) == 1
    script = [[(red[0], 3.0), (end, 2.0), (green[0], 0.1)], [(green[0], 5.0), (red[0], 4.0), (end, 6.0)]]
    head = Scripted(script, len(tokenizer))
    tiny_base.model.lm_head = head
    method = method_class("zero_shot")(tiny_config("zero_shot", Path("nowhere")))
    answerer = Answerer(tiny_base, tiny_base.model, method, 0, None)
    answerer.config = EvaluationConfig(exact=False)
    asked = [Question(str(i), None, "What is it?", "red", {}) for i in range(2)]
    first, second = answerer.answer(asked, Path(), 20)
    assert (first.text, second.text) == ("red", "green red")
    assert (first.margin, second.margin) == (2.0, 4.0)
    assert (first.task, first.redone) == (None, False)
    assert head.step == 3, "20 tokens were allowed, all rows had ended after 3"
