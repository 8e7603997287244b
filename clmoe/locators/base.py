"""A locator names the task of a test sample."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from clmoe.config import LocatorConfig, NoOptions, View, build
from clmoe.errors import ClmoeError
from clmoe.utils.tensors import load_tensors, metadata, save_tensors

FILE = "locator.safetensors"  # a checkpoint's locator


@dataclass(frozen=True)
class Asked:
    """M samples whose task, one of ``tasks``, is wanted; ``task``, counted from 0, is the true one if it is known.

    ``features [M, D]`` float32 on the CPU are None for locators that do not look. ``prototypes [N, F]`` are those that
    the method has learned, see ``clmoe.methods.base.Method.prototypes``.
    """

    ids: Sequence[str]
    tasks: int
    features: Tensor | None = None
    task: int | None = None
    prototypes: Tensor | None = None


class Locator:
    """Finds the task of a test sample.

    Class attributes:
        looks: it needs features of the samples.
        learned: it compares them with the method's own prototypes; there is nothing to fit.
        asks: its features are instead the logits ``[M, N]`` that the model itself gives the tasks' letters, see
            ``clmoe.methods.base.Method.letters``; there is nothing to fit.
        view: what in a sample its features describe; ``image_text`` gives ``[M, 2 D]``, the image's half first.
        decisive: the options that a fitted state depends on; they cannot change within a sequence.
    """

    looks: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    asks: ClassVar[bool] = False
    view: ClassVar[View] = "prompt"
    Options: ClassVar[type] = NoOptions
    decisive: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: LocatorConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.options: Any = build(self.Options, config.options, "locator.options")

    @property
    def fits(self) -> bool:
        """Whether it must be fitted, with features of each task's training samples."""
        return self.looks and not self.learned

    def fit(self, features: Tensor) -> None:
        """Add the next task from features ``[M, D]`` float32 of its training samples; older tasks do not change."""

    def scores(self, asked: Asked) -> Tensor:
        """How typical each sample is of each task, ``[M, N]`` float64 on the CPU; the largest wins, then the older."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Everything that ``fit`` has learned."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""

    def size(self) -> tuple[int, int]:
        """(numbers, bytes) of the state."""
        state = self.state().values()
        return sum(tensor.numel() for tensor in state), sum(tensor.nbytes for tensor in state)

    def save(self, path: Path) -> None:
        """Write the state and the settings that it depends on."""
        save_tensors(self.state(), path, metadata={"settings": json.dumps(self._settings())})

    def load(self, path: Path) -> None:
        """Read what ``save`` wrote. Raises ClmoeError, naming the setting, if it was fitted with another value."""
        stored, settings = json.loads(metadata(path).get("settings", "{}")), self._settings()
        for name in settings | stored:
            was = stored.get(name)
            if was != (value := settings.get(name, getattr(self.options, name, was))):
                raise ClmoeError(
                    f"{path} was fitted with {name}={was}, not {value}: it cannot change within a sequence"
                )
        self.load_state(load_tensors(path))

    def _settings(self) -> dict[str, Any]:
        options = {name: getattr(self.options, name) for name in self.decisive}
        return {"locator": self.config.name, "feature": self.config.feature, **options}
