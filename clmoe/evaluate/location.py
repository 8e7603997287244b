"""Which task's routers serve a question: found from the question, given, the newest, or drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from clmoe.errors import ClmoeError
from clmoe.model.routing import RouterChoice


def known_tasks(
    router: RouterChoice, question_ids: Sequence[str], learned: int, task_index: int | None, seed: int
) -> Tensor | None:
    """Task of each question ``[M]`` int64 where ``router`` says it without looking at the question, else None.

    Args:
        learned: number of tasks that the checkpoint has learned.
        task_index: the questions' true task, counted in training order; None if it was never trained.
        seed: of the random router.

    Raises:
        ClmoeError: the oracle is asked for a task that was never trained.
    """
    if router == "located":
        return None
    if router == "last":
        return torch.full((len(question_ids),), learned - 1)
    if router == "random":
        return torch.tensor([_draw(seed, name, learned) for name in question_ids], dtype=torch.int64)
    if task_index is None or task_index >= learned:
        raise ClmoeError("--router oracle: this checkpoint was not trained on that task; use --router located")
    return torch.full((len(question_ids),), task_index)


def _draw(seed: int, name: str, tasks: int) -> int:
    """A task drawn from the seed and the question alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") % tasks
