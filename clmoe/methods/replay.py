"""Training on records of past tasks again: replay, and DER++ (NeurIPS 2020), which also keeps their old logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from peft import PeftModel
from torch import Tensor

from clmoe.bases.inputs import over_train_batches, train_dataset
from clmoe.data.records import Part, TrainRecord, UnionRecords
from clmoe.experts.forward import adapted_base, answer_logits, answer_rows, mean_over_samples
from clmoe.experts.routing import RouteTrace
from clmoe.methods.base import Phase, TaskContext
from clmoe.methods.memory import MemoryOptions, Remembers, load_memory
from clmoe.utils.schema import NotNegative, Range
from clmoe.utils.tensors import load_tensors, save_tensors

LOGITS = "memory_logits.safetensors"


def replayed(own: int, kept: int, ratio: float) -> list[int]:
    """Which of ``kept`` records join ``own`` new ones to make up a share of ``ratio``.

    All come equally often, give or take one. If some are enough, they are spread evenly over the past tasks.
    """
    wanted = round(own * ratio / (1 - ratio)) if kept else 0
    return [i * kept // wanted for i in range(wanted)]


def mixed(own: Part, memory: Sequence[TrainRecord], ratio: float) -> UnionRecords:
    """The task's own records, then those of ``memory`` that ``replayed`` names."""
    places = replayed(len(own.records), len(memory), ratio)
    return UnionRecords([own, Part("", "", [memory[place] for place in places])])


@dataclass(frozen=True)
class ReplayOptions(MemoryOptions):
    """Replay's own choices.

    Attributes:
        ratio: share of memory records in the samples that a later task trains on.
    """

    ratio: Annotated[float, Range(0, 0.99)] = 0.5


class Replay(Remembers):
    """The memory is trained on again, mixed with the new task's records."""

    Options = ReplayOptions

    def phases(self, context: TaskContext) -> list[Phase]:
        """One phase, on the task's records and the memory's."""
        if context.previous is None:
            return super().phases(context)
        memory = [record for past in load_memory(context.previous) for record in past.records]
        own = Part.of(context.task, context.records, context.image_root, context.data)
        records = mixed(own, memory, self.options.ratio)
        return [Phase("trained", records, context.data, self.begin_task, self.end_task)]


@dataclass(frozen=True)
class DerOptions(ReplayOptions):
    """DER's own choices, besides replay's.

    Attributes:
        weight: alpha, the weight of the squared distance between logits.
    """

    weight: NotNegative = 0.1


class Der(Replay):
    """The memory also holds, for every token of its answers, the logits at the end of the record's own task."""

    Options = DerOptions
    reads_logits = True

    def begin_task(self, context: TaskContext) -> None:
        """Read the parent's logits of the memory's records, one for each record that is replayed."""
        self._own, logits = len(context.records), load_logits(context.previous)
        self._logits = [logits[place] for place in replayed(self._own, len(logits), self.options.ratio)]

    def extra_loss(self, model: PeftModel, trace: RouteTrace, batch: dict[str, Tensor]) -> Tensor | None:
        """``mean over samples and their tokens of |z - h|^2 / V``; samples of the new task count as 0."""
        if not self._logits:
            return None
        now, labels = batch["logits"], batch["labels"]
        before = now.detach().clone()
        of = answer_rows(labels)
        for row, place in enumerate(batch["rows"].tolist()):
            if place >= self._own:
                before[of == row] = self._logits[place - self._own].to(now)
        distances = torch.square(now - before).mean(-1)
        return self.options.weight * mean_over_samples(distances, labels)

    def end_task(self, context: TaskContext) -> None:
        """Draw records of the task, and store the trained model's logits for them."""
        super().end_task(context)
        config, base, adapted = context.config, context.base, adapted_base(context.model.eval())
        records = load_memory(context.work)[-1].records

        def one(batch: dict[str, Tensor]) -> list[Tensor]:
            lengths = torch.bincount(answer_rows(batch["labels"]), minlength=len(batch["labels"]))
            return list(answer_logits(adapted, batch).cpu().split(lengths.tolist()))

        dataset = train_dataset(base, records, context.data, config.training.max_length)
        with torch.no_grad():
            batches = over_train_batches(base, dataset, config.evaluation.batch_size, one)
        old = load_logits(context.previous)
        every = [*old, *(logits for batch in batches for logits in batch)]
        save_tensors({f"{i:06}": logits.clone() for i, logits in enumerate(every)}, context.work / LOGITS)


def load_logits(checkpoint: Path | None) -> list[Tensor]:
    """Logits ``[n, V]`` float32 of each record in the memory, in its order."""
    return [] if checkpoint is None else [logits for _, logits in sorted(load_tensors(checkpoint / LOGITS).items())]


METHODS = {"replay": Replay, "der": Der}
