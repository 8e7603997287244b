"""Prompts about one image lie side by side and share a prefix; nothing is lost, and nothing is shared wrongly."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clmoe.bases.families import LLAVA
from clmoe.bases.inputs import SharedPrompts, image_order, prompt_inputs
from clmoe.data.batches import PromptItem, collate_prompts

IMAGE = 9
BASE: Any = SimpleNamespace(
    family=LLAVA,
    tokenizer=SimpleNamespace(pad_token_id=0, image_token_id=IMAGE),
    device=torch.device("cpu"),
    dtype=torch.float32,
)


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


def joined(shared: SharedPrompts, row: int) -> list[int]:
    """The whole prompt of a row, put back together."""
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
    items = [PromptItem(torch.tensor(ids), picture) for ids, picture in zip(prompts, pictures, strict=True)]
    shared = prompt_inputs(BASE, items, routes)
    assert isinstance(shared, SharedPrompts)
    assert shared.group.tolist() == [0, 0, 1, 1, 2, 2, 3], "the last row's router is another"
    assert shared.first.tolist() == [0, 2, 4, 6]
    # the prompts of image a differ after the 5; equal prompts, and one that begins another, keep a token each; a lone
    # row is cut after its image
    assert shared.prefixes["attention_mask"].sum(1).tolist() == [8, 7, 3, 7]
    assert shared.rests["attention_mask"].sum(1).tolist() == [2, 1, 1, 2, 1, 1, 2]
    assert [joined(shared, row) for row in range(7)] == prompts
    assert torch.equal(shared.prefixes["pixel_values"], torch.stack([a, b, a]))
    assert "pixel_values" not in shared.rests
    both = zip(shared.attention_mask.sum(1).tolist(), prompts, strict=True)
    assert all(count == len(prompt) for count, prompt in both)


def test_nothing_is_split_where_little_would_be_saved() -> None:
    pictures = [torch.zeros(3, 2, 2) for _ in range(8)]

    def items(pictures: list[Tensor]) -> list[PromptItem]:
        return [PromptItem(torch.tensor([1, *[IMAGE] * 8, 5, n]), picture) for n, picture in enumerate(pictures)]

    one_of_nine, pairs = items([*pictures, pictures[0]]), items([pictures[n // 2] for n in range(8)])
    assert isinstance(prompt_inputs(BASE, pairs, [0] * 8), SharedPrompts)
    for whole, routes in ((items(pictures), [0] * 8), (one_of_nine, [0] * 9), (pairs, range(8))):
        batch = prompt_inputs(BASE, whole, routes)
        assert isinstance(batch, dict)
        assert all(torch.equal(batch[key], value) for key, value in collate_prompts(whole, 0).items())
