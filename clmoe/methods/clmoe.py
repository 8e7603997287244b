"""CL-MoE (CVPR 2025): dual routers over shared LoRA experts (RMoE) and momentum consolidation after each task (MMoE).

In the paper's order:

- eq. 3, 5: every FFN projection mixes E LoRA experts under a per-token instance router ``G_I``, trained as in MoELoRA.
- eq. 6-7: after task t, ``G_T(t)`` is what the instance router did on the task's training data (``statistics.py``).
- figure 2: a sample belongs to the task with the nearest centre (``locators/prototype.py``).
- eq. 8: at test time experts are weighted ``beta G_I(x) + (1 - beta) G_T(t)`` (``experts/routing.py``).
- eq. 9-11: experts are consolidated, ``theta_t = lambda theta_{t-1} + (1 - lambda) phi_t``, with ``lambda = 1 - gamma``
  for task-specific experts and ``gamma`` for all others (``consolidation.py``).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor

from clmoe.config import Config
from clmoe.errors import ClmoeError
from clmoe.experts.layer import expert_layers
from clmoe.experts.model import add_task_gates, tensor_name
from clmoe.experts.routing import RouteSelection
from clmoe.methods.base import ADAPTER_FILE, STATISTICS, TaskContext
from clmoe.methods.consolidation import consolidate_delta, consolidate_factors, keep_weights, mix, salient_experts
from clmoe.methods.lora import MoeLora
from clmoe.methods.statistics import Statistics, gate_statistics, save_statistics
from clmoe.utils.schema import Count, Share, Steps
from clmoe.utils.tensors import load_tensors


@dataclass(frozen=True)
class Options:
    """CL-MoE's own choices. *Open* marks those the paper does not state.

    Attributes:
        beta: weight of the instance router at test time, 0.5; 1 switches the task router off ("RMoE off").
        gamma: share of its old weights that an expert keeps, unless it is task-specific (1 - gamma); 0.7.
        top_k: size of a task's set of salient experts, 2.
        statistic: *open*: a task's gate is the mean instance gate, or its normalised top-k picks.
        salience: *open*: rank experts in each module, or once for the whole model (``global``).
        before: *open*: "salient before" means in the task before (``last``) or in any earlier task.
        consolidation: ``momentum``, or ``none`` ("MMoE off").
        momentum_on: *open*: also consolidate the routers' rows.
        merge_space: *open*: mix the factors A and B (the paper's formula), or their products.
        samples: training samples that the statistics are taken over.
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
    answer_options = ("beta",)
    Options = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if self.options.top_k > config.adapter.experts:
            raise ClmoeError(
                f"options.top_k {self.options.top_k} is more than adapter.experts {config.adapter.experts}"
            )

    def end_task(self, context: TaskContext) -> None:
        """Take statistics, add task gates and consolidate, all from the saved adapter of the trained task."""
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
        """The share of its old weights that each expert of each module keeps, ``[E]`` float64."""
        *earlier, now = self.salient_sets(history)
        earlier = earlier[-1:] if self.options.before == "last" else earlier
        before = {name: set().union(*(sets[name] for sets in earlier)) for name in now}
        experts = {name: len(values["gate_mean"]) for name, values in history[-1].items()}
        return {name: keep_weights(now[name], before[name], experts[name], self.options.gamma) for name in now}

    def _consolidate(self, context: TaskContext, history: list[Statistics]) -> None:
        """Get theta_t from theta_{t-1} (the parent's file) and phi_t (the trained file), never from live weights."""
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


METHODS = {"clmoe": ClMoe}
