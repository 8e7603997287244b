"""The sample order is a pure function, complete in every epoch, and the same however the global batch is cut."""

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from clmoe.config import TrainingConfig
from clmoe.data.batches import epoch_permutation
from clmoe.errors import ClmoeError
from clmoe.train.loop import PROJECTOR, BatchPlan, MicroBatches, Snapshots, parameter_groups, total_steps


@pytest.mark.parametrize(("records", "batch_size"), [(24, 8), (25, 8), (7, 8), (3, 8), (13, 1)])
def test_every_record_comes_once_per_epoch(records: int, batch_size: int) -> None:
    plan = BatchPlan(seed=5, records=records, batch_size=batch_size)
    steps = math.ceil(3 * records / batch_size)
    stream = [index for step in range(steps) for index in plan.batch(step)]
    assert len(stream) == steps * batch_size, "every batch is full: nothing is dropped at an epoch's end"
    for epoch in range(3):
        assert sorted(stream[epoch * records : (epoch + 1) * records]) == list(range(records))
    assert all(set(plan.rows(n)) == set(stream[: n * batch_size]) for n in range(1, steps))


def test_order_depends_on_seed_and_epoch_only() -> None:
    plan, again = BatchPlan(1, 30, 6), BatchPlan(1, 30, 6)
    assert plan.batch(7) == again.batch(7), "a step can be computed without the steps before it"
    epochs = [[i for step in range(5 * e, 5 * e + 5) for i in plan.batch(step)] for e in range(3)]
    assert all(a != b for a, b in pairwise(epochs)), "each epoch is shuffled anew"
    assert BatchPlan(2, 30, 6).batch(0) != plan.batch(0)
    assert epochs[1] == epoch_permutation(1, 1, 30).tolist()


@pytest.mark.parametrize(("processes", "micro"), [(1, 8), (1, 2), (1, 1), (2, 4), (2, 2), (4, 1), (8, None), (1, None)])
def test_micro_batches_of_all_processes_are_the_global_batch(processes: int, micro: int | None) -> None:
    plan = BatchPlan(3, 21, 8, micro, processes)
    loaders = [list(MicroBatches(plan, 5, rank=rank)) for rank in range(processes)]
    for loader in loaders:
        assert len(loader) == 5 * plan.accumulation
        assert {len(batch) for batch in loader} == {plan.micro}
    for step in range(5):
        steps = slice(step * plan.accumulation, (step + 1) * plan.accumulation)
        seen = [index for loader in loaders for batch in loader[steps] for index in batch]
        assert sorted(seen) == sorted(BatchPlan(3, 21, 8).batch(step))


@pytest.mark.parametrize(("micro", "processes"), [(3, 1), (8, 2), (None, 3), (16, 1)])
def test_an_indivisible_batch_is_an_error(micro: int | None, processes: int) -> None:
    with pytest.raises(ClmoeError, match="batch_size 8 cannot be cut"):
        BatchPlan(0, 100, 8, micro, processes)


def test_what_is_random_differs_by_seed_phase_step_and_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws its masks from the generator, whose state as a step begins depends on all of these."""

    def drawn(seed: int = 3, phase: str = "trained", step: int = 2, rank: str = "0") -> tuple[float, ...]:
        monkeypatch.setenv("RANK", rank)
        trainer = SimpleNamespace(plan=BatchPlan(seed, 8, 8), phase=Path(phase))
        Snapshots(trainer).on_step_begin(None, TrainerState(global_step=step), None)  # type: ignore[arg-type]
        return tuple(torch.rand(4).tolist())

    masks = [drawn(), drawn(seed=4), drawn(phase="probe"), drawn(step=3), drawn(rank="1")]
    assert len(set(masks)) == 5
    assert drawn() == masks[0]


def test_the_projectors_learning_rate_reaches_its_group_and_no_other() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in (PROJECTOR, "experts", "frozen")})
    model["frozen"].requires_grad_(False)
    groups = {group["lr"]: group["params"] for group in parameter_groups(model, 0.1, 0.02)}
    assert {rate: list(map(id, p)) for rate, p in groups.items()} == {
        rate: list(map(id, model[name].parameters())) for rate, name in ((0.1, "experts"), (0.02, PROJECTOR))
    }


def test_total_steps() -> None:
    for records, epochs, passes, steps in ((100, 1.0, 1, 13), (96, 1.0, 1, 12), (100, 0.5, 1, 7), (3, 1.0, 1, 1)):
        assert total_steps(TrainingConfig(batch_size=8, epochs=epochs), records, passes) == steps
    assert total_steps(TrainingConfig(batch_size=8, epochs=0.5), 100, passes=3) == 19
    assert total_steps(TrainingConfig(steps=20, epochs=3.0), 100, passes=2, tasks=3) == 60
