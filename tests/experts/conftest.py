"""Fixtures for the tests of the model."""

import pytest
from torch import Tensor

from clmoe.bases.llava import LoadedBase
from tests import support
from tests.experts.adapters import QUESTIONS


@pytest.fixture
def batch(pristine_base: LoadedBase) -> dict[str, Tensor]:
    return support.prompt_batch(pristine_base, QUESTIONS)


@pytest.fixture
def even(pristine_base: LoadedBase) -> dict[str, Tensor]:
    """Three prompts of equal length, so that each is computed alone exactly as in the batch."""
    batch = support.prompt_batch(pristine_base, [f"How many are {word}?" for word in ("there", "left", "right")])
    assert batch["attention_mask"].all()
    return batch


@pytest.fixture
def answers(pristine_base: LoadedBase) -> dict[str, Tensor]:
    pairs = [("How many things are there?", "two"), ("On which side is it?", "left"), ("Which?", "A")]
    return support.train_batch(pristine_base, pairs)
