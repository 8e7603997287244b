"""Batched greedy answers: left padding, sorted by length, close calls answered again alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from clmoe.config import EvaluationConfig
from clmoe.data.batches import prompt_dataset, to_device
from clmoe.data.collate import PromptItem, collate_prompts
from clmoe.data.records import Question
from clmoe.evaluate.location import known_tasks
from clmoe.methods.features import FeatureStore
from clmoe.model.llava import LoadedBase
from clmoe.model.routing import NEWEST_ROUTER, RouterChoice, RouteSelection, routing

if TYPE_CHECKING:
    from clmoe.methods.base import Method


@dataclass(frozen=True)
class Answer:
    """One question's answer.

    Attributes:
        text: what was generated.
        margin: the smallest distance of the two best logits on the way.
        redone: it was answered again alone.
        task: whose routers served it, in training order; None for methods that do not choose.
        deciders: the task that each decider took the question for, where it was located.
    """

    text: str
    margin: float
    redone: bool
    task: int | None
    deciders: dict[str, int]


class _Margins(LogitsProcessor):
    """Watches greedy generation: the smallest gap between the two best logits of each unfinished row."""

    def __init__(self, rows: int, prompt_length: int, end: int) -> None:
        self.smallest = torch.full((rows,), float("inf"))
        self.finished = torch.zeros(rows, dtype=torch.bool)
        self.prompt_length, self.end = prompt_length, end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self.prompt_length:
            self.finished |= (input_ids[:, -1] == self.end).cpu()
        best = scores.float().topk(2, dim=-1).values
        gap = (best[:, 0] - best[:, 1]).cpu()
        self.smallest = torch.where(self.finished, self.smallest, torch.minimum(self.smallest, gap))
        return scores


class Answerer:
    """Asks an adapted (or bare) LLaVA questions."""

    def __init__(
        self,
        base: LoadedBase,
        model: nn.Module,
        method: Method,
        checkpoint: Path | None,
        learned: int,
        config: EvaluationConfig,
        features: Path | None = None,
    ) -> None:
        """`features`: folder that keeps the locator's features; None computes them for every call."""
        self.base, self.method, self.config = base, method, config
        self.model, self.checkpoint, self.learned = model.eval(), checkpoint, learned
        self.features = features

    def answer(
        self,
        questions: Sequence[Question],
        image_root: Path,
        max_new_tokens: int,
        router: RouterChoice = "located",
        task_index: int | None = None,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> list[Answer]:
        """One answer per question, in order.

        With ``exact``, a row whose two best logits came closer than ``margin`` is answered again in a batch of its
        own, so that the batch's rounding cannot decide.

        Args:
            max_new_tokens: longest answer in tokens.
            router: how the task is chosen, for methods that choose one.
            task_index: the questions' true task, for the oracle.
            advance: called with the number of rows done.
        """
        found = self._find_tasks(questions, image_root, router, task_index)
        dataset = prompt_dataset(self.base, questions, image_root)
        # Characters stand in for tokens here, so that images are read one batch at a time: a whole test set's may not
        # fit into memory.
        by_length = sorted(range(len(dataset)), key=lambda i: (questions[i].image is None, len(questions[i].text), i))
        answers: dict[int, Answer] = {}

        def run(rows: list[int], redone: bool) -> None:
            chosen = [next(iter(found[i].values()), None) for i in rows]
            texts, margins = self._generate([dataset[i] for i in rows], self._selection(chosen), max_new_tokens)
            for row, task, text, margin in zip(rows, chosen, texts, margins, strict=True):
                deciders = found[row] if router == "located" else {}
                answers[row] = Answer(text.strip(), margin, redone, task, deciders)

        size = self.config.batch_size
        for start in range(0, len(by_length), size):
            rows = by_length[start : start + size]
            run(rows, redone=False)
            advance(len(rows))
        if self.config.exact:
            for row in [i for i in by_length if answers[i].margin < self.config.margin]:
                run([row], redone=True)
        return [answers[i] for i in range(len(dataset))]

    def _find_tasks(
        self, questions: Sequence[Question], image_root: Path, router: RouterChoice, task_index: int | None
    ) -> list[dict[str, int]]:
        """For each question the task by each decider, the one that counts first; empty where no task is chosen."""
        if self.checkpoint is None or not self.method.finds_task:
            return [{} for _ in questions]
        ids = [question.question_id for question in questions]
        known = known_tasks(router, ids, self.learned, task_index, self.method.config.seed)
        if known is not None:
            return [{router: task} for task in known.tolist()]
        store = FeatureStore(self.base, self.method.feature_kind(), self.config.batch_size, self.features)
        features = store.features(self.model, questions, image_root)  # type: ignore[arg-type]
        located = {name: tasks.tolist() for name, tasks in self.method.locate(self.checkpoint, features).items()}
        return [{name: tasks[row] for name, tasks in located.items()} for row in range(len(questions))]

    def _selection(self, tasks: list[int | None]) -> RouteSelection:
        chosen = [task for task in tasks if task is not None]
        if not chosen:
            return NEWEST_ROUTER
        return self.method.selection(self.model, torch.tensor(chosen))  # type: ignore[arg-type]

    @torch.no_grad()
    def _generate(
        self, items: list[PromptItem], selection: RouteSelection, max_new_tokens: int
    ) -> tuple[list[str], list[float]]:
        """Texts and margins of one batch."""
        tokenizer = self.base.tokenizer
        inputs = to_device(collate_prompts(items, tokenizer.pad_token_id), self.base)
        rows, prompt = inputs["input_ids"].shape
        margins = _Margins(rows, prompt, tokenizer.eos_token_id)
        plan = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        with routing(selection):
            tokens = self.model.generate(  # type: ignore[operator]
                **inputs, generation_config=plan, logits_processor=LogitsProcessorList([margins])
            )
        return tokenizer.batch_decode(tokens[:, prompt:], skip_special_tokens=True), margins.smallest.tolist()
