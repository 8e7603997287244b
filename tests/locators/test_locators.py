"""Locators that look at features, against numpy on the concatenated data, and locators that do not look at features."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from clmoe.config import LocatorConfig, load_config
from clmoe.errors import ClmoeError
from clmoe.locators import LOCATORS, make_locator
from clmoe.locators.base import Asked, Locator
from clmoe.locators.prototype import STD_FLOOR, NearestMean, Prototype

WIDTH = 5
SIZES = (7, 1, 12)


def tasks() -> list[np.ndarray]:
    """Features of three tasks of unequal size and spread, far from zero."""
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
    """Oracle: one query and one task at a time, with the mean and deviation of all samples together."""
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


# ---- Gaussian, nearest neighbours, centroids


def fitted(name: str, data: list[np.ndarray], folder: Path | None = None, **options: object) -> Locator:
    """A locator fitted on these tasks; given a folder, it is saved after the second and read again before the third."""
    made = make_locator(LocatorConfig(name, options=options), 0)
    for number, features in enumerate(data):
        if folder is not None and number == 2:
            made.save(folder / "locator.safetensors")
            made = make_locator(LocatorConfig(name, options=options), 0)
            made.load(folder / "locator.safetensors")
        made.fit(torch.from_numpy(features))
    return made


CONSTANT = WIDTH / 2 * np.log(2 * np.pi)  # the constant in all log densities


def queries(width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(3).normal(4, 2, (9, width)).astype(np.float32)


def scored(locator: Locator, asked: np.ndarray) -> np.ndarray:
    return locator.scores(Asked([""] * len(asked), 3, torch.from_numpy(asked))).numpy()


@pytest.mark.parametrize(("covariance", "decision"), [("shared", "density"), ("own", "density"), ("own", "z_score")])
def test_a_gaussian_gives_scipys_log_densities(covariance: str, decision: str, tmp_path: Path) -> None:
    """The second task has a single sample, so its own covariance is only the floor, and it has no deviation."""
    data, asked = tasks(), queries()
    own = [np.zeros((WIDTH, WIDTH)) for _ in data]
    for task in (0, 2):
        own[task] = LedoitWolf().fit(data[task].astype(np.float64)).covariance_
    shared = sum(size * each for size, each in zip(SIZES, own, strict=True)) / sum(SIZES)
    used = [(shared if covariance == "shared" else each) + 1e-6 * np.eye(WIDTH) for each in own]
    expected = []
    for features, each in zip(data, used, strict=True):
        gaussian = multivariate_normal(features.astype(np.float64).mean(0), each)
        scores, typical = gaussian.logpdf(asked.astype(np.float64)), gaussian.logpdf(features.astype(np.float64))
        mean, deviation = (typical.mean(), max(typical.std(), 1e-6)) if decision == "z_score" else (-CONSTANT, 1.0)
        expected.append((scores - mean) / deviation)
    scores = scored(fitted("gaussian", data, tmp_path, covariance=covariance, decision=decision), asked)
    np.testing.assert_allclose(scores, np.stack(expected, 1), rtol=1e-7)


def test_a_shared_covariance_has_no_typical_density() -> None:
    with pytest.raises(ClmoeError, match="z_score needs"):
        fitted("gaussian", tasks(), decision="z_score")


@pytest.mark.parametrize(("neighbours", "stored"), [(4, 500), (100, 5)])
def test_neighbours_vote_as_in_scikit_learn(neighbours: int, stored: int, tmp_path: Path) -> None:
    data, asked = tasks(), queries()
    kept = [features[:stored].astype(np.float64) for features in data]
    owners = np.repeat(np.arange(3), [len(features) for features in kept])
    oracle = KNeighborsClassifier(min(neighbours, len(owners)), weights="distance").fit(np.concatenate(kept), owners)
    found = scored(fitted("knn", data, tmp_path, neighbours=neighbours, stored=stored), asked)
    np.testing.assert_allclose(found, oracle.predict_proba(asked.astype(np.float64)), rtol=1e-9)
    again = scored(fitted("knn", data, neighbours=neighbours, stored=stored), data[2][:1])
    assert again.argmax() == 2 and np.isfinite(again).all(), "a stored sample that is asked again"


@pytest.mark.parametrize(("name", "parts"), [("text_centroid", 1), ("image_text_centroid", 2)])
def test_centroids_are_compared_by_their_cosines(name: str, parts: int, tmp_path: Path) -> None:
    """A row without an image has zeros in the first half of its feature, which adds nothing to the score."""
    data, asked = [np.hstack([features] * parts)[:, ::-1].copy() for features in tasks()], queries(WIDTH * parts)
    asked[0, :WIDTH] *= parts == 1
    expected = np.zeros((9, 3))
    for row, query in enumerate(asked.astype(np.float64)):
        for task, features in enumerate(data):
            centre = features.astype(np.float64).mean(0)
            for half in np.split(np.arange(WIDTH * parts), parts):
                norms = np.linalg.norm(query[half]) * np.linalg.norm(centre[half])
                expected[row, task] += query[half] @ centre[half] / norms / parts if norms else 0
    np.testing.assert_allclose(scored(fitted(name, data, tmp_path), asked), expected, rtol=1e-9)


def test_the_size_counts_what_is_stored() -> None:
    assert fitted("text_centroid", tasks()).size() == (3 * WIDTH, 8 * 3 * WIDTH)
    assert fitted("knn", tasks()).size() == (sum(SIZES) * (WIDTH + 1), sum(SIZES) * (4 * WIDTH + 8))
    assert fitted("oracle", tasks()).size() == (0, 0)


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
