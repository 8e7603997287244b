"""``same_bits`` compares tensors by their bytes; the oracle is the bytes that NumPy writes."""

import itertools

import pytest
import torch
from torch import Tensor

from clmoe.utils.tensors import same_bits

NUMBERS = torch.tensor([[0.0, 1.5], [-2.0, 3.25]])
TENSORS = [
    NUMBERS, NUMBERS.clone(), NUMBERS.t().contiguous().t(), -NUMBERS, torch.tensor([[-0.0, 1.5], [-2.0, 3.25]]),
    NUMBERS.flatten(), NUMBERS.double(), NUMBERS.view(torch.int32), torch.tensor(0.0), torch.tensor(-0.0),
    torch.zeros(0),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(TENSORS, 2)))
def test_same_bits_are_equal_shape_dtype_and_bytes(a: Tensor, b: Tensor) -> None:
    expected = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    assert same_bits(a, b) is same_bits(b, a) is expected
