"""The locator's features of prompts, computed once on the frozen base and kept on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clmoe.data.batches import first_questions, over_prompt_batches, prompt_dataset, sample_records
from clmoe.data.prefix import image_order, prompt_inputs, read_prompts
from clmoe.model.locator import PrototypeIndex, base_features
from clmoe.utils.files import file_sha256, json_sha256
from clmoe.utils.processes import from_main, in_order, is_main
from clmoe.utils.tensors import load_tensors, replace_tensors

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

    A file is named after all that decides its content: base and image processor, kind, batches, and the hash of every
    prompt and image.

    Attributes:
        folder: of the files; None computes anew each time.
        kind: which hidden states, see ``last_prompt_features``.
        batch_size: prompts per forward pass.
        share_images: prompts of one image read its tokens once.
    """

    base: LoadedBase
    kind: FeatureKind
    batch_size: int
    folder: Path | None
    share_images: bool = False

    def features(self, model: PeftModel, questions: Sequence[Question], image_root: Path) -> Tensor:
        """``[M, D]`` float32 on the CPU, one row per question, in order."""
        path = None
        if self.folder is not None:
            key = from_main(lambda: self._key(questions, image_root))  # reads every image
            path = self.folder / f"{key}.safetensors"
        if path is not None and from_main(path.is_file):
            return load_tensors(path)["features"]
        features = self._compute(model, questions, image_root)
        if path is not None and is_main():
            replace_tensors({"features": features.contiguous()}, path)
        return features

    def _compute(self, model: PeftModel, questions: Sequence[Question], image_root: Path) -> Tensor:
        dataset = prompt_dataset(self.base, questions, image_root)
        if not self.share_images:
            batches = over_prompt_batches(
                self.base, dataset, self.batch_size, lambda batch: base_features(model, batch, self.kind)
            )
            return torch.cat(batches)

        order = image_order([question.image for question in questions])

        def one(start: int) -> Tensor:
            items = read_prompts(dataset, order[start : start + self.batch_size])
            return base_features(model, prompt_inputs(self.base, items, [()] * len(items)), self.kind)

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


def training_features(context: TaskContext, samples: int, kind: FeatureKind = "last") -> Tensor:
    """Features ``[M, D]`` float32 on the CPU of the first prompt of at most ``samples`` of the task's records."""
    config = context.config
    batch_size, share = config.evaluation.batch_size, config.evaluation.share_images
    store = FeatureStore(context.base, kind, batch_size, feature_folder(context.run), share)
    questions = first_questions(sample_records(context.records, samples, config.seed))
    return store.features(context.model, questions, context.image_root)


def add_class_mean(context: TaskContext, name: str, features: Tensor) -> None:
    """Append the task's features ``[M, D]`` to its parent's index of class means; the file ``name`` of a checkpoint."""
    old = context.previous
    index = PrototypeIndex.empty(features.shape[1]) if old is None else PrototypeIndex.load(old / name)
    index.append(features)
    index.save(context.work / name)
