"""A locator names the task of a test sample; and the frozen base's features that it looks at."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor

from clmoe.bases.inputs import image_order, prompt_dataset, prompt_inputs
from clmoe.bases.llava import LoadedBase
from clmoe.config import Config, FeatureKind, LocatorConfig, NoOptions, build
from clmoe.data.batches import first_questions, sample_records
from clmoe.data.records import Question, TrainRecord
from clmoe.errors import ClmoeError
from clmoe.experts.forward import base_features
from clmoe.utils.files import file_sha256, json_sha256
from clmoe.utils.processes import from_main, in_order, is_main
from clmoe.utils.tensors import load_tensors, metadata, replace_tensors, save_tensors

FILE = "locator.safetensors"  # a checkpoint's locator


@dataclass(frozen=True)
class Asked:
    """M samples whose task, one of ``tasks``, is wanted; their true one is ``task``, from 0, where it is known.

    ``features [M, D]`` float32 on the CPU are None for locators that do not look.
    """

    ids: Sequence[str]
    tasks: int
    features: Tensor | None = None
    task: int | None = None


class Locator:
    """Finds the task of a test sample.

    Class attributes:
        looks: it needs features of the samples, and of each task's training samples before.
        decisive: the options that a fitted state belongs to; they cannot change within a sequence.
    """

    looks: ClassVar[bool] = True
    Options: ClassVar[type] = NoOptions
    decisive: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: LocatorConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.options: Any = build(self.Options, config.options, "locator.options")

    def fit(self, features: Tensor) -> None:
        """Add the next task from features ``[M, D]`` float32 of its training samples; older tasks do not change."""

    def scores(self, asked: Asked) -> Tensor:
        """How typical each sample is of each task, ``[M, N]`` float64 on the CPU; the largest wins, ties the older."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """All that ``fit`` has learned."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""

    def save(self, path: Path) -> None:
        """Write the state and the settings that it belongs to."""
        save_tensors(self.state(), path, metadata={"settings": json.dumps(self._settings())})

    def load(self, path: Path) -> None:
        """Read what ``save`` wrote. Raises ClmoeError, naming the setting, if it was fitted with another."""
        stored = json.loads(metadata(path).get("settings", "{}"))
        for name, value in self._settings().items():
            if (was := stored.get(name)) != value:
                raise ClmoeError(
                    f"{path}: was fitted with {name}={was}, not {value}: it cannot change within a sequence"
                )
        self.load_state(load_tensors(path))

    def _settings(self) -> dict[str, Any]:
        options = {name: getattr(self.options, name) for name in self.decisive}
        return {"locator": self.config.name, "feature": self.config.feature, **options}


def feature_folder(run: Path) -> Path:
    """Where a run keeps its features: ``CLMOE_FEATURES``, which runs on one base may share, or the run folder."""
    return Path(os.environ.get("CLMOE_FEATURES") or run / "features")


@dataclass(frozen=True)
class FeatureStore:
    """Features of lists of prompts, computed once: the base is frozen, so they hold for every method on it.

    A file in ``folder`` is named after all that decides its content; without a folder all is computed anew.
    """

    base: LoadedBase
    kind: FeatureKind
    batch_size: int
    folder: Path | None
    share_images: bool = False

    @classmethod
    def of(cls, base: LoadedBase, config: Config, folder: Path | None) -> "FeatureStore":
        evaluation = config.evaluation
        return cls(base, config.locator.feature, evaluation.batch_size, folder, evaluation.share_images)

    def features(self, model: PeftModel, questions: Sequence[Question], image_root: Path) -> Tensor:
        """``[M, D]`` float32 on the CPU, one row per question, in order."""
        if self.folder is None:
            return self._compute(model, questions, image_root)
        key = from_main(lambda: self._key(questions, image_root))  # reads every image
        path = self.folder / f"{key}.safetensors"
        if from_main(path.is_file):
            return load_tensors(path)["features"]
        features = self._compute(model, questions, image_root)
        if is_main():
            replace_tensors({"features": features.contiguous()}, path)
        return features

    def _compute(self, model: PeftModel, questions: Sequence[Question], image_root: Path) -> Tensor:
        dataset = prompt_dataset(self.base, questions, image_root)
        order = image_order([question.image if self.share_images else None for question in questions])

        def one(start: int) -> Tensor:
            items = dataset.__getitems__(order[start : start + self.batch_size])
            routes = [() if self.share_images else row for row in range(len(items))]
            return base_features(model, prompt_inputs(self.base, items, routes), self.kind)

        found = torch.cat(in_order(range(0, len(order), self.batch_size), one))
        return found[torch.tensor(order).argsort()]

    def _key(self, questions: Sequence[Question], image_root: Path) -> str:
        names = {question.image for question in questions}
        images = {name: None if name is None else file_sha256(image_root / name) for name in names}
        prompts = [(question.text, images[question.image]) for question in questions]
        base, cut = self.base, [self.batch_size, self.share_images]
        in_4bit = bool(getattr(base.model, "is_loaded_in_4bit", False))
        made_by = [base.fingerprint, str(base.model.dtype), in_4bit, base.image_processor.to_dict()]
        return json_sha256([made_by, self.kind, cut, prompts])[:32]

    def of_training(self, model: PeftModel, records: Sequence[TrainRecord], image_root: Path, config: Config) -> Tensor:
        """Features ``[M, D]`` of the first prompt of at most ``locator.samples`` training records."""
        drawn = sample_records(records, config.locator.samples, config.seed)
        return self.features(model, first_questions(drawn), image_root)
