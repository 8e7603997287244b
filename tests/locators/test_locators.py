"""Locators that look at means, against numpy on the concatenated data, and those that do not look."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clmoe.config import LocatorConfig, load_config
from clmoe.errors import ClmoeError
from clmoe.locators import LOCATORS, make_locator
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


# ---- Known


IDS = [f"q{i}" for i in range(40)]


def found(name: str, ids: list[str], tasks: int, task: int | None = None, seed: int = 0) -> list[int]:
    scores = make_locator(LocatorConfig(name), seed).scores(Asked(ids, tasks, task=task))
    assert scores.shape == (len(ids), tasks)
    return scores.argmax(1).tolist()


def test_last_and_oracle_do_not_look_at_the_question() -> None:
    assert found("last", IDS[:3], 4, 1) == [3] * 3
    assert found("oracle", IDS[:3], 4, 1) == [1] * 3


def test_random_does_not_depend_on_the_batch() -> None:
    together = found("random", IDS, 3, seed=3)
    assert together == [found("random", [name], 3, seed=3)[0] for name in IDS]
    assert set(together) == {0, 1, 2}
    assert found("random", IDS, 3, seed=4) != together


@pytest.mark.parametrize("task", [None, 2])
def test_the_oracle_needs_a_learned_task(task: int | None) -> None:
    with pytest.raises(ClmoeError, match="locator=oracle"):
        found("oracle", ["q"], 2, task)


@pytest.mark.parametrize("name", LOCATORS)
def test_a_setting_chooses_the_locator(name: str) -> None:
    chosen = load_config("llava_cmoe", {}, [f"locator={name}"]).locator
    assert isinstance(make_locator(chosen, 0), LOCATORS[name])


def test_the_papers_pairs_are_the_defaults() -> None:
    pairs = {"clmoe": "prototype", "llava_cmoe": "vae", "separate": "oracle", "lora": ""}
    assert {method: load_config(method, {}, []).locator.name for method in pairs} == pairs
