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
from clmoe.data.batches import PromptBatch, prompt_dataset, to_device
from clmoe.data.collate import PromptItem, collate_prompts
from clmoe.data.records import Question
from clmoe.model.llava import LoadedBase
from clmoe.model.routing import RouterChoice, RouteSelection, routing

if TYPE_CHECKING:
    from clmoe.methods.base import Method


@dataclass(frozen=True)
class Answer:
    """Attributes: the text; the smallest distance of the two best logits on the way; whether it was answered again
    alone; the task whose gate was mixed in, if any."""

    text: str
    margin: float
    redone: bool
    task: int | None


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
        config: EvaluationConfig,
    ) -> None:
        self.base, self.method, self.config = base, method, config
        self.model, self.checkpoint = model.eval(), checkpoint

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
        dataset = prompt_dataset(self.base, questions, image_root)
        # Characters stand in for tokens here, so that images are read one batch at a time: a whole test set's may not
        # fit into memory.
        by_length = sorted(range(len(dataset)), key=lambda i: (questions[i].image is None, len(questions[i].text), i))
        answers: dict[int, Answer] = {}

        def run(rows: list[int], redone: bool) -> None:
            ids = [questions[i].question_id for i in rows]
            batch = self._batch([dataset[i] for i in rows], ids, task_index)
            for row, answer in zip(rows, self._generate(batch, max_new_tokens, router, redone), strict=True):
                answers[row] = answer

        size = self.config.batch_size
        for start in range(0, len(by_length), size):
            rows = by_length[start : start + size]
            run(rows, redone=False)
            advance(len(rows))
        if self.config.exact:
            for row in [i for i in by_length if answers[i].margin < self.config.margin]:
                run([row], redone=True)
        return [answers[i] for i in range(len(dataset))]

    def _batch(self, items: list[PromptItem], question_ids: list[str], task_index: int | None) -> PromptBatch:
        inputs = to_device(collate_prompts(items, self.base.tokenizer.pad_token_id), self.base)
        return PromptBatch(inputs, question_ids, task_index, self.method.config.seed)

    @torch.no_grad()
    def _generate(self, batch: PromptBatch, max_new_tokens: int, router: RouterChoice, redone: bool) -> list[Answer]:
        selection = RouteSelection()
        if self.checkpoint is not None:
            selection = self.method.selection(self.checkpoint, self.model, batch, router)  # type: ignore[arg-type]
        tokenizer = self.base.tokenizer
        rows, prompt = batch.inputs["input_ids"].shape
        margins = _Margins(rows, prompt, tokenizer.eos_token_id)
        plan = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        with routing(selection):
            tokens = self.model.generate(  # type: ignore[operator]
                **batch.inputs, generation_config=plan, logits_processor=LogitsProcessorList([margins])
            )
        texts = tokenizer.batch_decode(tokens[:, prompt:], skip_special_tokens=True)
        tasks = [None] * rows if selection.located is None else selection.located.tolist()
        return [
            Answer(text.strip(), float(margin), redone, task)
            for text, margin, task in zip(texts, margins.smallest, tasks, strict=True)
        ]
