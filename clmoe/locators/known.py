"""Locators that do not look at the sample: its task is given, the newest one, or drawn."""

import hashlib

import torch
from torch import Tensor

from clmoe.errors import ClmoeError
from clmoe.locators.base import Asked, Locator


def _one_hot(tasks: list[int], number: int) -> Tensor:
    """``[M, N]`` float64 with a one at each sample's task."""
    return torch.nn.functional.one_hot(torch.tensor(tasks, dtype=torch.int64), number).double()


class Oracle(Locator):
    """The true task: what finding the task perfectly would give."""

    looks = False

    def scores(self, asked: Asked) -> Tensor:
        """One for the true task.

        Raises:
            ClmoeError: the samples' task has not been learned.
        """
        if asked.task is None or asked.task >= asked.tasks:
            raise ClmoeError(
                "locator=oracle: the questions' task is unknown to this checkpoint: name a learned task or choose "
                "another locator"
            )
        return _one_hot([asked.task] * len(asked.ids), asked.tasks)


class Last(Locator):
    """The newest task: what no locator at all would give."""

    looks = False

    def scores(self, asked: Asked) -> Tensor:
        return _one_hot([asked.tasks - 1] * len(asked.ids), asked.tasks)


class Random(Locator):
    """A task drawn from the seed and the sample's id alone, so that it does not depend on order or batching."""

    looks = False

    def scores(self, asked: Asked) -> Tensor:
        return _one_hot([self._draw(name, asked.tasks) for name in asked.ids], asked.tasks)

    def _draw(self, name: str, tasks: int) -> int:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return int.from_bytes(digest[:8], "little") % tasks
