"""Measures a base: what it scores untrained, with one plain LoRA per task, and with one LoRA over all tasks.

`python -m clmoe.benchmarks.playground.probe BASE` writes the scores into BASE/recipe.json. The base stays
frozen, so the tower's features are computed once per task; otherwise prompts, images and scoring are the
library's own.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from clmoe.benchmarks.base import Task, load_benchmark
from clmoe.benchmarks.playground.build import prepare
from clmoe.data.images import load_image, preprocess
from clmoe.data.prompts import IGNORE, Encoded, encode_prompt, encode_training
from clmoe.data.records import Question, load_questions, load_train
from clmoe.evaluate.scoring import score

BENCHMARKS = ("playground-coin", "playground-cl4vqa")
STEPS = (120, 240)
BATCH, LEARNING_RATE, WARMUP_SHARE, CLIP_NORM = 16, 3e-3, 0.03, 1.0
MAX_LENGTH = 512
LORA = LoraConfig(r=16, lora_alpha=32, target_modules=["gate_proj", "up_proj", "down_proj"])


@dataclass(frozen=True)
class ProbeTask:
    """A task with its texts encoded and its images turned into features [N, patches, vision hidden]."""

    task: Task
    train: list[Encoded]
    train_features: Tensor
    questions: list[Question]
    prompts: list[list[int]]
    test_features: Tensor


class Probe:
    """A base and the tasks of one benchmark, made ready once for many short trainings."""

    def __init__(self, base: Path, tasks: Sequence[Task]) -> None:
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(base).eval()
        processor = AutoProcessor.from_pretrained(base)
        self.tokenizer = processor.tokenizer
        self.tasks = [self._ready(task, processor) for task in tasks]

    def accuracies(self) -> dict[str, float]:
        """Accuracy (%) of the model as it is, per task."""
        return {data.task.name: self.accuracy(data) for data in self.tasks}

    def separate(self, steps: int, seed: int = 0) -> dict[str, float]:
        """Accuracy (%) per task, each with a fresh LoRA of its own."""
        scores = {}
        for data in self.tasks:
            adapted, parameters = self._attach(seed)
            self._train(data, parameters, steps, seed)
            scores[data.task.name] = self.accuracy(data)
            adapted.unload()
        return scores

    def sequential(self, steps: int, seed: int = 0) -> dict[str, Any]:
        """One LoRA over all tasks in order: accuracy (%) right after each task and at the end.

        `bwt` is the mean of final minus immediate over all tasks but the last.
        """
        adapted, parameters = self._attach(seed)
        immediate = {}
        for data in self.tasks:
            self._train(data, parameters, steps, seed)
            immediate[data.task.name] = self.accuracy(data)
        final = self.accuracies()
        adapted.unload()
        change = sum(final[name] - immediate[name] for name in final) / (len(final) - 1)
        return {"immediate": immediate, "final": final, "bwt": round(change, 2)}

    @torch.no_grad()
    def accuracy(self, data: ProbeTask) -> float:
        """Share (%) of the test questions answered rightly, by greedy decoding."""
        total = 0.0
        for start in range(0, len(data.questions), 100):
            rows = slice(start, start + 100)
            inputs, mask = _pad(data.prompts[rows], self.tokenizer.pad_token_id, left=True)
            tokens = self.model.generate(
                inputs_embeds=self._embed(inputs, data.test_features[rows]),
                attention_mask=mask,
                max_new_tokens=data.task.max_new_tokens,
                do_sample=False,
            )
            answers = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for answer, question in zip(answers, data.questions[rows], strict=True):
                total += score(data.task.scorer, answer, question)
        return round(100 * total / len(data.questions), 2)

    def _ready(self, task: Task, processor: LlavaProcessor) -> ProbeTask:
        records = load_train(task.train, task.image_root)
        questions = load_questions(task.test, task.image_root)
        count = self.model.config.image_seq_length
        return ProbeTask(
            task=task,
            train=[encode_training(record, self.tokenizer, count, MAX_LENGTH) for record in records],
            train_features=self._features([task.image_root / str(r.image) for r in records], processor),
            questions=questions,
            prompts=[encode_prompt(question.text, True, self.tokenizer, count) for question in questions],
            test_features=self._features([task.image_root / str(q.image) for q in questions], processor),
        )

    @torch.no_grad()
    def _features(self, paths: list[Path], processor: LlavaProcessor) -> Tensor:
        parts = []
        for start in range(0, len(paths), 256):
            chunk = paths[start : start + 256]
            pixels = torch.stack([preprocess(load_image(path), processor.image_processor) for path in chunk])
            states = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
            parts.append(states[self.model.config.vision_feature_layer][:, 1:])
        return torch.cat(parts)

    def _attach(self, seed: int) -> tuple[Any, list[nn.Parameter]]:
        torch.manual_seed(seed)
        adapted = get_peft_model(self.model, LORA)
        return adapted, [parameter for parameter in adapted.parameters() if parameter.requires_grad]

    def _train(self, data: ProbeTask, parameters: list[nn.Parameter], steps: int, seed: int) -> None:
        optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
        warmup = max(1, int(WARMUP_SHARE * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser,
            lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps)),
        )
        rng = Random(f"{seed}/{data.task.name}")
        waiting: list[int] = []
        for _ in range(steps):
            if len(waiting) < BATCH:
                waiting = rng.sample(range(len(data.train)), len(data.train))
            rows = [waiting.pop() for _ in range(BATCH)]
            optimiser.zero_grad(set_to_none=True)
            self._loss(data, rows).backward()
            nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            optimiser.step()
            schedule.step()

    def _loss(self, data: ProbeTask, rows: list[int]) -> Tensor:
        encoded = [data.train[row] for row in rows]
        inputs, mask = _pad([item.input_ids for item in encoded], self.tokenizer.pad_token_id, left=False)
        labels, _ = _pad([item.labels for item in encoded], IGNORE, left=False)
        hidden = self.model.model.language_model(
            inputs_embeds=self._embed(inputs, data.train_features[rows]), attention_mask=mask, use_cache=False
        ).last_hidden_state
        counted = labels[:, 1:] != IGNORE
        return nn.functional.cross_entropy(self.model.lm_head(hidden[:, :-1][counted]), labels[:, 1:][counted])

    def _embed(self, inputs: Tensor, features: Tensor) -> Tensor:
        """Token embeddings [B, T, D] with the projected image features in the image tokens' places."""
        projected = self.model.model.multi_modal_projector(features).flatten(0, 1)
        places = (inputs == self.tokenizer.image_token_id)[..., None]
        return self.model.get_input_embeddings()(inputs).masked_scatter(places, projected)


