"""Batched greedy answers: sorted by image and length, close calls answered again alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from clmoe.config import EvaluationConfig
from clmoe.data.batches import prompt_dataset, to_device
from clmoe.data.collate import PromptItem, collate_prompts
from clmoe.data.prefix import image_order, prompt_inputs, read_prompts
from clmoe.data.records import Question
from clmoe.evaluate.greedy import greedy
from clmoe.evaluate.location import known_tasks
from clmoe.evaluate.partial import PartialAnswers
from clmoe.methods.features import FeatureStore
from clmoe.model.adapter import adapted_llava
from clmoe.model.llava import LoadedBase
from clmoe.model.routing import NEWEST_ROUTER, RouterChoice, RouteSelection
from clmoe.utils.processes import count, in_order

if TYPE_CHECKING:
    from clmoe.methods.base import Method


SCORED_AT_ONCE = 1024  # questions: so many that a process of several has its share, so few that memory does not matter


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
        order = self._order(questions)
        size = self.config.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        ids = [question.question_id for question in questions]
        done = {} if partial is None else partial.read()

        def run(rows: list[int], redone: bool) -> list[Answer]:
            chosen = [next(iter(found[i].values()), None) for i in rows]
            texts, margins = self.generate(read_prompts(dataset, rows), self.selection(chosen), max_new_tokens)
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
        answers = dict(zip(order, [a for batch in finished for a in batch], strict=True))
        return [answers[i] for i in range(len(dataset))]

    def _order(self, questions: Sequence[Question]) -> list[int]:
        """The order of answering, a pure function of the questions: by length, those of one image together."""
        lengths = [len(question.text) for question in questions]
        if self.config.share_images:
            return image_order([question.image for question in questions], lengths)
        return sorted(range(len(questions)), key=lambda i: (questions[i].image is None, lengths[i], i))

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
        config = self.config
        kind = self.method.feature_kind()
        store = FeatureStore(self.base, kind, config.batch_size, self.features, config.share_images)
        features = store.features(self.model, questions, image_root)  # type: ignore[arg-type]
        checkpoint = self.checkpoint
        parts = in_order(features.split(SCORED_AT_ONCE), lambda some: self.method.task_scores(checkpoint, some))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def selection(self, tasks: Sequence[int | None]) -> RouteSelection:
        """How a batch of questions of these tasks is routed; None where no task is chosen."""
        chosen = [task for task in tasks if task is not None]
        if not chosen:
            return NEWEST_ROUTER
        return self.method.selection(self.model, torch.tensor(chosen))  # type: ignore[arg-type]

    def generate(
        self,
        items: list[PromptItem],
        selection: RouteSelection,
        max_new_tokens: int,
        watch: Callable[[list[str]], None] | None = None,
    ) -> tuple[list[str], list[float]]:
        """Texts and margins of one batch; ``watch`` is called with the texts so far before every further token.

        With ``share_images``, items that hold the same ``pixel_values`` tensor and are routed alike share their prefix.
        """
        tokenizer = self.base.tokenizer
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id

        def texts(tokens: Tensor) -> list[str]:
            return tokenizer.batch_decode(tokens, skip_special_tokens=True)

        if self.config.share_images:
            inputs = prompt_inputs(self.base, items, selection.keys(len(items)))
        else:
            inputs = to_device(collate_prompts(items, pad), self.base)
        tokens, margins = greedy(
            _llava(self.model), inputs, selection, max_new_tokens, end, pad,
            (lambda tokens: None) if watch is None else lambda tokens: watch(texts(tokens)),
        )  # fmt: skip
        return texts(tokens), margins.tolist()


def _llava(model: nn.Module) -> LlavaForConditionalGeneration:
    """The LLaVA itself, with its projections patched if it is adapted."""
    return model if isinstance(model, LlavaForConditionalGeneration) else adapted_llava(model)  # type: ignore[arg-type]
