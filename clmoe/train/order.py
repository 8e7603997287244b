"""Sample order: a pure function of (seed, epoch, step), whatever the number of workers or processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from clmoe.data.permutation import epoch_permutation
from clmoe.errors import ClmoeError
from clmoe.utils.names import derived_seed


def total_steps(records: int, batch_size: int, epochs: float, steps: int | None) -> int:
    """Optimizer steps of a task; a partial last batch is filled from the next epoch."""
    return steps if steps is not None else max(1, -(-round(records * epochs) // batch_size))


def step_seed(seed: int, phase: str, step: int, rank: int) -> int:
    """Seed of what is random within one optimizer step (dropout), so that no generator's state has to be kept."""
    return derived_seed(seed, f"{phase}:{step}:{rank}")


@dataclass(frozen=True)
class BatchPlan:
    """How global batches are cut over accumulation steps and processes.

    Attributes:
        records: size of the training set.
        batch_size: global batch.
        micro_batch_size: samples per forward.
        processes: number of data-parallel processes.
        groups: records that stay side by side in every epoch, as far as the cuts between batches leave them together
            (``image_groups``); None orders each record by itself.
    """

    seed: int
    records: int
    batch_size: int
    micro_batch_size: int | None = None
    processes: int = 1
    groups: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.batch_size % (self.processes * self.micro):
            raise ClmoeError(
                f"training.batch_size {self.batch_size} cannot be cut into {self.processes} processes x "
                f"micro-batches of {self.micro}: change batch_size, micro_batch_size or processes"
            )

    @property
    def micro(self) -> int:
        return self.micro_batch_size or max(1, self.batch_size // self.processes)

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step."""
        return self.batch_size // (self.processes * self.micro)

    def batch(self, step: int) -> list[int]:
        """Record indices of the global batch of ``step``."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {e: self._order(e) for e in {p // self.records for p in positions}}
        return [int(orders[p // self.records][p % self.records]) for p in positions]

    def _order(self, epoch: int) -> Sequence[int]:
        """All records in the order of an epoch."""
        if self.groups is None:
            return epoch_permutation(self.seed, epoch, self.records)  # type: ignore[return-value]
        groups = self.groups
        return [record for k in epoch_permutation(self.seed, epoch, len(groups)) for record in groups[k]]


class MicroBatches:
    """The micro-batches of one process, from ``first_step`` on: a ``batch_sampler`` for torch's DataLoader."""

    def __init__(self, plan: BatchPlan, steps: int, first_step: int = 0, rank: int = 0) -> None:
        self.plan, self.steps, self.first_step, self.rank = plan, steps, first_step, rank

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.plan.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps):
            batch = self.plan.batch(step)
            for k in range(self.plan.accumulation):
                start = (k * self.plan.processes + self.rank) * self.plan.micro
                yield batch[start : start + self.plan.micro]
