"""The locator's features of prompts, computed once on the frozen base and kept on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clmoe.data.batches import first_questions, over_prompt_batches, prompt_dataset, sample_records
from clmoe.model.locator import PrototypeIndex, base_features
from clmoe.system.files import file_sha256, json_sha256
from clmoe.system.processes import from_main, is_main
from clmoe.system.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel
    from torch import Tensor

    from clmoe.data.records import Question
    from clmoe.methods.context import TaskContext
    from clmoe.model.llava import FeatureKind, LoadedBase

FOLDER_VARIABLE = "CLMOE_FEATURES"


def feature_folder(run: Path) -> Path:
    """Where a run keeps its features: ``CLMOE_FEATURES`` (runs on one base may share it), else in the run folder."""
    shared = os.environ.get(FOLDER_VARIABLE)
    return Path(shared) if shared else run / "features"


@dataclass(frozen=True)
class FeatureStore:
    """Features of lists of prompts; since the base is frozen they hold for every checkpoint and method on it.

    A file is named after all that decides its content: base, kind, batches, and the hash of every prompt and image.

    Attributes:
        folder: of the files; None computes anew each time.
        kind: which hidden states, see ``last_prompt_features``.
        batch_size: prompts per forward pass.
    """

    base: LoadedBase
    kind: FeatureKind
    batch_size: int
    folder: Path | None

    def features(self, model: PeftModel, questions: Sequence[Question], image_root: Path) -> Tensor:
        """``[M, D]`` float32 on the CPU, one row per question, in order."""
        path = None if self.folder is None else self.folder / f"{self._key(questions, image_root)}.safetensors"
        if path is not None and from_main(path.is_file):
            return load_tensors(path)["features"]
        dataset = prompt_dataset(self.base, questions, image_root)
        features = torch.cat(
            over_prompt_batches(
                self.base, dataset, self.batch_size, lambda batch: base_features(model, batch, self.kind)
            )
        )
        if path is not None and is_main():
            _write(path, features)
        return features

    def _key(self, questions: Sequence[Question], image_root: Path) -> str:
        images = {q.image: file_sha256(image_root / q.image) for q in questions if q.image is not None}
        prompts = [(q.text, None if q.image is None else images[q.image]) for q in questions]
        content = [self.base.fingerprint, str(self.base.model.dtype), self.kind, self.batch_size, prompts]
        return json_sha256(content)[:32]


def _write(path: Path, features: Tensor) -> None:
    """Appears whole or not at all, also when several runs write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_tensors({"features": features.contiguous()}, partial)
    partial.replace(path)


def training_features(context: TaskContext, samples: int, kind: FeatureKind = "last") -> Tensor:
    """Features ``[M, D]`` float32 on the CPU of the first prompt of at most ``samples`` of the task's records."""
    config = context.config
    store = FeatureStore(context.base, kind, config.evaluation.batch_size, feature_folder(context.run))
    questions = first_questions(sample_records(context.records, samples, config.seed))
    return store.features(context.model, questions, context.image_root)


def add_class_mean(context: TaskContext, name: str, features: Tensor) -> None:
    """Append the task's features ``[M, D]`` to its parent's index of class means; the file ``name`` of a checkpoint."""
    old = context.previous
    index = PrototypeIndex.empty(features.shape[1]) if old is None else PrototypeIndex.load(old / name)
    index.append(features)
    index.save(context.work / name)
