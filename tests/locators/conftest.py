"""Fixtures for the tests of the model."""

import pytest
from torch import Tensor

from clmoe.bases.llava import LoadedBase
from tests import support
from tests.experts.adapters import QUESTIONS


@pytest.fixture
def batch(pristine_base: LoadedBase) -> dict[str, Tensor]:
    return support.prompt_batch(pristine_base, QUESTIONS)
