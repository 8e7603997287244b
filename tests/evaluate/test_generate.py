"""Batched greedy answers: the same as one by one, none lost, margins true, stops at the end token."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clmoe.evaluate.evaluation import Checkpoint
from torch import Tensor, nn

from clmoe.bases.inputs import prompt_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.config import EvaluationConfig
from clmoe.data.batches import PromptDataset
from clmoe.data.records import Question, load_questions
from clmoe.evaluate.generate import Answer, Answerer, open_answerer
from clmoe.experts.model import adapted_base
from clmoe.experts.routing import routing
from clmoe.methods import method_class
from clmoe.report.figures import locator
from clmoe.train.checkpoint import read_checkpoint
from tests.runs import Runs
from tests.support import TASKS, prompt_batches, tiny_config

Ask = Callable[..., list[Answer]]


@pytest.fixture
def questions(mini_yaml: Path) -> tuple[list[Question], Path]:
    """Of two tasks, so prompts have different lengths; some have no image."""
    root = mini_yaml.parent
    mixed = []
    for task in TASKS[:2]:
        for question in load_questions(root / task / "test.json", root / task / "images"):
            image = None if question.image is None else f"{task}/images/{question.image}"
            mixed.append(dataclasses.replace(question, image=image))
    return mixed[::2] + mixed[1::2], root


@pytest.fixture
def ask(runs: Runs, tiny_base: LoadedBase, questions: tuple[list[Question], Path]) -> Ask:
    """Ask a CL-MoE checkpoint of two tasks, whose router depends on the sample."""
    done = read_checkpoint(runs.chain("clmoe")[1])
    checkpoint = Checkpoint(done.folder, done.identity, TASKS[1], done.lineage.tasks, done.config, done.lineage.base)
    answerer = open_answerer(checkpoint, tiny_base)

    def run(rows: slice = slice(None), **settings: object) -> list[Answer]:
        answerer.config = dataclasses.replace(EvaluationConfig(), **settings)  # type: ignore[arg-type]
        return answerer.answer(questions[0][rows], questions[1], 4)

    run.answerer = answerer  # type: ignore[attr-defined]
    return run


def test_batched_answers_are_those_given_one_by_one(ask: Ask, questions: tuple[list[Question], Path]) -> None:
    alone = [ask(slice(i, i + 1), batch_size=1)[0] for i in range(len(questions[0]))]
    for size in (1, 5, 64):
        together = ask(batch_size=size)
        assert [a.text for a in together] == [a.text for a in alone], size
        assert [a.task for a in together] == [a.task for a in alone], size
        for a, b in zip(together, alone, strict=True):
            assert a.margin == pytest.approx(b.margin, abs=1e-3)
    assert len({a.text for a in alone}) > 2, "all answers are equal: the order of answers would not be tested"


def test_every_question_gets_its_answer_in_order(ask: Ask, questions: tuple[list[Question], Path]) -> None:
    advanced: list[int] = []
    answerer: Answerer = ask.answerer  # type: ignore[attr-defined]
    answerer.config = EvaluationConfig(batch_size=5)
    twice = [*questions[0], *questions[0][:3]]
    answers = answerer.answer(twice, questions[1], 4, advance=advanced.append)
    assert len(answers) == len(twice)
    assert advanced == [5, 5, 5, 5, 5, 2]
    assert [a.text for a in answers[:3]] == [a.text for a in answers[-3:]]
    tasks = [a.task for a in answers[: len(questions[0])]]
    assert tasks == [TASKS.index(q.question_id.split("-")[0]) for q in questions[0]]


def test_images_are_read_one_batch_at_a_time(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """All images of a test set together may not fit into memory; once for the features, once for the answers."""
    answerer: Answerer = ask.answerer  # type: ignore[attr-defined]
    read: list[int] = []
    pending: list[int] = []
    get = PromptDataset.__getitem__
    monkeypatch.setattr(PromptDataset, "__getitem__", lambda self, i: pending.append(i) or get(self, i))

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            read.append(len(pending))
            pending.clear()
            return real(*arguments, **named)

        return call

    monkeypatch.setattr(locator, "last_prompt_features", counted(locator.last_prompt_features))
    monkeypatch.setattr(answerer, "generate", counted(answerer.generate))
    ask(batch_size=5, exact=False)
    assert read == 2 * [5, 5, 5, 5, 4]


def test_close_calls_are_answered_again_alone(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    margins = [a.margin for a in ask(exact=False)]
    assert not any(a.redone for a in ask(exact=False))
    threshold = sorted(margins)[len(margins) // 2]
    sizes: list[int] = []
    answerer: Answerer = ask.answerer  # type: ignore[attr-defined]
    real = answerer.generate
    monkeypatch.setattr(answerer, "generate", lambda b, *rest: sizes.append(len(b)) or real(b, *rest))
    redone = [a.redone for a in ask(exact=True, margin=threshold)]
    assert redone == [margin < threshold for margin in margins]
    assert sizes == [len(margins), *[1] * sum(redone)]


def test_margin_is_the_smallest_gap_of_the_greedy_path(
    ask: Ask, questions: tuple[list[Question], Path], tiny_base: LoadedBase
) -> None:
    """Oracle: one question at a time, token by token, whole forward passes without a cache."""
    answerer: Answerer = ask.answerer  # type: ignore[attr-defined]
    given = ask(slice(0, 6), exact=False)
    llava = adapted_base(answerer.model)  # type: ignore[arg-type]
    dataset = prompt_dataset(tiny_base, questions[0][:6], questions[1])
    for answer, inputs in zip(given, prompt_batches(tiny_base, dataset, 1), strict=True):
        selection = answerer.method.selection(answerer.model, torch.tensor([answer.task]))  # type: ignore[arg-type]
        ids, gap, tokens = inputs["input_ids"], float("inf"), []
        for _ in range(4):
            with torch.no_grad(), routing(selection):
                values = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
                best = llava(**values).logits[0, -1].topk(2)
            gap = min(gap, float(best.values[0] - best.values[1]))
            token = int(best.indices[0])
            if token == tiny_base.tokenizer.eos_token_id:
                break
            tokens.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert answer.text == tiny_base.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert answer.margin == pytest.approx(gap, abs=1e-4)


class Scripted(nn.Module):
    """In the place of the head: row ``b`` says ``script[b][t]`` at step ``t``, ahead of the next token by ``gap``."""

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
    """What comes after ``</s>`` is neither said nor counted in the margin, and all rows ended stops the batch."""
    tokenizer = tiny_base.tokenizer
    end = tokenizer.eos_token_id
    red, green = (tokenizer(f" {word}", add_special_tokens=False).input_ids for word in ("red", "green"))
    assert len(red) == len(green) == 1
    script = [[(red[0], 3.0), (end, 2.0), (green[0], 0.1)], [(green[0], 5.0), (red[0], 4.0), (end, 6.0)]]
    head = Scripted(script, len(tokenizer))
    tiny_base.model.lm_head = head
    method = method_class("zero_shot")(tiny_config("zero_shot", Path("nowhere")))
    answerer = Answerer(tiny_base, tiny_base.model, method, None, 0, EvaluationConfig(exact=False))
    asked = [Question(str(i), None, "What is it?", "red", {}) for i in range(2)]
    first, second = answerer.answer(asked, Path(), 20)
    assert (first.text, second.text) == ("red", "green red")
    assert (first.margin, second.margin) == (2.0, 4.0)
    assert (first.task, first.redone) == (None, False)
    assert head.step == 3, "20 tokens were allowed, all rows had ended after 3"


def test_the_longest_answer_is_limited(ask: Ask, questions: tuple[list[Question], Path]) -> None:
    answerer: Answerer = ask.answerer  # type: ignore[attr-defined]
    answerer.config = EvaluationConfig()
    tokenizer = answerer.base.tokenizer
    for answer in answerer.answer(questions[0][:4], questions[1], 1):
        assert len(tokenizer(answer.text, add_special_tokens=False).input_ids) <= 1
