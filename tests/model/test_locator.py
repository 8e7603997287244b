"""The prototype index against numpy on the concatenated data, and the features it is built from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clmoe.model.adapter import PROJECTOR
from clmoe.model.llava import LoadedBase, last_prompt_features
from clmoe.model.locator import STD_FLOOR, PrototypeIndex, base_features
from tests import support
from tests.model.adapters import attached, grow, logits

WIDTH = 5
SIZES = (7, 1, 12)


def tasks() -> list[np.ndarray]:
    """Features of three tasks, of unequal size and spread, far from zero."""
    generator = np.random.default_rng(0)
    return [
        generator.normal(3 + task, 1 + 0.5 * task, (size, WIDTH)).astype(np.float32) for task, size in enumerate(SIZES)
    ]


def index_of(data: list[np.ndarray]) -> PrototypeIndex:
    index = PrototypeIndex.empty(WIDTH)
    for features in data:
        index.append(torch.from_numpy(features))
    return index


def expected_scores(data: list[np.ndarray], queries: np.ndarray, distance: str, radius: str) -> np.ndarray:
    """One query and one task after the other, with the mean and deviation of all samples together."""
    together = np.concatenate(data).astype(np.float64)
    mean, std = together.mean(0), together.std(0)
    scores = np.zeros((len(queries), len(data)))
    for task, features in enumerate(data):
        own = (features.astype(np.float64) - mean) / std
        centre = own.mean(0)
        reach = max(np.sqrt(((own - centre) ** 2).sum(1).mean()), STD_FLOOR)
        for row, query in enumerate((queries.astype(np.float64) - mean) / std):
            far = np.linalg.norm(query - centre)
            if distance == "cosine":
                far = 1 - query @ centre / np.linalg.norm(query) / np.linalg.norm(centre)
            scores[row, task] = far / reach if radius == "normalised" else far
    return scores


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("radius", ["none", "normalised"])
def test_scores_equal_the_closed_form(distance: str, radius: str) -> None:
    data = tasks()
    queries = np.random.default_rng(1).normal(4, 2, (9, WIDTH)).astype(np.float32)
    index = index_of(data)
    scores = index.scores(torch.from_numpy(queries), distance, radius)  # type: ignore[arg-type]
    expected = expected_scores(data, queries, distance, radius)
    assert scores.dtype == torch.float64
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-9)
    assert scores.argmin(1).tolist() == expected.argmin(1).tolist()


def test_pooled_moments_are_those_of_the_concatenated_samples() -> None:
    data = tasks()
    mean, std = index_of(data).standardisation()
    together = np.concatenate(data).astype(np.float64)
    np.testing.assert_allclose(mean.numpy(), together.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std.numpy(), together.std(0), rtol=1e-12)


def test_own_samples_of_separate_tasks_are_located() -> None:
    generator = np.random.default_rng(2)
    data = [generator.normal(10 * task, 1, (20, WIDTH)).astype(np.float32) for task in range(3)]
    for task, features in enumerate(data):
        assert index_of(data).scores(torch.from_numpy(features)).argmin(1).tolist() == [task] * 20


def test_ties_go_to_the_older_task_and_constant_features_stay_finite() -> None:
    same = np.ones((4, WIDTH), dtype=np.float32)
    index = index_of([same, same])
    for distance in ("euclidean", "cosine"):
        for radius in ("none", "normalised"):
            scores = index.scores(torch.from_numpy(same), distance, radius)  # type: ignore[arg-type]
            assert scores.isfinite().all()
            assert (-scores).argmax(1).tolist() == [0] * 4


def test_a_decision_does_not_depend_on_the_batch() -> None:
    index, queries = index_of(tasks()), torch.randn(8, WIDTH) * 3
    alone = torch.cat([index.scores(query.unsqueeze(0)) for query in queries])
    assert torch.equal(index.scores(queries), alone)


def test_the_file_holds_every_bit(tmp_path: Path) -> None:
    index = index_of(tasks())
    index.save(tmp_path / "locator.safetensors")
    read = PrototypeIndex.load(tmp_path / "locator.safetensors")
    for name in ("mean", "variance", "count"):
        assert torch.equal(getattr(read, name), getattr(index, name))
    read.append(torch.randn(3, WIDTH))
    assert read.count.tolist() == [*SIZES, 3] and read.mean.shape == (4, WIDTH)


def test_base_features_ignore_the_adapter_and_a_tuned_projector(
    tiny_base: LoadedBase, pristine_base: LoadedBase, batch: dict[str, Tensor]
) -> None:
    expected = last_prompt_features(pristine_base.model, batch)
    model = attached(tiny_base, modules_to_save=[PROJECTOR])
    grow(model)
    adapted = logits(model, batch)
    features = base_features(model, batch)
    assert torch.equal(features, expected)
    assert features.dtype == torch.float32 and features.shape == (3, support.SIZES.text_hidden)
    assert torch.equal(logits(model, batch), adapted)  # adapter and projector are on again
