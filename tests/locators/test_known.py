"""Locators that do not look, and the choice of a locator by configuration."""

import pytest

from clmoe.config import LocatorConfig, load_config
from clmoe.errors import ClmoeError
from clmoe.locators import make_locator
from clmoe.locators.base import Asked

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


def test_the_papers_pairs_are_the_defaults() -> None:
    pairs = {"clmoe": "prototype", "llava_cmoe": "vae", "separate": "oracle", "lora": ""}
    assert {method: load_config(method, {}, []).locator.name for method in pairs} == pairs
