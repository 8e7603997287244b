"""DER++ (NeurIPS 2020): replay, and the model must still give the logits that it gave the replayed records then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clmoe.errors import ClmoeError
from clmoe.methods.context import TaskContext
from clmoe.methods.replay import Options as ReplayOptions
from clmoe.methods.replay import Replay

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from clmoe.model.routing import RouteTrace

LOGITS = "memory_logits.safetensors"


@dataclass(frozen=True)
class Options(ReplayOptions):
    """DER's own choices, besides replay's.

    Attributes:
        weight: alpha, of the squared distance between logits.
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight < 0:
            raise ClmoeError(f"options.weight {self.weight} must not be negative")


class Der(Replay):
    """The memory also holds, for every token of its answers, the logits at the end of the record's own task."""

    Options = Options
    reads_logits = True

    def begin_task(self, context: TaskContext) -> None:
        """Read the parent's logits; a memory record's place among them is its place in the memory."""
        self._own = len(context.records)
        self._logits = [] if context.previous is None else load_logits(context.previous / LOGITS)

    def extra_loss(self, model: PeftModel, trace: RouteTrace, batch: dict[str, Tensor]) -> Tensor | None:
        """``mean over samples and their tokens of |z - h|^2 / V``; samples of the new task count as 0."""
        import torch

        from clmoe.methods.answers import answer_rows, mean_over_samples

        if not self._logits:
            return None
        now, labels = batch["logits"], batch["labels"]
        before = now.detach().clone()
        of = answer_rows(labels)
        for row, place in enumerate(batch["rows"].tolist()):
            if place >= self._own:
                before[of == row] = self._logits[(place - self._own) % len(self._logits)].to(now)
        distances = torch.square(now - before).mean(-1)
        return self.options.weight * mean_over_samples(distances, labels)

    def end_task(self, context: TaskContext) -> None:
        """Draw the task's records, and store what the trained model says to them."""
        import torch

        from clmoe.data.batches import over_train_batches, train_dataset
        from clmoe.methods.answers import answer_logits, answer_rows
        from clmoe.model.adapter import adapted_llava
        from clmoe.utils.tensors import save_tensors

        records, config, base = self.remember(context), context.config, context.base
        llava = adapted_llava(context.model.eval())

        def one(batch: dict[str, Tensor]) -> list[Tensor]:
            lengths = torch.bincount(answer_rows(batch["labels"]), minlength=len(batch["labels"]))
            return list(answer_logits(llava, batch).cpu().split(lengths.tolist()))

        dataset = train_dataset(base, records, context.data, config.training.max_length)
        with torch.no_grad():
            batches = over_train_batches(base, dataset, config.evaluation.batch_size, one)
        old = [] if context.previous is None else load_logits(context.previous / LOGITS)
        every = [*old, *(logits for batch in batches for logits in batch)]
        save_tensors({f"{i:06}": logits.clone() for i, logits in enumerate(every)}, context.work / LOGITS)


def load_logits(path: Any) -> list[Tensor]:
    """``[n, V]`` float32 of each record of the memory, in its order."""
    from clmoe.utils.tensors import load_tensors

    return [logits for _, logits in sorted(load_tensors(path).items())]


METHOD: Any = Der
