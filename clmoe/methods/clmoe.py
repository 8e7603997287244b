"""CL-MoE (CVPR 2025): dual routers over shared LoRA experts (RMoE) and momentum consolidation after each task (MMoE).

Where the paper is silent the choice is an option of ``Options``, whose docstring says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clmoe.errors import ClmoeError
from clmoe.methods.context import STATISTICS, TaskContext
from clmoe.methods.moelora import MoeLora

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from clmoe.model.routing import RouteSelection

LOCATOR = "locator.safetensors"


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
        distance, radius: *open*: how a sample finds the nearest task centre.
        samples: training samples behind statistics and centre.
    """

    beta: float = 0.5
    gamma: float = 0.7
    top_k: int = 2
    statistic: Literal["mean", "topk_counts"] = "mean"
    salience: Literal["per_module", "global"] = "per_module"
    before: Literal["last", "any"] = "last"
    consolidation: Literal["momentum", "none"] = "momentum"
    momentum_on: Literal["experts", "experts_and_routers"] = "experts"
    merge_space: Literal["factors", "delta"] = "factors"
    distance: Literal["euclidean", "cosine"] = "euclidean"
    radius: Literal["none", "normalised"] = "none"
    samples: int = 2000

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ClmoeError(f"options.{name} {getattr(self, name)} is not between 0 and 1")
        if self.top_k < 1 or self.samples < 1:
            raise ClmoeError("options.top_k and options.samples must be at least 1")


class ClMoe(MoeLora):
    """Trains like MoELoRA with the instance router; everything else happens at a task's end and at test time."""

    finds_task = True
    Options = Options

    @property
    def located_on(self) -> int:
        return self.options.samples

    def end_task(self, context: TaskContext) -> None:
        """Statistics -> task gates -> centre -> consolidation, all from the saved adapter of the trained task."""
        from clmoe.methods.statistics import gate_statistics, save_statistics

        statistics = gate_statistics(context, self.options.top_k, self.options.samples)
        history = save_statistics(context.previous, context.work / STATISTICS, statistics)
        self._add_task_gates(context, history[-1])
        self._add_centre(context)
        if self.options.consolidation == "momentum" and context.previous is not None:
            self._consolidate(context, history)

    def _score(self, statistics: dict[str, Tensor]) -> Tensor:
        """The chosen statistic as a distribution over experts, ``[E]`` float64."""
        if self.options.statistic == "mean":
            return statistics["gate_mean"]
        counts = statistics["topk_counts"].double()
        return counts / counts.sum()

    def _add_task_gates(self, context: TaskContext, statistics: dict[str, dict[str, Tensor]]) -> None:
        from clmoe.model.adapter import add_task_gates

        add_task_gates(context.model, {name: self._score(values) for name, values in statistics.items()})

    def _add_centre(self, context: TaskContext) -> None:
        from clmoe.methods.features import add_class_mean, training_features

        add_class_mean(context, LOCATOR, training_features(context, self.options.samples))

    def salient_sets(self, history: list[dict[str, dict[str, Tensor]]]) -> list[dict[str, set[int]]]:
        """Salient experts of every module after each task, oldest first."""
        from clmoe.methods.momentum import salient_experts

        sets = []
        for statistics in history:
            scores = {name: self._score(values) for name, values in statistics.items()}
            if self.options.salience == "global":
                total = sum(scores.values())
                scores = dict.fromkeys(scores, total)  # type: ignore[arg-type]
            sets.append({name: salient_experts(score, self.options.top_k) for name, score in scores.items()})
        return sets

    def keep_by_module(self, history: list[dict[str, dict[str, Tensor]]]) -> dict[str, Tensor]:
        """What each expert of each module keeps of its old weights, ``[E]`` float64."""
        from clmoe.methods.momentum import keep_weights

        *earlier, now = self.salient_sets(history)
        if self.options.before == "last":
            earlier = earlier[-1:]
        experts = {name: len(values["gate_mean"]) for name, values in history[-1].items()}
        return {
            name: keep_weights(
                now[name], set().union(*(sets[name] for sets in earlier)), experts[name], self.options.gamma
            )
            for name in now
        }

    def _consolidate(self, context: TaskContext, history: list[dict[str, dict[str, Tensor]]]) -> None:
        """theta_t from theta_{t-1} (the parent's file) and phi_t (the trained file), never from live weights."""
        import torch

        from clmoe.methods.momentum import consolidate, mix
        from clmoe.model.adapter import expert_layers, tensor_name
        from clmoe.utils.tensors import load_tensors

        assert context.previous is not None
        theta = load_tensors(context.previous / "adapter_model.safetensors")
        phi = load_tensors(context.trained / "adapter_model.safetensors")
        keep = self.keep_by_module(history)
        with torch.no_grad():
            for name, layer in expert_layers(context.model).items():
                for linear, experts in layer.experts.items():
                    keys = [tensor_name(name, f"clmoe_experts.{linear}.{factor}") for factor in ("A", "B")]
                    old, new = (tuple(source[key] for key in keys) for source in (theta, phi))
                    A, B = consolidate(old, new, keep[name], self.options.merge_space)  # type: ignore[arg-type]
                    experts.A.copy_(A)  # type: ignore[union-attr]
                    experts.B.copy_(B)  # type: ignore[union-attr]
                if self.options.momentum_on == "experts_and_routers":
                    key = tensor_name(name, "clmoe_routers.instance.0.weight")
                    layer.routers.instance[0].weight.copy_(mix(theta[key], phi[key], keep[name].unsqueeze(1)))  # type: ignore[operator]

    def task_scores(self, checkpoint: Path, features: Tensor) -> dict[str, Tensor]:
        """The nearest task centre wins."""
        from clmoe.model.locator import PrototypeIndex

        index = PrototypeIndex.load(checkpoint / LOCATOR)
        return {"prototype": -index.scores(features, self.options.distance, self.options.radius)}

    def selection(self, model: PeftModel, tasks: Tensor) -> RouteSelection:
        """Mix in the gates of the samples' tasks."""
        from clmoe.model.routing import RouteSelection

        return RouteSelection(task=tasks.to(model.device), beta=self.options.beta)


METHOD: Any = ClMoe
