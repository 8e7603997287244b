"""Batched greedy answers: left padding, sorted by length, close calls answered again alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from clmoe.config import EvaluationConfig
from clmoe.data.batches import prompt_dataset, to_device
from clmoe.data.collate import PromptItem, collate_prompts
from clmoe.data.records import Question
from clmoe.evaluate.location import known_tasks
from clmoe.evaluate.partial import PartialAnswers
from clmoe.methods.features import FeatureStore
from clmoe.model.llava import LoadedBase
from clmoe.model.routing import NEWEST_ROUTER, RouterChoice, RouteSelection, routing
from clmoe.system.processes import count, in_order

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


class _Watched(LogitsProcessor):
    """Shows greedy generation what it has said so far."""

    def __init__(
        self, watch: Callable[[list[str]], None], tokenizer: PreTrainedTokenizerFast, prompt_length: int
    ) -> None:
        self.watch, self.tokenizer, self.prompt_length = watch, tokenizer, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self.prompt_length:
            self.watch(self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True))
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
        partial: PartialAnswers | None = None,
    ) -> list[Answer]:
        """One answer per question, in order.

        With ``exact``, a row whose two best logits came closer than ``margin`` is answered again in a batch of its
        own, so that the batch's rounding cannot decide. Several processes share the batches, and all get all answers.

        Args:
            max_new_tokens: longest answer in tokens.
            router: how the task is chosen, for methods that choose one.
            task_index: the questions' true task, for the oracle.
            advance: called with the number of rows done.
            partial: keeps finished batches; those of an interrupted call are not computed again.
        """
        found = self._find_tasks(questions, image_root, router, task_index)
        dataset = prompt_dataset(self.base, questions, image_root)
        # Characters stand in for tokens here, so that images are read one batch at a time: a whole test set's may not
        # fit into memory.
        by_length = sorted(range(len(dataset)), key=lambda i: (questions[i].image is None, len(questions[i].text), i))
        size = self.config.batch_size
        batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        ids = [question.question_id for question in questions]
        done = {} if partial is None else partial.read()

        def run(rows: list[int], redone: bool) -> list[Answer]:
            chosen = [next(iter(found[i].values()), None) for i in rows]
            texts, margins = self.generate([dataset[i] for i in rows], self.selection(chosen), max_new_tokens)
            return [
                Answer(text.strip(), margin, redone, task, found[row] if router == "located" else {})
                for row, task, text, margin in zip(rows, chosen, texts, margins, strict=True)
            ]

        def finish(rows: list[int]) -> list[Answer]:
            if all(ids[row] in done for row in rows):
                return [done[ids[row]] for row in rows]
            answers = run(rows, redone=False)
            if self.config.exact:
                close = [k for k, answer in enumerate(answers) if answer.margin < self.config.margin]
                for k in close:
                    (answers[k],) = run([rows[k]], redone=True)
            if partial is not None:
                partial.append(zip([ids[row] for row in rows], answers, strict=True))
            advance(len(rows) * count())
            return answers

        finished = in_order(batches, finish)
        answers = dict(zip(by_length, [a for batch in finished for a in batch], strict=True))
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
        located = {name: scores.argmax(1).tolist() for name, scores in self.task_scores(questions, image_root).items()}
        return [{name: tasks[row] for name, tasks in located.items()} for row in range(len(questions))]

    def task_scores(self, questions: Sequence[Question], image_root: Path) -> dict[str, Tensor]:
        """How typical each decider finds each question of each learned task, ``[M, N]`` on the CPU, larger is likelier.

        The decider whose word counts comes first; empty where no task is chosen.
        """
        if self.checkpoint is None or not self.method.finds_task:
            return {}
        store = FeatureStore(self.base, self.method.feature_kind(), self.config.batch_size, self.features)
        features = store.features(self.model, questions, image_root)  # type: ignore[arg-type]
        return self.method.task_scores(self.checkpoint, features)

    def selection(self, tasks: Sequence[int | None]) -> RouteSelection:
        """How a batch of questions of these tasks is routed; None where no task is chosen."""
        chosen = [task for task in tasks if task is not None]
        if not chosen:
            return NEWEST_ROUTER
        return self.method.selection(self.model, torch.tensor(chosen))  # type: ignore[arg-type]

    @torch.no_grad()
    def generate(
        self,
        items: list[PromptItem],
        selection: RouteSelection,
        max_new_tokens: int,
        watch: Callable[[list[str]], None] | None = None,
    ) -> tuple[list[str], list[float]]:
        """Texts and margins of one batch; ``watch`` is called with the texts so far before every further token."""
        tokenizer = self.base.tokenizer
        inputs = to_device(collate_prompts(items, tokenizer.pad_token_id), self.base)
        rows, prompt = inputs["input_ids"].shape
        margins = _Margins(rows, prompt, tokenizer.eos_token_id)
        processors = LogitsProcessorList([margins])
        if watch is not None:
            processors.append(_Watched(watch, tokenizer, prompt))
        plan = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        with routing(selection):
            tokens = self.model.generate(**inputs, generation_config=plan, logits_processor=processors)  # type: ignore[operator]
        return tokenizer.batch_decode(tokens[:, prompt:], skip_special_tokens=True), margins.smallest.tolist()
