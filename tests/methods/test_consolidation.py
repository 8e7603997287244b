"""CL-MoE's gate statistics and momentum consolidation as pure functions, against loops and dense algebra."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from clmoe.methods.clmoe import (
    consolidate_delta,
    consolidate_factors,
    count_gates,
    factorise,
    keep_weights,
    load_statistics,
    salient_experts,
    save_statistics,
)
from tests.runs import same_bits

Factors = tuple[Tensor, Tensor]
E, R, DIN, DOUT = 4, 3, 11, 7
SPACES = (consolidate_factors, consolidate_delta)


def draw(seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(E * R, DIN, generator=generator), torch.randn(DOUT, E * R, generator=generator)


def product(factors: Factors, expert: int) -> np.ndarray:
    A, B = (tensor.double().numpy() for tensor in factors)
    rows = slice(expert * R, (expert + 1) * R)
    return B[:, rows] @ A[rows]


# ---- Statistics


@pytest.mark.parametrize("top_k", [1, 2])
def test_counts_equal_a_loop_over_real_tokens(top_k: int) -> None:
    """One token after the other; ties go to the lower index, and padding would favour expert 3."""
    generator = torch.Generator().manual_seed(0)
    gate = torch.randn(6, 9, E, generator=generator).softmax(-1)
    gate[0] = torch.tensor([0.1, 0.4, 0.1, 0.4])
    mask = (torch.arange(9) < torch.randint(1, 10, (6, 1), generator=generator)).long()
    gate[mask == 0] = one_hot(torch.tensor(3), E).float()
    total, picks = np.zeros(E), np.zeros(E, dtype=np.int64)
    for values in gate[mask.bool()].double().numpy():
        total += values
        for expert in sorted(range(E), key=lambda i: (-values[i], i))[:top_k]:
            picks[expert] += 1
    found = count_gates(gate, mask, top_k)
    np.testing.assert_allclose(found[0].numpy(), total, rtol=1e-12)
    assert found[1].tolist() == picks.tolist() and int(found[2]) == int(mask.sum())
    assert [part.dtype for part in found] == [torch.float64, torch.int64, torch.int64]


def statistics(task: int) -> dict[str, dict[str, Tensor]]:
    """Values that tell the task; names with dots, as modules have them."""
    return {
        f"model.layers.{block}.mlp.up_proj": {
            "gate_mean": torch.tensor([task, block], dtype=torch.float64),
            "topk_counts": torch.tensor([task, 10 * block]),
            "tokens": torch.tensor(100 + task),
        }
        for block in (0, 1, 10)
    }


def test_history_keeps_its_order_beyond_ten_tasks(tmp_path: Path) -> None:
    previous = None
    for task in range(12):
        folder = tmp_path / f"{task:02}"
        folder.mkdir()
        assert len(save_statistics(previous, folder / "statistics.safetensors", statistics(task))) == task + 1
        previous = folder
    for task, loaded in enumerate(load_statistics(tmp_path / "11" / "statistics.safetensors")):
        expected = statistics(task)
        assert loaded.keys() == expected.keys()
        for name, values in expected.items():
            assert loaded[name].keys() == values.keys()
            assert all(same_bits(loaded[name][kind], value) for kind, value in values.items()), (task, name)


# ---- Salience


@pytest.mark.parametrize(
    ("scores", "top_k", "expected"),
    [
        ([0.1, 0.4, 0.2, 0.3], 2, {1, 3}),
        ([0.25] * 4, 2, {0, 1}),
        ([0.1, 0.3, 0.3, 0.3], 2, {1, 2}),
        ([0.25] * 64, 2, {0, 1}),
        ([0.6, 0.4], 5, {0, 1}),
    ],
)
def test_salient_experts_are_the_largest_and_ties_go_to_the_lower_index(
    scores: list[float], top_k: int, expected: set[int]
) -> None:
    assert salient_experts(torch.tensor(scores, dtype=torch.float64), top_k) == expected


def test_only_experts_salient_now_and_not_before_are_task_specific() -> None:
    """0: specific; 1: shared; 2: salient before only; 3: never."""
    keep = keep_weights(now={0, 1}, before={1, 2}, experts=4, gamma=0.7)
    assert keep.dtype == torch.float64 and keep.tolist() == [1 - 0.7, 0.7, 0.7, 0.7]


# ---- Consolidation


@pytest.mark.parametrize("consolidate", SPACES)
def test_gamma_one_keeps_every_non_specific_expert_bit_for_bit(consolidate: Callable[..., Factors]) -> None:
    """Signs of zero included, and what is given stays as it was."""
    old, new = draw(0), draw(1)
    old[0][0, :4] = torch.tensor([-0.0, 0.0, 1e-42, -3.0e38])
    new[0][0, :4] = torch.tensor([5.0, -0.0, 1.0, 3.0e38])
    given = [tensor.clone() for tensor in (*old, *new)]
    A, B = consolidate(old, new, keep_weights(now={1, 2}, before={2}, experts=E, gamma=1.0))
    for expert in range(E):
        rows, source = slice(expert * R, (expert + 1) * R), new if expert == 1 else old
        assert same_bits(A[rows], source[0][rows])
        assert same_bits(B[:, rows].contiguous(), source[1][:, rows].contiguous())
    assert all(same_bits(a, b) for a, b in zip(given, (*old, *new), strict=True))


@pytest.mark.parametrize("gamma", [0.5, 0.7])
def test_factors_follow_the_closed_form_in_float64(gamma: float) -> None:
    old, new = draw(4), draw(5)
    A, B = consolidate_factors(old, new, keep_weights(now={0, 3}, before={3}, experts=E, gamma=gamma))
    for expert in range(E):
        weight = np.float64(1 - gamma if expert == 0 else gamma)
        for rank in range(expert * R, (expert + 1) * R):
            row = weight * old[0][rank].numpy().astype(np.float64) + (1 - weight) * new[0][rank].numpy()
            column = weight * old[1][:, rank].numpy().astype(np.float64) + (1 - weight) * new[1][:, rank].numpy()
            assert A[rank].numpy().tobytes() == row.astype(np.float32).tobytes()
            assert B[:, rank].contiguous().numpy().tobytes() == column.astype(np.float32).tobytes()


@pytest.mark.parametrize("seeds", [(6, 7), (8, 8)])
def test_delta_is_the_best_rank_r_approximation_of_the_mixed_product(seeds: tuple[int, int]) -> None:
    """Of equal products it is the product itself."""
    old, new = (draw(seed) for seed in seeds)
    keep = keep_weights(now={0, 1}, before={1}, experts=E, gamma=0.7)
    merged = consolidate_delta(old, new, keep)
    assert {tensor.dtype for tensor in merged} == {torch.float32}
    for expert, weight in enumerate(keep.tolist()):
        U, S, Vh = np.linalg.svd(weight * product(old, expert) + (1 - weight) * product(new, expert))
        np.testing.assert_allclose(product(merged, expert), U[:, :R] * S[:R] @ Vh[:R], atol=2e-5)
    apart = np.abs(product(consolidate_factors(old, new, keep), 1) - product(merged, 1)).max() > 1e-2
    assert apart == (seeds[0] != seeds[1]), "the two spaces differ in general"


def test_factorise_fixes_signs_and_shares_the_spectrum() -> None:
    left, right = draw(9)[1].double(), draw(9)[0].double()
    A, B = factorise(left, right, R)
    torch.testing.assert_close((A, B), factorise(-left, -right, R))
    for column in B.t():
        assert column[column.abs().argmax()] > 0
    singular = np.linalg.svd((left @ right).numpy(), compute_uv=False)[:R]
    np.testing.assert_allclose((A @ A.t()).numpy(), np.diag(singular), atol=1e-9)
    np.testing.assert_allclose((B.t() @ B).numpy(), np.diag(singular), atol=1e-9)
