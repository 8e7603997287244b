"""Batches: padding sides, masks, pictures of some rows only, and independence of the number of workers."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clmoe.data.collate import (
    PromptDataset,
    PromptItem,
    TrainDataset,
    TrainItem,
    collate_prompts,
    collate_train,
)
from clmoe.data.records import Question, TrainRecord, Turn
from clmoe.errors import ClmoeError

from . import tokenizers_for_tests as make

PAD = 3
TOKENS = 16
PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})


def train_item(ids: list[int], labels: list[int], pixels: float | None) -> TrainItem:
    return TrainItem(torch.tensor(ids), torch.tensor(labels), None if pixels is None else torch.full((3, 2, 2), pixels))


def test_training_batch() -> None:
    items = [
        train_item([5, 6], [-100, 6], 1.0),
        train_item([7, 8, 9, 3], [-100, -100, 9, 3], None),
        train_item([4], [4], 2.0),
    ]
    batch = collate_train(items, PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 3, 3], [7, 8, 9, 3], [4, 3, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100], [-100, -100, 9, 3], [4, -100, -100, -100]]
    assert batch["pixel_values"].shape == (2, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1.0, 2.0]
    assert {key: value.dtype for key, value in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "labels": torch.int64,
        "pixel_values": torch.float32,
    }


def test_prompt_batch() -> None:
    items = [PromptItem(torch.tensor([5, 6]), None), PromptItem(torch.tensor([7, 8, 9]), torch.ones(3, 2, 2))]
    batch = collate_prompts(items, PAD)
    assert batch["input_ids"].tolist() == [[3, 5, 6], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch["pixel_values"].shape == (1, 3, 2, 2)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}


def test_text_only_batches_have_no_pictures() -> None:
    train = collate_train([train_item([5], [5], None)] * 2, PAD)
    prompts = collate_prompts([PromptItem(torch.tensor([5]), None)], PAD)
    assert "pixel_values" not in train
    assert "pixel_values" not in prompts


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (40 + 10 * number, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def records() -> list[TrainRecord]:
    words = ["dog", "cat", "red", "blue", "left"]
    return [
        TrainRecord(f"r{n}", None if n % 4 == 3 else f"{n % 3}.png", (Turn(f"What is {word}?" * (n + 1), word),))
        for n, word in enumerate(words)
    ]


def train_dataset(image_root: Path, rows: list[TrainRecord] | None = None) -> TrainDataset:
    return TrainDataset(rows or records(), image_root, make.byte_level(), PROCESSOR, TOKENS, 512)


def prompt_dataset(image_root: Path) -> PromptDataset:
    questions = [Question(r.id, r.image, r.turns[0].question, r.turns[0].answer, {}) for r in records()]
    return PromptDataset(questions, image_root, make.byte_level(), PROCESSOR, TOKENS)


@pytest.mark.parametrize("kind", ["train", "prompts"])
def test_batches_do_not_depend_on_workers(kind: str, image_root: Path) -> None:
    dataset = train_dataset(image_root) if kind == "train" else prompt_dataset(image_root)
    collate = partial(collate_train if kind == "train" else collate_prompts, pad_id=PAD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = list(DataLoader(dataset, batch_size=2, collate_fn=collate, num_workers=0))
        shared = list(DataLoader(dataset, batch_size=2, collate_fn=collate, num_workers=2))
    assert len(alone) == 3
    for left, right in zip(alone, shared, strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_training_and_evaluation_see_the_same_prompt_and_picture(image_root: Path) -> None:
    train, prompts = train_dataset(image_root), prompt_dataset(image_root)
    assert len(train) == len(prompts) == 5
    for index in range(5):
        item, prompt = train[index], prompts[index]
        assert torch.equal(item.input_ids[: len(prompt.input_ids)], prompt.input_ids)
        assert item.labels[len(prompt.input_ids)] != -100
        if records()[index].image is None:
            assert item.pixel_values is None
            assert prompt.pixel_values is None
        else:
            assert torch.equal(item.pixel_values, prompt.pixel_values)
            assert (item.input_ids == make.byte_level().image_token_id).sum() == TOKENS


def test_errors_of_a_dataset(image_root: Path) -> None:
    with pytest.raises(ClmoeError, match="there are no training records"):
        TrainDataset([], image_root, make.byte_level(), PROCESSOR, TOKENS, 512)
    with pytest.raises(ClmoeError, match="record 'r0': a token reaches across"):
        TrainDataset(records(), image_root, make.merging_across_answers(), PROCESSOR, TOKENS, 512)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_from_workers_too(workers: int, image_root: Path) -> None:
    (image_root / "1.png").write_bytes(b"")
    loader = DataLoader(train_dataset(image_root), collate_fn=partial(collate_train, pad_id=PAD), num_workers=workers)
    with pytest.raises(ClmoeError, match=r"1\.png: cannot be decoded"):
        list(loader)
