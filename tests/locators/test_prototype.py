"""The locators that look at means, against numpy on the concatenated data; and the features they look at."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clmoe.config import LocatorConfig
from clmoe.locators.base import Asked
from clmoe.locators.prototype import STD_FLOOR, NearestMean, Prototype

WIDTH = 5
SIZES = (7, 1, 12)


def tasks() -> list[np.ndarray]:
    """Features of three tasks, of unequal size and spread, far from zero."""
    generator = np.random.default_rng(0)
    return [
        generator.normal(3 + task, 1 + 0.5 * task, (size, WIDTH)).astype(np.float32) for task, size in enumerate(SIZES)
    ]


def index_of(data: list[np.ndarray], distance: str = "euclidean", radius: str = "none") -> Prototype:
    index = Prototype(LocatorConfig("prototype", options={"distance": distance, "radius": radius}), seed=0)
    for features in data:
        index.fit(torch.from_numpy(features))
    return index


def distances(index: Prototype | NearestMean, features: Tensor, tasks: int = 3) -> Tensor:
    return -index.scores(Asked([""] * len(features), tasks, features))


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
    scores = distances(index_of(data, distance, radius), torch.from_numpy(queries))
    expected = expected_scores(data, queries, distance, radius)
    assert scores.dtype == torch.float64
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-9)
    assert scores.argmin(1).tolist() == expected.argmin(1).tolist()


def test_ties_go_to_the_older_task_and_constant_features_stay_finite() -> None:
    same = np.ones((4, WIDTH), dtype=np.float32)
    for distance in ("euclidean", "cosine"):
        for radius in ("none", "normalised"):
            scores = distances(index_of([same, same], distance, radius), torch.from_numpy(same), 2)
            assert scores.isfinite().all()
            assert (-scores).argmax(1).tolist() == [0] * 4


def test_the_file_holds_every_bit(tmp_path: Path) -> None:
    index = index_of(tasks())
    index.save(tmp_path / "locator.safetensors")
    read = index_of([])
    read.load(tmp_path / "locator.safetensors")
    for name in ("mean", "variance", "count"):
        assert torch.equal(getattr(read, name), getattr(index, name))
    read.fit(torch.randn(3, WIDTH))
    assert read.count.tolist() == [*SIZES, 3] and read.mean.shape == (4, WIDTH)


def test_nearest_mean_is_the_distance_to_each_plain_mean(tmp_path: Path) -> None:
    data = tasks()
    index = NearestMean(LocatorConfig("nearest_mean"), seed=0)
    for features in data:
        index.fit(torch.from_numpy(features))
    queries = np.random.default_rng(3).normal(4, 2, (9, WIDTH)).astype(np.float32)
    expected = [[np.linalg.norm(q.astype(np.float64) - d.astype(np.float64).mean(0)) for d in data] for q in queries]
    np.testing.assert_allclose(distances(index, torch.from_numpy(queries)).numpy(), expected, rtol=1e-9)
    index.save(tmp_path / "locator.safetensors")
    read = NearestMean(LocatorConfig("nearest_mean"), seed=0)
    read.load(tmp_path / "locator.safetensors")
    assert torch.equal(distances(read, torch.from_numpy(queries)), distances(index, torch.from_numpy(queries)))
