"""``adapter.budget``: every method trains as many parameters as its rank allows to come near."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clmoe.benchmarks.base import Benchmark
from clmoe.config import Config, load_config
from clmoe.errors import ClmoeError
from clmoe.methods import method_class
from clmoe.methods.base import method_names
from clmoe.methods.budget import within_budget
from clmoe.methods.plan import make_plan
from clmoe.train.checkpoint import read_checkpoint
from tests.runs import Runs
from tests.support import TASKS

TRAINED = [name for name in method_names() if method_class(name).chain != "none"]
OWN = {"llava_cmoe": ("adapter.train_projector=false",)}
BUDGET = 12_000


def count(config: Config) -> int:
    return make_plan(method_class(config.method)(config)).trainable


def with_rank(config: Config, rank: int) -> Config:
    return replace(config, adapter=replace(config.adapter, rank=rank))


@pytest.mark.parametrize("name", TRAINED)
def test_no_other_rank_comes_nearer(name: str, mini: Benchmark, runs: Runs) -> None:
    """Against all ranks that the method accepts, each attached and counted."""
    start = load_config(name, mini.recipe, [f"adapter.budget={BUDGET}", *OWN.get(name, ())], str(runs.model))
    found = within_budget(start)
    ranks = range(4, 25, 4) if start.adapter.rank_is == "total" and name in ("moelora", "clmoe") else range(1, 17)
    counts = {rank: count(with_rank(start, rank)) for rank in ranks}
    assert max(counts.values()) > BUDGET > min(counts.values()), "it lies within"
    nearest = min(abs(value - BUDGET) for value in counts.values())
    assert abs(counts[found.adapter.rank] - BUDGET) == nearest
    assert count(found) == counts[found.adapter.rank]
    assert found.adapter.alpha / found.adapter.rank == pytest.approx(start.adapter.alpha / start.adapter.rank)
    assert replace(found.adapter, rank=start.adapter.rank, alpha=start.adapter.alpha) == start.adapter


def test_methods_then_train_the_same_number(mini: Benchmark, runs: Runs) -> None:
    """Plain LoRA is matched to what MoELoRA trains: the same within half a rank, and the checkpoint says so."""
    moe = load_config("moelora", mini.recipe, [], str(runs.model))
    budget = count(moe)
    checkpoint = runs.chain("ewc", f"adapter.budget={budget}", tasks=TASKS[:1])[0]
    done = read_checkpoint(checkpoint)
    step = count(with_rank(done.config, 2)) - count(with_rank(done.config, 1))
    assert abs(done.lineage.trainable_parameters - budget) <= step / 2
    assert done.config.adapter.rank != moe.adapter.rank


def test_a_budget_below_the_smallest_rank_is_refused(mini: Benchmark, runs: Runs) -> None:
    config = load_config("clmoe", mini.recipe, ["adapter.budget=100"], str(runs.model))
    with pytest.raises(ClmoeError, match=r"adapter\.budget 100: clmoe trains \d+ parameters at the smallest rank, 4"):
        within_budget(config)


def test_without_a_budget_nothing_changes(mini: Benchmark, runs: Runs) -> None:
    config = load_config("lora", mini.recipe, [], str(runs.model))
    assert within_budget(config) is config
