"""Prompts of one image side by side and cut into what they share and the rest; nothing lost, nothing shared wrongly."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clmoe.bases.inputs import SharedPrompts, image_order, prompt_dataset, read_prompts, share_prefixes
from clmoe.bases.llava import LoadedBase
from clmoe.data import images as images_module
from clmoe.data.batches import PromptItem
from clmoe.data.records import Question, load_questions

PAD, IMAGE = 0, 9


@pytest.mark.parametrize("seed", range(5))
def test_the_order_keeps_images_together_and_is_that_of_length_without_repeats(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, 5, (2, 40), generator=generator).tolist()
    images, lengths = [None if d == 4 else f"{d}.png" for d in draws[0]], draws[1]
    for order in (image_order(images, lengths), image_order(images)):
        assert sorted(order) == list(range(40))
        seen = [images[row] for row in order if images[row] is not None]
        assert sum(a != b for a, b in pairwise(seen)) == len(set(seen)) - 1
    single = [None if d == 4 else f"{i}.png" for i, d in enumerate(draws[0])]
    assert image_order(single) == list(range(40))
    assert image_order(single, lengths) == sorted(range(40), key=lambda i: (single[i] is None, lengths[i], i))
    inside = [(lengths[r], r) for r in image_order(images, lengths) if images[r] == "0.png"]
    assert inside == sorted(inside)


def item(tokens: Sequence[int], picture: Tensor | None) -> PromptItem:
    return PromptItem(torch.tensor(tokens), picture)


def joined(shared: SharedPrompts, row: int) -> list[int]:
    """The whole prompt of a row, put together again."""
    group = int(shared.group[row])
    parts = [
        part["input_ids"][index][part["attention_mask"][index].bool()]
        for part, index in ((shared.prefixes, group), (shared.rests, row))
    ]
    return torch.cat(parts).tolist()


def test_what_is_shared_ends_before_the_first_token_that_differs() -> None:
    a, b = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
    head = [1, 2, 3, 4, IMAGE, IMAGE, IMAGE]
    prompts = [[*head, 5, 6, 7], [*head, 5, 8], [*head, 6], [*head, 6, 7], [1, 2, 5, 6], [1, 2, 5, 6], [*head, 5, 1]]
    pictures = [a, a, b, b, None, None, a]
    routes = [0, 0, 0, 0, 0, 0, 1]
    items = [item(*pair) for pair in zip(prompts, pictures, strict=True)]
    shared = share_prefixes(items, routes, PAD, IMAGE)
    assert shared is not None
    assert shared.group.tolist() == [0, 0, 1, 1, 2, 2, 3], "the last row's router is another"
    assert shared.first.tolist() == [0, 2, 4, 6]
    # 5 differs for image a only behind it; equal prompts and a shorter one keep a token each; a lone row keeps its rest
    assert shared.prefixes["attention_mask"].sum(1).tolist() == [8, 7, 3, 7]
    assert shared.rests["attention_mask"].sum(1).tolist() == [2, 1, 1, 2, 1, 1, 2]
    assert [joined(shared, row) for row in range(7)] == prompts
    assert torch.equal(shared.prefixes["pixel_values"], torch.stack([a, b, a]))
    assert "pixel_values" not in shared.rests
    both = zip(shared.attention_mask.sum(1).tolist(), prompts, strict=True)
    assert all(count == len(prompt) for count, prompt in both)


def test_nothing_is_split_where_little_would_be_saved() -> None:
    pictures = [torch.zeros(3, 2, 2) for _ in range(8)]
    head = [1, *[IMAGE] * 8]
    alone = [item([*head, 5, row], picture) for row, picture in enumerate(pictures)]
    assert share_prefixes(alone, [0] * 8, PAD, IMAGE) is None
    assert share_prefixes([*alone, item([*head, 5, 6], pictures[0])], [0] * 9, PAD, IMAGE) is None, "one of nine"
    pairs = [item([*head, 5, row], pictures[row // 2]) for row in range(8)]
    assert share_prefixes(pairs, [0] * 8, PAD, IMAGE) is not None
    assert share_prefixes(pairs, range(8), PAD, IMAGE) is None, "all routed apart"


def test_a_picture_is_read_once(tiny_base: LoadedBase, mini_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mini_yaml.parent / "count"
    questions = load_questions(folder / "test.json", folder / "images")
    pictured = [q for q in questions if q.image is not None][:2]
    (text,) = [q for q in questions if q.image is None][:1]
    asked: list[Question] = [*pictured, text, *(dataclasses.replace(q, text="Are you sure?") for q in pictured)]
    dataset = prompt_dataset(tiny_base, asked, folder / "images")
    expected = [dataset[row] for row in range(5)]
    read: list[Path] = []
    real = images_module.load_image
    monkeypatch.setattr(images_module, "load_image", lambda path: read.append(path) or real(path))
    items = read_prompts(dataset, range(5))
    assert [path.name for path in read] == [q.image for q in pictured]
    assert items[3].pixel_values is items[0].pixel_values
    for got, wanted in zip(items, expected, strict=True):
        assert torch.equal(got.input_ids, wanted.input_ids)
        assert (got.pixel_values is None) == (wanted.pixel_values is None)
        assert wanted.pixel_values is None or torch.equal(got.pixel_values, wanted.pixel_values)  # type: ignore[arg-type]
