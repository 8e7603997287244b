"""What CL-MoE's instance routers did on each task's training data (eq. 6-7), and the file that keeps it."""

from pathlib import Path

import torch
from torch import Tensor

from clmoe.data.batches import sample_records
from clmoe.methods.base import TaskContext, router_sums
from clmoe.utils.tensors import load_tensors, save_tensors

# Of one task: patched module -> ``gate_mean [E]`` float64, ``topk_counts [E]`` int64, ``tokens`` int64.
Statistics = dict[str, dict[str, Tensor]]


def gate_statistics(context: TaskContext, top_k: int, samples: int) -> Statistics:
    """Instance-gate statistics of every patched module on at most ``samples`` training records."""
    records = sample_records(context.records, samples, context.config.seed)
    sums = router_sums(context, records, lambda output, mask: count_gates(output.gate, mask, top_k))
    return {
        name: {"gate_mean": total / tokens, "topk_counts": picks, "tokens": tokens}
        for name, (total, picks, tokens) in sums.items()
    }


def count_gates(gate: Tensor, mask: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of gates ``[E]`` float64, how often each is among the ``top_k`` largest ``[E]`` int64, and tokens int64.

    ``gate [B, T, E]``, ``mask [B, T]`` nonzero where a token is real. Ties go to the lower index.
    """
    real = gate[mask.bool()]
    order = real.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    picks = torch.bincount(order.flatten(), minlength=gate.shape[-1])
    return real.double().sum(0).cpu(), picks.cpu(), mask.bool().sum().cpu()


def save_statistics(previous: Path | None, path: Path, newest: Statistics) -> list[Statistics]:
    """Append the task's statistics to its parent's and write them all; returns all tasks' statistics, oldest first."""
    history = [*([] if previous is None else load_statistics(previous / path.name)), newest]
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
