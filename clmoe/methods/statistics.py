"""What the instance routers did on a task's training data, counted in a no-grad pass after training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clmoe.data.batches import sample_records, train_batches, train_dataset
from clmoe.methods.context import TaskContext
from clmoe.model.adapter import adapted_llava
from clmoe.model.routing import NEWEST_ROUTER, RouterOutput, RouteTrace, routing

if TYPE_CHECKING:
    from clmoe.data.records import TrainRecord

Statistics = dict[str, dict[str, Tensor]]


@dataclass
class GateCount:
    """Running sums of one router over non-padding tokens, kept on its device.

    Attributes:
        total: ``[E]`` float64, sum of gates.
        picks: ``[E]`` int64, how often an expert is among the ``top_k`` largest gates; ties go to the lower index.
        tokens: int64 scalar.
    """

    total: Tensor
    picks: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, gate: Tensor, mask: Tensor, top_k: int) -> GateCount:
        """Count one batch: ``gate [B, T, E]``, ``mask [B, T]`` nonzero where a token is real."""
        real = gate[mask.bool()]
        order = real.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
        picks = torch.bincount(order.flatten(), minlength=gate.shape[-1])
        return cls(real.double().sum(0), picks, mask.bool().sum())

    def __add__(self, other: GateCount) -> GateCount:
        return GateCount(self.total + other.total, self.picks + other.picks, self.tokens + other.tokens)

    def summary(self) -> dict[str, Tensor]:
        """``gate_mean [E]`` float64, ``topk_counts [E]`` int64, ``tokens`` int64, on the CPU."""
        mean = self.total / self.tokens
        return {"gate_mean": mean.cpu(), "topk_counts": self.picks.cpu(), "tokens": self.tokens.cpu()}


@torch.no_grad()
def router_outputs(
    context: TaskContext, records: Sequence[TrainRecord]
) -> Iterator[tuple[dict[str, RouterOutput], Tensor]]:
    """What the newest routers answer on whole training records, dropout off, without gradient.

    Yields for each batch the outputs of every patched module and the mask ``[B, T]`` of real tokens.
    """
    base, config = context.base, context.config
    llava = adapted_llava(context.model.eval())
    dataset = train_dataset(base, records, context.image_root, config.training.max_length)
    for batch in train_batches(base, dataset, config.evaluation.batch_size):
        del batch["labels"]
        trace = RouteTrace()
        with routing(NEWEST_ROUTER, trace):
            llava.model(**batch, use_cache=False)
        yield trace.outputs, batch["attention_mask"]


def gate_statistics(context: TaskContext, top_k: int, samples: int) -> Statistics:
    """Instance-gate statistics of every patched module on at most ``samples`` training records."""
    counts: dict[str, GateCount] = {}
    records = sample_records(context.records, samples, context.config.seed)
    for outputs, mask in router_outputs(context, records):
        for name, output in outputs.items():
            count = GateCount.of(output.gate, mask, top_k)
            counts[name] = counts[name] + count if name in counts else count
    return {name: count.summary() for name, count in counts.items()}


def save_statistics(previous: Path | None, path: Path, newest: Statistics) -> list[Statistics]:
    """Append the task's statistics to its parent's and write all; returns all tasks' statistics, oldest first."""
    history = [] if previous is None else load_statistics(previous / path.name)
    history.append(newest)
    tensors = {
        f"{task}.{name}.{kind}": value
        for task, statistics in enumerate(history)
        for name, values in statistics.items()
        for kind, value in values.items()
    }
    save_file(tensors, path)
    return history


def load_statistics(path: Path) -> list[Statistics]:
    """Statistics of all tasks, oldest first."""
    tensors = load_file(path)
    history: list[Statistics] = [{} for _ in {key.split(".", 1)[0] for key in tensors}]
    for key, value in tensors.items():
        task, rest = key.split(".", 1)
        name, _, kind = rest.rpartition(".")
        history[int(task)].setdefault(name, {})[kind] = value
    return history