def _pad(rows: Sequence[list[int]], value: int, left: bool) -> tuple[Tensor, Tensor]:
    """Rows padded to one length, and the attention mask: both [B, T] int64."""
    longest = max(map(len, rows))
    fills = [[value] * (longest - len(row)) for row in rows]
    padded = [fill + row if left else row + fill for fill, row in zip(fills, rows, strict=True)]
    masks = [
        [0] * len(fill) + [1] * len(row) if left else [1] * len(row) + [0] * len(fill)
        for fill, row in zip(fills, rows, strict=True)
    ]
    return torch.tensor(padded), torch.tensor(masks)


def probe(base: Path) -> dict[str, Any]:
    """All scores of a base on both benchmarks; the data are written first where they are missing."""
    scores: dict[str, Any] = {}
    for name in BENCHMARKS:
        benchmark = load_benchmark(name)
        prepare(name, benchmark.root.parent)
        bench = Probe(base, benchmark.tasks)
        scores[name] = {"zero_shot": bench.accuracies()}
        for steps in STEPS:
            scores[name][f"separate_{steps}"] = bench.separate(steps)
            print(name, steps, scores[name][f"separate_{steps}"], flush=True)
        scores[name][f"sequential_{STEPS[-1]}"] = bench.sequential(STEPS[-1])
        print(name, scores[name][f"sequential_{STEPS[-1]}"], flush=True)
    return scores


def main() -> None:
    """Command line: the base's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    base = parser.parse_args().base
    path = base / "recipe.json"
    record = json.loads(path.read_text())
    record["scores"] = probe(base)
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
