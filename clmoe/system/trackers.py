"""Training curves in TensorBoard and Weights & Biases, through accelerate's trackers, besides ``events.jsonl``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clmoe.errors import ClmoeError
from clmoe.utils.processes import is_main

Track = Callable[[dict[str, float], int], None]


def check_trackers(names: Sequence[str]) -> None:
    """What is asked for is installed.

    Raises:
        ClmoeError: a package is missing.
    """
    for name in names:
        if find_spec(name) is None:
            raise ClmoeError(f"training.trackers: {name} is not installed; pip install 'clmoe[train]'")


@contextmanager
def tracking(names: Sequence[str], run: Path, title: str) -> Iterator[Track]:
    """A function that is given values and their step; it does nothing without names, or outside the main process.

    Args:
        run: the run folder; TensorBoard's and wandb's own files lie in it. wandb groups by its name, and follows its
            environment variables (``WANDB_MODE=offline``).
        title: of the curves: the task and the phase.
    """
    if not names or not is_main():
        yield lambda values, step: None
        return
    trackers: list[Any] = []

    def track(values: dict[str, float], step: int) -> None:
        if not trackers:  # not before the training has told accelerate how many processes there are
            trackers.extend(_open(name, run, title) for name in names)
        for tracker in trackers:
            tracker.log(values, step=step)

    try:
        yield track
    finally:
        for tracker in trackers:
            tracker.finish()


def _open(name: str, run: Path, title: str) -> Any:
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    if name == "tensorboard":
        tracker: Any = TensorBoardTracker(title, run / "tensorboard")
    else:
        run.mkdir(parents=True, exist_ok=True)
        tracker = WandBTracker("clmoe", name=f"{run.name}/{title}", group=run.name, dir=str(run))
    tracker.start()
    return tracker
