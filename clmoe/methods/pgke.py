"""PGKE, probe-guided knowledge extension (LLaVA-CMoE, section 3.2): a task first asks which blocks need new experts.

Probes start as averages of a block's experts and train on a share of the task's data. A block gets one copy of its most
activated expert for each probe that is activated above ``mean - alpha std`` (``probes.py``).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from torch import Tensor

from clmoe.config import Config
from clmoe.data.batches import sample_records
from clmoe.data.records import TrainRecord
from clmoe.errors import ClmoeError
from clmoe.experts.layer import expert_layers, seeded
from clmoe.experts.model import add_routers, freeze_experts, grow_experts
from clmoe.methods.base import EXPANSION, Phase, TaskContext
from clmoe.methods.lora import MoeLora
from clmoe.methods.probes import (
    BlockDecision,
    Where,
    average_expert,
    choose_blocks,
    decide,
    extend_router,
    measure_activations,
    pick_expert,
)
from clmoe.utils.files import read_json, write_json
from clmoe.utils.schema import Count, Inside, Positive, Range

Factors = dict[str, dict[str, tuple[Tensor, Tensor]]]  # module -> linear -> ``A [n*r, din]``, ``B [dout, n*r]``


@dataclass(frozen=True)
class ProbeOptions:
    """Choices about probes and growth. *Open* marks those the paper does not state.

    Attributes:
        extend: where experts are added: ``probed``; for ablations ``random`` blocks (the probes' numbers), ``every``
            block (one each), ``none`` (nothing is added or frozen, one shared router).
        probe_share: share of a task's records that the probes use, 0.1.
        probe_held_out: *open*: share of these held out to measure activations.
        probe_experts: N_p, 1.
        probe_rate: learning rate of the probes relative to the task's, 1.5 (3e-4 to 2e-4).
        probe_epochs, probe_min_steps: *open*: length of the probe training.
        alpha: of the threshold mean - alpha * std, 0.8.
        activation: *open*: share of tokens whose top-k includes the expert, or the mean logit.
        probe_seed: added to the run's seed for the probes' records, order and router rows: are decisions stable?
    """

    extend: Where = "probed"
    probe_share: Annotated[float, Range(0, 1, "low")] = 0.1
    probe_held_out: Inside = 0.2
    probe_experts: Annotated[int, Range(1, 1024)] = 1
    probe_rate: Positive = 1.5
    probe_epochs: Count = 1
    probe_min_steps: Annotated[int, Range(0, 2**31 - 1)] = 100
    alpha: Annotated[float, Range(-1e6, 1e6)] = 0.8
    activation: Literal["frequency", "logit"] = "frequency"
    probe_seed: Annotated[int, Range(0, 2**31 - 1)] = 0


class ProbeGuided(MoeLora):
    """MoELoRA that probes, decides, extends and trains per task; ``sealed/initial`` holds experts older than all."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._probing = False
        self._probe_seed = config.seed + self.options.probe_seed
        self._decisions: dict[str, BlockDecision] = {}
        self._sources: Factors = {}

    @property
    def grows(self) -> bool:
        return self.options.extend != "none"

    def probed_phases(self, context: TaskContext) -> list[Phase]:
        """The probes' training, which ends with the decisions, and then the task's."""
        options, training = self.options, self.config.training
        train, self._held_out = self._probe_split(context.records)
        steps = max(options.probe_min_steps, -(-len(train) * options.probe_epochs // training.batch_size))
        rate = options.probe_rate * training.learning_rate
        return [
            Phase("probe", train, context.image_root, self._add_probes, self._decide, rate, steps),
            Phase("trained", context.records, context.image_root, self._extend, self.end_task),
        ]

    def _probe_split(self, records: Sequence[TrainRecord]) -> tuple[list[TrainRecord], list[TrainRecord]]:
        """Two disjoint parts of a share of the records: one to train the probes, one to measure their activations."""
        if len(records) < 2:
            raise ClmoeError("probes need at least 2 training records: one to train on and one to measure on")
        drawn = sample_records(records, max(2, round(self.options.probe_share * len(records))), self._probe_seed)
        kept = min(len(drawn) - 1, max(1, round(self.options.probe_held_out * len(drawn))))
        return drawn[kept:], drawn[:kept]

    def _add_probes(self, context: TaskContext) -> None:
        """Every block gets probes that start as the average of its experts; everything older is frozen."""
        self._probing = True
        averages = {
            name: {k: average_expert(*e.packed(), e.rank) for k, e in layer.experts.items()}
            for name, layer in expert_layers(context.model).items()
        }
        self._grow(context, averages, dict.fromkeys(averages, self.options.probe_experts), "probe", self._probe_seed)

    def _grow(self, context: TaskContext, source: Factors, added: dict[str, int], purpose: str, seed: int) -> None:
        """Freeze what is there; every block gets a router for the task and ``added`` copies of its source expert."""
        factors = {
            name: {linear: (A.repeat(added[name], 1), B.repeat(1, added[name])) for linear, (A, B) in by_linear.items()}
            for name, by_linear in source.items()
            if added[name]
        }
        routers = {}
        for name, layer in expert_layers(context.model).items():
            generator = seeded(seed, f"{purpose}:{context.index}:{name}")
            newest = layer.routers.instance[-1].weight
            routers[name] = extend_router(newest, added[name], generator).to(newest.device)  # type: ignore[arg-type]
        freeze_experts(context.model, context.index)
        grow_experts(context.model, context.index, factors)
        add_routers(context.model, context.index, routers)

    def _decide(self, context: TaskContext) -> None:
        """Measure the probes on held-out records, decide per block, and keep each block's most active expert."""
        activations = measure_activations(context, self._held_out, self.options.activation)
        self._decisions, self._sources = {}, {}
        for name, layer in expert_layers(context.model).items():
            decision = decide(activations[name], self.options.probe_experts, self.options.alpha)
            self._decisions[name] = decision
            self._sources[name] = {
                linear: pick_expert(*experts.packed(), experts.rank, decision.most_active)
                for linear, experts in layer.experts.items()
            }

    def _extend(self, context: TaskContext) -> None:
        """Drop the probes and add the experts that were decided on, each a copy of its block's most active one."""
        context.load(context.sealed / "initial" if context.previous is None else context.previous)
        self._probing = False
        self._grow(context, self._sources, self._added(context), "extend", self.config.seed)

    def _added(self, context: TaskContext) -> dict[str, int]:
        return choose_blocks(self._decisions, self.options.extend, self.config.seed + context.index)

    def end_task(self, context: TaskContext) -> None:
        """Record what the probes showed and what was added."""
        old = [] if context.previous is None else read_json(context.previous / EXPANSION)
        added = self._added(context)
        blocks = {name: asdict(decision) | {"added": added[name]} for name, decision in self._decisions.items()}
        write_json(context.work / EXPANSION, [*old, {"task": context.task, "blocks": blocks}])
