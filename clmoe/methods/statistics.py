"""What the instance routers did on a task's training data, counted in a no-grad pass after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from clmoe.data.batches import over_train_batches, sample_records, train_dataset
from clmoe.methods.context import TaskContext
from clmoe.model.adapter import adapted_llava
from clmoe.model.routing import NEWEST_ROUTER, RouterOutput, RouteTrace, routing
from clmoe.utils.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from clmoe.data.records import TrainRecord

R = TypeVar("R")
Statistics = dict[str, dict[str, Tensor]]


@dataclass
class GateCount:
    """Sums of one router over non-padding tokens, on the CPU.

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
        return cls(real.double().sum(0).cpu(), picks.cpu(), mask.bool().sum().cpu())

    def __add__(self, other: GateCount) -> GateCount:
        return GateCount(self.total + other.total, self.picks + other.picks, self.tokens + other.tokens)

    def summary(self) -> dict[str, Tensor]:
        """``gate_mean [E]`` float64, ``topk_counts [E]`` int64, ``tokens`` int64."""
        return {"gate_mean": self.total / self.tokens, "topk_counts": self.picks, "tokens": self.tokens}


@torch.no_grad()
def over_router_outputs(
    context: TaskContext, records: Sequence[TrainRecord], compute: Callable[[RouterOutput, Tensor], R]
) -> list[dict[str, R]]:
    """``compute`` of what the newest routers answer on whole training records, dropout off, without gradient.

    It is called with a router's output and the mask ``[B, T]`` of real tokens, and should return something small on the
    CPU: batches are shared by the processes, and all get all results. Returns for each batch, in order, the results by
    patched module; added up in that order they do not depend on the number of processes.
    """
    base, config = context.base, context.config
    llava = adapted_llava(context.model.eval())
    dataset = train_dataset(base, records, context.image_root, config.training.max_length)

    def one(batch: dict[str, Tensor]) -> dict[str, R]:
        del batch["labels"]
        trace = RouteTrace()
        with routing(NEWEST_ROUTER, trace):
            llava.model(**batch, use_cache=False)
        return {name: compute(output, batch["attention_mask"]) for name, output in trace.outputs.items()}

    return over_train_batches(base, dataset, config.evaluation.batch_size, one)


def gate_statistics(context: TaskContext, top_k: int, samples: int) -> Statistics:
    """Instance-gate statistics of every patched module on at most ``samples`` training records."""
    records = sample_records(context.records, samples, context.config.seed)
    batches = over_router_outputs(context, records, lambda output, mask: GateCount.of(output.gate, mask, top_k))
    return {name: reduce(GateCount.__add__, [counts[name] for counts in batches]).summary() for name in batches[0]}


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
    save_tensors(tensors, path)
    return history


def load_statistics(path: Path) -> list[Statistics]:
    """Statistics of all tasks, oldest first."""
    tensors = load_tensors(path)
    history: list[Statistics] = [{} for _ in {key.split(".", 1)[0] for key in tensors}]
    for key, value in tensors.items():
        task, rest = key.split(".", 1)
        name, _, kind = rest.rpartition(".")
        history[int(task)].setdefault(name, {})[kind] = value
    return history
