"""Momentum consolidation as pure functions, against closed forms and dense algebra."""

import numpy as np
import pytest
import torch
from torch import Tensor

from clmoe.methods.clmoe import consolidate, factorise, keep_weights, mix, salient_experts
from tests.runs import same_bits

Factors = tuple[Tensor, Tensor]
E, R, DIN, DOUT = 4, 3, 11, 7


def draw(seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(E * R, DIN, generator=generator), torch.randn(DOUT, E * R, generator=generator)


def product(factors: Factors, expert: int) -> np.ndarray:
    A, B = (tensor.double().numpy() for tensor in factors)
    rows = slice(expert * R, (expert + 1) * R)
    return B[:, rows] @ A[rows]


def test_salient_experts_are_the_largest_and_ties_go_to_the_lower_index() -> None:
    assert salient_experts(torch.tensor([0.1, 0.4, 0.2, 0.3]), 2) == {1, 3}
    assert salient_experts(torch.tensor([0.25, 0.25, 0.25, 0.25]), 2) == {0, 1}
    assert salient_experts(torch.tensor([0.1, 0.3, 0.3, 0.3]), 2) == {1, 2}
    assert salient_experts(torch.tensor([5, 9, 9], dtype=torch.int64), 1) == {1}
    assert salient_experts(torch.tensor([0.6, 0.4]), 5) == {0, 1}


def test_only_experts_salient_now_and_not_before_are_task_specific() -> None:
    keep = keep_weights(now={0, 1}, before={1, 2}, experts=4, gamma=0.7)
    assert keep.dtype == torch.float64
    # 0: specific; 1: shared; 2: salient before only; 3: never
    assert keep.tolist() == [1 - 0.7, 0.7, 0.7, 0.7]


def test_gamma_one_keeps_every_non_specific_expert_bit_for_bit() -> None:
    old, new = draw(0), draw(1)
    old[0][0, :4] = torch.tensor([-0.0, 0.0, 1e-42, -3.0e38])
    new[0][0, :4] = torch.tensor([5.0, -0.0, 1.0, 3.0e38])
    keep = keep_weights(now={1, 2}, before={2}, experts=E, gamma=1.0)
    for space in ("factors", "delta"):
        A, B = consolidate(old, new, keep, space)
        for expert in range(E):
            rows = slice(expert * R, (expert + 1) * R)
            source = new if expert == 1 else old
            assert same_bits(A[rows], source[0][rows]), (space, expert)
            assert same_bits(B[:, rows].contiguous(), source[1][:, rows].contiguous()), (space, expert)


def test_mix_copies_the_sign_of_zero_from_the_side_it_keeps() -> None:
    old, new = torch.tensor([-0.0, 0.0, -0.0]), torch.tensor([0.0, -0.0, 7.0])
    assert same_bits(mix(old, new, torch.tensor(1.0, dtype=torch.float64)), old)
    assert same_bits(mix(old, new, torch.tensor(0.0, dtype=torch.float64)), new)


def test_gamma_half_is_the_plain_mean_for_every_expert() -> None:
    old, new = draw(2), draw(3)
    keep = keep_weights(now={0, 1}, before={1}, experts=E, gamma=0.5)
    A, B = consolidate(old, new, keep, "factors")
    for mixed, a, b in ((A, old[0], new[0]), (B, old[1], new[1])):
        assert same_bits(mixed, ((a.double() + b.double()) / 2).float())


def test_factors_follow_the_closed_form_in_float64() -> None:
    old, new = draw(4), draw(5)
    keep = keep_weights(now={0, 3}, before={3}, experts=E, gamma=0.7)
    A, B = consolidate(old, new, keep, "factors")
    for expert in range(E):
        weight = np.float64(1 - 0.7 if expert == 0 else 0.7)
        for rank in range(expert * R, (expert + 1) * R):
            row = weight * old[0][rank].numpy().astype(np.float64) + (1 - weight) * new[0][rank].numpy()
            column = weight * old[1][:, rank].numpy().astype(np.float64) + (1 - weight) * new[1][:, rank].numpy()
            assert A[rank].numpy().tobytes() == row.astype(np.float32).tobytes()
            assert B[:, rank].contiguous().numpy().tobytes() == column.astype(np.float32).tobytes()


def test_one_rounding_only() -> None:
    """Mixing in float32 would round twice: 0.7 * old is not representable."""
    old, new = torch.randn(500), torch.randn(500)
    keep = torch.tensor(0.7, dtype=torch.float64)
    exact = 0.7 * old.double() + (1 - 0.7) * new.double()
    assert (mix(old, new, keep).double() - exact).abs().max() <= np.spacing(np.float32(exact.abs().max())) / 2


def best_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(matrix)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def test_delta_is_the_best_rank_r_approximation_of_the_mixed_product() -> None:
    old, new = draw(6), draw(7)
    keep = keep_weights(now={0, 1}, before={1}, experts=E, gamma=0.7)
    merged = consolidate(old, new, keep, "delta")
    for expert in range(E):
        weight = float(keep[expert])
        mixed = weight * product(old, expert) + (1 - weight) * product(new, expert)
        np.testing.assert_allclose(product(merged, expert), best_rank(mixed, R), atol=2e-5)
    factors = consolidate(old, new, keep, "factors")
    assert np.abs(product(factors, 1) - product(merged, 1)).max() > 1e-2, "the two spaces differ in general"


def test_delta_of_equal_weights_returns_the_same_product() -> None:
    same = draw(8)
    merged = consolidate(same, same, torch.full((E,), 0.7, dtype=torch.float64), "delta")
    for expert in range(E):
        np.testing.assert_allclose(product(merged, expert), product(same, expert), atol=1e-5)


def test_factorise_fixes_signs_and_shares_the_spectrum() -> None:
    left, right = draw(9)[1].double(), draw(9)[0].double()
    A, B = factorise(left, right, R)
    flipped_A, flipped_B = factorise(-left, -right, R)
    torch.testing.assert_close(A, flipped_A)
    torch.testing.assert_close(B, flipped_B)
    for column in B.t():
        assert column[column.abs().argmax()] > 0
    singular = np.linalg.svd((left @ right).numpy(), compute_uv=False)[:R]
    np.testing.assert_allclose((A @ A.t()).numpy(), np.diag(singular), atol=1e-9)
    np.testing.assert_allclose((B.t() @ B).numpy(), np.diag(singular), atol=1e-9)


@pytest.mark.parametrize("space", ["factors", "delta"])
def test_inputs_are_left_alone_and_the_dtype_stays(space: str) -> None:
    old, new = draw(10), draw(11)
    before = [tensor.clone() for tensor in (*old, *new)]
    A, B = consolidate(old, new, torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64), space)  # type: ignore[arg-type]
    assert A.dtype == B.dtype == torch.float32
    assert all(same_bits(a, b) for a, b in zip(before, (*old, *new), strict=True))
