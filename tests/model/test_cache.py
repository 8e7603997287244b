"""A cache that writes tokens into reserved memory, against transformers' own, which concatenates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from clmoe.model.cache import with_room

LAYERS, HEADS, WIDTH = 2, 3, 4


def states(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, HEADS, tokens, WIDTH), torch.randn(rows, HEADS, tokens, WIDTH)


def read(rows: int, tokens: int) -> DynamicCache:
    torch.manual_seed(0)
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(*states(rows, tokens), layer)
    return cache


@pytest.mark.parametrize("rows", [None, [1, 0, 1]])
def test_it_holds_what_a_concatenating_cache_holds(rows: list[int] | None) -> None:
    plain = read(2, 5)
    roomy = with_room(plain, 4, None if rows is None else torch.tensor(rows))
    if rows is not None:
        plain.batch_select_indices(torch.tensor(rows))
    for tokens in (2, 1, 1):
        for layer in range(LAYERS):
            new = states(len(rows or [0, 1]), tokens)
            for got, wanted in zip(roomy.update(*new, layer), plain.update(*new, layer), strict=True):
                assert torch.equal(got, wanted)
        assert roomy.get_seq_length() == plain.get_seq_length()
        assert roomy.get_mask_sizes(1, 0) == plain.get_mask_sizes(1, 0)


def test_a_token_moves_nothing_and_the_source_stays() -> None:
    plain = read(2, 5)
    before = plain.layers[0].keys.clone()
    roomy = with_room(plain, 2)
    places = [roomy.update(*states(2, 1), 0)[0].data_ptr() for _ in range(2)]
    assert places[0] == places[1] == roomy.layers[0].keys.data_ptr()
    assert torch.equal(plain.layers[0].keys, before)


def test_more_tokens_than_room_are_refused() -> None:
    roomy = with_room(read(1, 5), 1)
    roomy.update(*states(1, 1), 0)
    with pytest.raises(ValueError, match="room for 6 tokens was given 7"):
        roomy.update(*states(1, 1), 0)


def test_a_sliding_window_is_refused() -> None:
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=4)]
    cache.update(*states(1, 3), 0)
    with pytest.raises(TypeError, match="DynamicSlidingWindowLayer"):
        with_room(cache, 1)
