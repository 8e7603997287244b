"""CL-MoE (CVPR 2025): dual routers over shared LoRA experts (RMoE) and momentum consolidation after each task (MMoE).

In the paper's order:

- eq. 3, 5: every FFN projection mixes E LoRA experts under a per-token instance router ``G_I``; training is MoELoRA's.
- eq. 6-7: after task t, ``G_T(t)`` is what the instance router did on the task's training data (``gate_statistics``).
- figure 2: a sample's task is the nearest task centre (``locators/prototype.py``).
- eq. 8: at test time experts are weighted ``beta G_I(x) + (1 - beta) G_T(t)`` (``experts/routing.py``).
- eq. 9-11: experts are consolidated, ``theta_t = lambda theta_{t-1} + (1 - lambda) phi_t``, with ``lambda = 1 - gamma``
  for task-specific experts and ``gamma`` for all others (``keep_weights``, ``consolidate_factors``).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor

from clmoe.config import Config
from clmoe.data.batches import sample_records
from clmoe.errors import ClmoeError
from clmoe.experts.layer import expert_layers
from clmoe.experts.model import add_task_gates, tensor_name
from clmoe.experts.routing import RouteSelection
from clmoe.methods.base import ADAPTER_FILE, STATISTICS, TaskContext, router_sums
from clmoe.methods.lora import MoeLora
from clmoe.utils.schema import Count, Share, Steps
from clmoe.utils.tensors import load_tensors, save_tensors

# Of one task: patched module -> ``gate_mean [E]`` float64, ``topk_counts [E]`` int64, ``tokens`` int64.
Statistics = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Options:
    """CL-MoE's own choices. *Open* marks those the paper does not state.

    Attributes:
        beta: weight of the instance router at test time, 0.5; 1 switches the task router off ("RMoE off").
        gamma: what an expert keeps of its old weights, unless it is task-specific (1 - gamma); 0.7.
        top_k: size of a task's set of salient experts, 2.
        statistic: *open*: a task's gate is the mean instance gate, or its normalised top-k picks.
        salience: *open*: rank experts in each module, or once for the whole model (``global``).
        before: *open*: "salient before" means in the task before (``last``) or in any earlier task.
        consolidation: ``momentum``, or ``none`` ("MMoE off").
        momentum_on: *open*: also consolidate the routers' rows.
        merge_space: *open*: mix the factors A and B (the paper's formula), or their products.
        samples: training samples behind the statistics.
    """

    beta: Share = 0.5
    gamma: Share = 0.7
    top_k: Count = 2
    statistic: Literal["mean", "topk_counts"] = "mean"
    salience: Literal["per_module", "global"] = "per_module"
    before: Literal["last", "any"] = "last"
    consolidation: Literal["momentum", "none"] = "momentum"
    momentum_on: Literal["experts", "experts_and_routers"] = "experts"
    merge_space: Literal["factors", "delta"] = "factors"
    samples: Steps = 2000


class ClMoe(MoeLora):
    """Trains like MoELoRA with the instance router; everything else happens at a task's end and at test time."""

    keeps_parts = True
    Options = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if self.options.top_k > config.adapter.experts:
            raise ClmoeError(
                f"options.top_k {self.options.top_k} is more than adapter.experts {config.adapter.experts}"
            )

    def end_task(self, context: TaskContext) -> None:
        """Statistics, task gates, consolidation: all from the saved adapter of the trained task."""
        statistics = gate_statistics(context, self.options.top_k, self.options.samples)
        history = save_statistics(context.previous, context.work / STATISTICS, statistics)
        gates = {name: self._score(values) for name, values in history[-1].items()}
        add_task_gates(context.model, gates)
        if self.options.consolidation == "momentum" and context.previous is not None:
            self._consolidate(context, history)

    def _score(self, statistics: dict[str, Tensor]) -> Tensor:
        """The chosen statistic as a distribution over experts, ``[E]`` float64."""
        if self.options.statistic == "mean":
            return statistics["gate_mean"]
        counts = statistics["topk_counts"].double()
        return counts / counts.sum()

    def salient_sets(self, history: list[Statistics]) -> list[dict[str, set[int]]]:
        """Salient experts of every module after each task, oldest first."""
        sets = []
        for statistics in history:
            scores = {name: self._score(values) for name, values in statistics.items()}
            if self.options.salience == "global":
                scores = dict.fromkeys(scores, sum(scores.values()))  # type: ignore[arg-type]
            sets.append({name: salient_experts(score, self.options.top_k) for name, score in scores.items()})
        return sets

    def keep_by_module(self, history: list[Statistics]) -> dict[str, Tensor]:
        """What each expert of each module keeps of its old weights, ``[E]`` float64."""
        *earlier, now = self.salient_sets(history)
        earlier = earlier[-1:] if self.options.before == "last" else earlier
        before = {name: set().union(*(sets[name] for sets in earlier)) for name in now}
        experts = {name: len(values["gate_mean"]) for name, values in history[-1].items()}
        return {name: keep_weights(now[name], before[name], experts[name], self.options.gamma) for name in now}

    def _consolidate(self, context: TaskContext, history: list[Statistics]) -> None:
        """theta_t from theta_{t-1} (the parent's file) and phi_t (the trained file), never from live weights."""
        assert context.previous is not None
        merge = consolidate_factors if self.options.merge_space == "factors" else consolidate_delta
        theta = load_tensors(context.previous / ADAPTER_FILE)
        phi = load_tensors(context.trained / ADAPTER_FILE)
        keep = self.keep_by_module(history)
        with torch.no_grad():
            for name, layer in expert_layers(context.model).items():
                for linear, experts in layer.experts.items():
                    key_A, key_B = (tensor_name(name, f"clmoe_experts.{linear}.{factor}") for factor in "AB")
                    old, new = ((source[key_A], source[key_B]) for source in (theta, phi))
                    A, B = merge(old, new, keep[name])
                    experts.A.copy_(A)  # type: ignore[union-attr]
                    experts.B.copy_(B)  # type: ignore[union-attr]
                if self.options.momentum_on == "experts_and_routers":
                    key = tensor_name(name, "clmoe_routers.instance.0.weight")
                    layer.routers.instance[0].weight.copy_(mix(theta[key], phi[key], keep[name].unsqueeze(1)))  # type: ignore[operator]

    def selection(self, model: PeftModel, tasks: Tensor) -> RouteSelection:
        """Mix in the gates of the samples' tasks."""
        return RouteSelection(task=tasks.to(model.device), beta=self.options.beta)


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
    """Append the task's statistics to its parent's and write all; returns all tasks' statistics, oldest first."""
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


def salient_experts(score: Tensor, top_k: int) -> set[int]:
    """The ``top_k`` experts of largest score ``[E]``; ties go to the lower index."""
    return set(score.argsort(descending=True, stable=True)[:top_k].tolist())


def keep_weights(now: set[int], before: set[int], experts: int, gamma: float) -> Tensor:
    """What each expert keeps, ``[E]`` float64 (CL-MoE eq. 10-11): ``1 - gamma`` if salient now and not before."""
    return torch.tensor([1 - gamma if i in now - before else gamma for i in range(experts)], dtype=torch.float64)


def mix(old: Tensor, new: Tensor, keep: Tensor) -> Tensor:
    """``keep * old + (1 - keep) * new`` in float64, rounded once; 0 and 1 copy the bits of one side."""
    mixed = (keep * old.double() + (1 - keep) * new.double()).to(old.dtype)
    keep = keep.expand_as(mixed)
    return torch.where(keep == 1, old, torch.where(keep == 0, new, mixed))


def consolidate_factors(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], keep: Tensor) -> tuple[Tensor, Tensor]:
    """Mix ``(A [E*r, din], B [dout, E*r])`` on their own, the paper's rule; ``keep [E]`` float64."""
    per_rank = keep.repeat_interleave(len(old[0]) // len(keep))
    return mix(old[0], new[0], per_rank.unsqueeze(1)), mix(old[1], new[1], per_rank.unsqueeze(0))


def factorise(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-``rank`` factors of ``left [dout, k] @ right [k, din]``, float64, without forming it.

    ``A [rank, din] = sqrt(S) V^T``, ``B [dout, rank] = U sqrt(S)``; the largest entry of each column of U is positive.
    """
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right.t())
    U, S, Vh = torch.linalg.svd(R_left @ R_right.t())
    U, Vh = Q_left @ U[:, :rank], Vh[:rank] @ Q_right.t()
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(U)
    root = S[:rank].sqrt()
    return (root * sign.squeeze(0)).unsqueeze(1) * Vh, U * sign * root


def consolidate_delta(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], keep: Tensor) -> tuple[Tensor, Tensor]:
    """Mix each expert's product BA and return to rank r by SVD in float64. Arguments as ``consolidate_factors``."""
    r = len(old[0]) // len(keep)
    A, B = old[0].clone(), old[1].clone()
    for i, weight in enumerate(keep.tolist()):
        rows = slice(i * r, (i + 1) * r)
        if weight == 1:
            continue
        if weight == 0:
            A[rows], B[:, rows] = new[0][rows], new[1][:, rows]
            continue
        left = torch.cat([weight * old[1][:, rows].double(), (1 - weight) * new[1][:, rows].double()], dim=1)
        A_i, B_i = factorise(left, torch.cat([old[0][rows], new[0][rows]]).double(), r)
        A[rows], B[:, rows] = A_i.to(A), B_i.to(B)
    return A, B


METHODS = {"clmoe": ClMoe}
