"""What the tests share: a LLaVA of 0.1 M parameters and a benchmark of three tasks, both made by code."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import yaml
from PIL import Image, ImageDraw
from torch import Tensor

from clmoe.bases.inputs import over_train_batches, to_device, train_dataset
from clmoe.bases.llava import LoadedBase
from clmoe.config import Config, load_config
from clmoe.data.batches import PromptDataset, PromptItem, TrainDataset, collate_prompts, collate_train
from clmoe.data.prompts import SYSTEM, encode_prompt
from clmoe.data.records import TrainRecord, Turn

TASKS = ("colour", "count", "side")
TRAIN_ROWS, TEST_ROWS = 24, 12
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (40, 60, 220)}
NUMBERS = ("one", "two", "three")
MARK = "<image>\n"


def load_script(name: str) -> ModuleType:
    """``scripts/<name>.py`` as a module."""
    path = Path(__file__).resolve().parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    with mock.patch.object(sys, "path", [str(path.parent), *sys.path]):  # as Python does when it runs it
        spec.loader.exec_module(module)
    return module


tiny = load_script("playground/tiny")
TinySizes, build_tiny = tiny.TinySizes, tiny.build_tiny
SIZES = TinySizes(
    image_size=28,
    patch_size=14,
    vision_hidden=32,
    vision_layers=2,
    vision_heads=2,
    vision_ffn=48,
    text_hidden=48,
    text_layers=2,
    text_heads=4,
    text_ffn=64,
    positions=256,
)


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """A freshly initialised tiny LLaVA with its processor, in transformers' format.

    So short trainings as the tests' would end in a model that says ``</s>`` at once, and tests that compare answers
    would compare nothing: its logit is always 0, so that answers are as long as they may be, and differ.
    """
    model, processor = build_tiny(_texts(), seed, SIZES, vocabulary=600)
    model.lm_head.weight.data[processor.tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _texts() -> Iterator[str]:
    yield SYSTEM
    for task in TASKS:
        for index in range(6):
            question, answer = _question(task, index)
            yield f"USER: {question} ASSISTANT: {answer}"


def copy_base(base: LoadedBase) -> LoadedBase:
    """The same base with a model of its own, free to be patched."""
    return dataclasses.replace(base, model=copy.deepcopy(base.model))


def _question(task: str, index: int) -> tuple[str, str]:
    """Question and answer of a row; the answer depends on the picture, which depends on the index."""
    if task == "colour":
        names = list(COLOURS)
        return f"Which colour is it?\nA. {names[0]}\nB. {names[1]}\nC. {names[2]}", "ABC"[index % 3]
    if task == "count":
        return "How many things are there?", NUMBERS[index // 3 % 3]
    return "On which side is it, left or right?", ("left", "right")[index % 2]


def _draw(task: str, index: int) -> Image.Image:
    image = Image.new("RGB", (32, 24), (240, 240, 240))
    pen = ImageDraw.Draw(image)
    colour = COLOURS[list(COLOURS)[index % 3]]
    count = index // 3 % 3 + 1 if task == "count" else 1
    left = 20 if task == "side" and index % 2 else 2
    for number in range(count):
        pen.rectangle((left + 9 * number, 6 + index % 5, left + 7 + 9 * number, 14 + index % 5), fill=colour)
    return image


def write_benchmark(folder: Path) -> Path:
    """Three tasks of 24 training and 12 test rows with small pictures; returns the YAML.

    Task ``count`` holds a few rows without an image, and ``side`` conversations of two turns. An answer to ``count`` is
    one token, so that a model that never ends can be right; one to ``colour`` is long, so that answers differ.
    """
    tokens = {"colour": 6, "count": 1, "side": 3}
    scorers = {"colour": "option_letter", "count": "short_answer", "side": "short_answer"}
    for task in TASKS:
        (folder / task / "images").mkdir(parents=True)
        for index in range(TRAIN_ROWS + TEST_ROWS):
            _draw(task, index).save(folder / task / "images" / f"{index}.png")
        train = [_train_row(task, index) for index in range(TRAIN_ROWS)]
        test = [_test_row(task, index) for index in range(TRAIN_ROWS, TRAIN_ROWS + TEST_ROWS)]
        (folder / task / "train.json").write_text(json.dumps(train))
        (folder / task / "test.json").write_text(json.dumps(test))
    values = {
        "name": "mini",
        "root": str(folder),
        "recipe": {
            "training": {"steps": 4, "batch_size": 8, "learning_rate": 0.01, "logging_steps": 1},
            "adapter": {"rank": 8, "experts": 4, "scale": 2.0, "train_projector": True},
        },
        "tasks": [
            {
                "name": task,
                "train": f"{task}/train.json",
                "test": f"{task}/test.json",
                "images": f"{task}/images",
                "scorer": scorers[task],
                "max_new_tokens": tokens[task],
                "text_rows": task == "count",
            }
            for task in TASKS
        ],
    }
    path = folder / "mini.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def _without_image(task: str, index: int) -> bool:
    return task == "count" and index % 8 == 7


def _train_row(task: str, index: int) -> dict[str, Any]:
    question, answer = _question(task, index)
    turns = [(question, answer)] + ([("Are you sure?", "yes")] if task == "side" and index % 4 == 0 else [])
    row: dict[str, Any] = {"id": f"{task}-{index}", "conversations": []}
    for number, (asked, answered) in enumerate(turns):
        mark = "" if number or _without_image(task, index) else MARK
        row["conversations"] += [{"from": "human", "value": mark + asked}, {"from": "gpt", "value": answered}]
    if not _without_image(task, index):
        row["image"] = f"{index}.png"
    return row


def _test_row(task: str, index: int) -> dict[str, Any]:
    question, answer = _question(task, index)
    row = {"question_id": f"{task}-{index}", "text": question, "answer": answer, "image": f"{index}.png"}
    if _without_image(task, index):
        del row["image"]
    return row


def tiny_config(method: str, folder: Path, *overrides: str) -> Config:
    """``configs/methods/<method>.yaml`` on the tiny model, with ``key=value`` overrides."""
    recipe = {"adapter": {"rank": 8, "experts": 4}, "training": {"steps": 4, "batch_size": 8, "learning_rate": 0.01}}
    return load_config(method, recipe, list(overrides), str(folder))


def pixels(images: int, seed: int = 0) -> Tensor:
    """``[I, 3, H, W]`` noise in the place of pictures."""
    side = SIZES.image_size
    return torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(seed))


def prompt_batch(base: LoadedBase, questions: Sequence[str], seed: int = 0) -> dict[str, Tensor]:
    """Questions about noise pictures, left-padded: ``input_ids``, ``attention_mask``, ``pixel_values``."""
    items = [
        PromptItem(torch.tensor(encode_prompt(text, True, base.tokenizer, base.image_token_count)), picture)
        for text, picture in zip(questions, pixels(len(questions), seed), strict=True)
    ]
    return collate_prompts(items, base.tokenizer.pad_token_id)


def train_batch(base: LoadedBase, pairs: Sequence[tuple[str, str]], image_root: Path = Path()) -> dict[str, Tensor]:
    """Text-only (question, answer) pairs as a right-padded training batch with labels."""
    records = [TrainRecord(str(row), None, (Turn(*pair),)) for row, pair in enumerate(pairs)]
    dataset = train_dataset(base, records, image_root, 256)
    return collate_train([dataset[row] for row in range(len(records))], base.tokenizer.pad_token_id)


def prompt_batches(base: LoadedBase, dataset: PromptDataset, size: int) -> list[dict[str, Tensor]]:
    """All batches of prompts, in order."""
    starts = range(0, len(dataset), size)
    items = [dataset.__getitems__(range(start, min(start + size, len(dataset)))) for start in starts]
    return [to_device(collate_prompts(batch, base.tokenizer.pad_token_id), base) for batch in items]


def train_batches(base: LoadedBase, dataset: TrainDataset, size: int) -> list[dict[str, Tensor]]:
    """All batches of training records, in order."""
    return over_train_batches(base, dataset, size, dict)
