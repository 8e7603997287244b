"""Checkpoints of two tasks, and an answerer for the second one."""

from pathlib import Path

from clmoe.bases.llava import LoadedBase
from clmoe.evaluate.answer import Answerer, open_answerer
from clmoe.train.checkpoint import read_checkpoint
from tests.runs import Runs

SETTINGS = {"llava_cmoe": ("adapter.train_projector=false", "options.probe_min_steps=2", "locator.options.steps=20")}


def checkpoints(runs: Runs, method: str) -> list[Path]:
    """One checkpoint after each task; they are shared, so they must not be changed."""
    return runs.chain(method, *SETTINGS.get(method, ()))


def opened(runs: Runs, base: LoadedBase, method: str) -> Answerer:
    """An answerer for the second checkpoint, on ``base``."""
    done = read_checkpoint(checkpoints(runs, method)[1])
    return open_answerer(done.config, done, base)
