"""Batches: padding, masks, images in only some rows, and independence of the number of workers."""

import pickle
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from clmoe.bases.llava import LoadedBase
from clmoe.bases.stack import CLIPImageProcessorPil
from clmoe.data.batches import (
    NumberedDataset,
    PromptDataset,
    PromptItem,
    TrainDataset,
    TrainItem,
    collate_numbered,
    collate_prompts,
    collate_train,
    first_questions,
)
from clmoe.data.records import TrainRecord, Turn
from clmoe.errors import ClmoeError
from tests.data import tokenizers_for_tests as make

PAD, TOKENS = 3, 16
PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
TOKENIZER = make.shipped()
READ: Counter[str] = Counter()


class CountingEncoder(LoadedBase):
    def read_image(self, path: Path) -> Tensor:
        READ[path.name] += 1
        return super().read_image(path)


ENCODER = CountingEncoder(
    model=None, fingerprint="", tokenizer=TOKENIZER, image_processor=PROCESSOR, image_token_count=TOKENS
)


def train_item(ids: list[int], labels: list[int], pixels: float | None) -> TrainItem:
    return TrainItem(torch.tensor(ids), None if pixels is None else torch.full((3, 2, 2), pixels), torch.tensor(labels))


# ---- Collation


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
    dtypes = {key: value.dtype for key, value in batch.items()}
    assert dtypes.pop("pixel_values") == torch.float32 and set(dtypes.values()) == {torch.int64} and len(dtypes) == 3
    numbered = collate_numbered(list(zip((4, 0, 9), items, strict=True)), PAD)
    assert numbered.pop("rows").tolist() == [4, 0, 9]
    assert all(torch.equal(numbered[key], batch[key]) for key in batch) and numbered.keys() == batch.keys()


def test_prompt_batch() -> None:
    items = [PromptItem(torch.tensor([5, 6]), None), PromptItem(torch.tensor([7, 8, 9]), torch.ones(3, 2, 2))]
    batch = collate_prompts(items, PAD)
    assert batch["input_ids"].tolist() == [[3, 5, 6], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch["pixel_values"].shape == (1, 3, 2, 2)
    assert collate_prompts(items[:1], PAD).keys() == {"input_ids", "attention_mask"}


# ---- Datasets


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (40 + 10 * number, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


RECORDS = [
    TrainRecord(f"r{n}", None if n % 4 == 3 else f"{n % 3}.png", (Turn(f"What is {word}?" * (n + 1), word),))
    for n, word in enumerate(("dog", "cat", "red", "blue", "left"))
]


def train_dataset(image_root: Path) -> TrainDataset:
    return TrainDataset(RECORDS, image_root, ENCODER, 512)


def prompt_dataset(image_root: Path) -> PromptDataset:
    return PromptDataset(first_questions(RECORDS), image_root, ENCODER)


@pytest.mark.parametrize(("dataset_of", "collate"), [(train_dataset, collate_train), (prompt_dataset, collate_prompts)])
def test_batches_do_not_depend_on_workers(dataset_of: Callable, collate: Callable, image_root: Path) -> None:
    dataset = dataset_of(image_root)
    batches = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # where workers are not forked, they get a pickled dataset
        for source, workers in ((dataset, 0), (dataset, 2), (pickle.loads(pickle.dumps(dataset)), 0)):
            loader = DataLoader(source, batch_size=2, collate_fn=partial(collate, pad_id=PAD), num_workers=workers)
            batches.append(list(loader))
    assert len(batches[0]) == 3
    for others in batches[1:]:
        for left, right in zip(batches[0], others, strict=True):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left)


def test_an_image_is_read_once_in_a_batch(image_root: Path) -> None:
    dataset = train_dataset(image_root)
    READ.clear()
    items = dataset.__getitems__([4, 3, 1, 2])
    assert READ == {"1.png": 1, "2.png": 1}
    assert items[0].pixel_values is items[2].pixel_values
    for item, row in zip(items, (4, 3, 1, 2), strict=True):
        assert torch.equal(item.input_ids, dataset[row].input_ids)
        assert same_picture(item, dataset[row])


def same_picture(left: PromptItem, right: PromptItem) -> bool:
    if left.pixel_values is None or right.pixel_values is None:
        return left.pixel_values is right.pixel_values
    return torch.equal(left.pixel_values, right.pixel_values)


def test_training_and_evaluation_see_the_same_prompt_and_picture(image_root: Path) -> None:
    train, prompts = train_dataset(image_root), prompt_dataset(image_root)
    numbered = NumberedDataset(train)
    assert len(numbered) == len(train) == len(prompts) == 5
    for index, (number, item) in enumerate(numbered.__getitems__(range(5))):
        prompt = prompts[index]
        assert number == index
        assert torch.equal(item.input_ids[: len(prompt.input_ids)], prompt.input_ids)
        assert item.labels[len(prompt.input_ids)] != -100
        assert same_picture(item, prompt)
        assert (item.pixel_values is None) == (RECORDS[index].image is None)
        assert (item.input_ids == TOKENIZER.image_token_id).sum() == (TOKENS if RECORDS[index].image else 0)


def test_errors_of_a_dataset(image_root: Path) -> None:
    with pytest.raises(ClmoeError):
        TrainDataset([], image_root, ENCODER, 512)
    with pytest.raises(ClmoeError, match="record 'r0'"):
        TrainDataset(RECORDS, image_root, replace(ENCODER, tokenizer=make.merging_across_answers()), 512)
