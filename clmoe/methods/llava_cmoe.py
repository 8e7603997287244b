"""LLaVA-CMoE (arXiv 2503.21227): probes decide where a task needs new experts (PGKE), VAEs find its samples (PTL).

Everything older than the task is frozen bit for bit; a task owns a router per block that spans the experts of its time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clmoe.errors import ClmoeError
from clmoe.methods.adapters import expert_adapter, expert_scaling, mean_gate
from clmoe.methods.base import Method
from clmoe.methods.context import PLAN, Phase, TaskContext
from clmoe.model.vae_settings import VaeSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftConfig, PeftModel
    from torch import Tensor

    from clmoe.data.records import TrainRecord
    from clmoe.methods.expansion import BlockDecision
    from clmoe.model.llava import FeatureKind, LoadedBase
    from clmoe.model.locator import PrototypeIndex
    from clmoe.model.routing import RouteSelection, RouteTrace
    from clmoe.model.vae_bank import VaeBank

LOCATOR = "locator.safetensors"
PROTOTYPES = "prototypes.safetensors"
WARM_UP_OWNER = -1


@dataclass(frozen=True)
class Options:
    """LLaVA-CMoE's own choices. *Open* marks those the paper does not state.

    Attributes:
        initial_experts_from: *open*: the first experts learn from data disjoint from the sequence (``warmup``, the file
            in ``warmup_train``), and every task is probed; or from the first task, which then is not.
        warmup_train, warmup_images: LLaVA-format JSON and its image folder, for ``warmup``.
        extend: where experts are added: ``probed``; ablations ``random`` blocks (the probes' numbers), ``every`` block
            (one each), ``none`` (nothing is added or frozen, one shared router).
        probe_share: share of a task's records behind the probes, 0.1.
        probe_held_out: *open*: share of those kept to measure activations.
        probe_experts: N_p, 1.
        probe_rate: learning rate of the probes over the task's, 1.5 (3e-4 to 2e-4).
        probe_epochs, probe_min_steps: *open*: length of the probe training.
        alpha: of the threshold mean - alpha * std, 0.8.
        activation: *open*: share of tokens whose top-k holds the expert, or the mean logit.
        balance_weight, probe_balance_weight: of the Switch balance loss, 1e-3.
        probe_seed: of the probes' records, order and router rows, besides the run's seed; for the plan's stability.
        samples: training records behind a task's VAE.
        feature: what the locator sees: the frozen base's ``last`` hidden state, or ``pooled`` over the layers.
        decider: names a sample's task: the ``vae`` bank, or, as an ablation, the nearest class mean (``prototype``).
        locator: the VAEs.
    """

    initial_experts_from: Literal["warmup", "first_task"] = "warmup"
    warmup_train: str = ""
    warmup_images: str = ""
    extend: Literal["probed", "random", "every", "none"] = "probed"
    probe_share: float = 0.1
    probe_held_out: float = 0.2
    probe_experts: int = 1
    probe_rate: float = 1.5
    probe_epochs: int = 1
    probe_min_steps: int = 100
    alpha: float = 0.8
    activation: Literal["frequency", "logit"] = "frequency"
    balance_weight: float = 1e-3
    probe_balance_weight: float = 1e-3
    probe_seed: int = 0
    samples: int = 2000
    feature: Literal["last", "pooled"] = "last"
    decider: Literal["vae", "prototype"] = "vae"
    locator: VaeSettings = field(default_factory=VaeSettings)

    def __post_init__(self) -> None:
        if not 0 < self.probe_share <= 1 or not 0 < self.probe_held_out < 1:
            raise ClmoeError("options.probe_share and options.probe_held_out must lie between 0 and 1")
        if min(self.probe_experts, self.probe_epochs, self.samples) < 1:
            raise ClmoeError("options.probe_experts, options.probe_epochs and options.samples must be at least 1")
        if self.initial_experts_from == "warmup" and not (self.warmup_train and self.warmup_images):
            raise ClmoeError(
                "options.warmup_train and options.warmup_images are needed: LLaVA-format data disjoint from the "
                "sequence; without such data set options.initial_experts_from=first_task"
            )


class LlavaCMoe(Method):
    """Initial experts, then for each task: probe, decide, extend, train; a VAE per task at the end."""

    finds_task = True
    Options = Options

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.adapter.router_scope != "per_block":
            raise ClmoeError("llava_cmoe grows whole blocks: set adapter.router_scope=per_block")
        if (config.adapter.router_top_k or config.adapter.experts) < 2:
            raise ClmoeError(
                "adapter.router_top_k must be at least 2: a renormalised top-1 gives the router no gradient"
            )
        if config.adapter.router_top_k is None and self.options.activation == "frequency":
            raise ClmoeError(
                "options.activation=frequency needs adapter.router_top_k: a dense gate uses every expert on every "
                "token and probes never stand out; set adapter.router_top_k=2 or options.activation=logit"
            )
        experts = config.adapter.experts + self.options.probe_experts
        if self.grows and experts <= (config.adapter.router_top_k or 0):
            raise ClmoeError(
                f"adapter.router_top_k {config.adapter.router_top_k} takes every one of the {experts} experts and "
                "probes of a block, so that no probe stands out: lower it or start with more adapter.experts"
            )
        if config.adapter.train_projector:
            raise ClmoeError("llava_cmoe freezes all that is older than the task: set adapter.train_projector=false")
        self._balance_weight = self.options.balance_weight
        self._decisions: dict[str, BlockDecision] = {}
        self._sources: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        self._scored_by: tuple[Path, VaeBank, PrototypeIndex] | None = None

    def adapter(self, base: LoadedBase) -> PeftConfig:
        owner = WARM_UP_OWNER if self.options.initial_experts_from == "warmup" else 0
        return expert_adapter(self.config, base, owner)

    def check_inputs(self, previous: Path | None, data: Path) -> None:
        if previous is not None or self.options.initial_experts_from != "warmup":
            return
        for name in ("warmup_train", "warmup_images"):
            if not Path(getattr(self.options, name)).exists():
                raise ClmoeError(f"options.{name}: {getattr(self.options, name)} does not exist")

    def effective_scale(self) -> float:
        return expert_scaling(self.config.adapter) * mean_gate(self.config.adapter)

    @property
    def grows(self) -> bool:
        return self.options.extend != "none"

    @property
    def located_on(self) -> int:
        return self.options.samples

    @property
    def task_vae(self) -> VaeSettings:
        return self.options.locator

    def phases(self, context: TaskContext) -> list[Phase]:
        """Initial experts with the first task, probes, then the task itself."""
        options, first = self.options, context.previous is None
        main = Phase("trained", context.records, context.image_root, self._extend, self.end_task)
        if options.extend == "none" or (first and options.initial_experts_from == "first_task"):
            plain = Phase("trained", context.records, context.image_root, self.begin_task, self.end_task)
            return [*self._initial_phase(first), plain]
        train, self._held_out = self._probe_split(context.records)
        training = self.config.training
        steps = max(options.probe_min_steps, -(-len(train) * options.probe_epochs // training.batch_size))
        rate = options.probe_rate * training.learning_rate
        probe = Phase("probe", train, context.image_root, self._add_probes, self._decide, rate, steps)
        return [*self._initial_phase(first), probe, main]

    def _initial_phase(self, first: bool) -> list[Phase]:
        """Training of the initial experts on the warm-up data, before the first task."""
        options = self.options
        if not first or options.initial_experts_from != "warmup":
            return []
        from clmoe.data.records import load_train

        images = Path(options.warmup_images)
        records = load_train(Path(options.warmup_train), images)
        return [Phase("initial", records, images, self.begin_task, lambda context: None, of_task=False)]

    def _probe_split(self, records: Sequence[TrainRecord]) -> tuple[list[TrainRecord], list[TrainRecord]]:
        """Two disjoint parts of a share of the records: to train the probes, and to measure their activations."""
        from clmoe.data.batches import sample_records

        if len(records) < 2:
            raise ClmoeError("probes need at least 2 training records: one to train on and one to measure")
        drawn = sample_records(records, max(2, round(self.options.probe_share * len(records))), self._probe_seed)
        kept = min(len(drawn) - 1, max(1, round(self.options.probe_held_out * len(drawn))))
        return drawn[kept:], drawn[:kept]

    @property
    def _probe_seed(self) -> int:
        return self.config.seed + self.options.probe_seed

    def _add_probes(self, context: TaskContext) -> None:
        """Every block gets probes that start as the average of its experts; all older is frozen."""
        from clmoe.methods.expansion import average_expert
        from clmoe.model.adapter import expert_layers

        self._balance_weight = self.options.probe_balance_weight
        copies = self.options.probe_experts
        factors = {
            name: {k: average_expert(*e.packed(), e.rank, copies) for k, e in layer.experts.items()}
            for name, layer in expert_layers(context.model).items()
        }
        self._grow(context, factors, dict.fromkeys(factors, copies), "probe", self._probe_seed)

    def _grow(
        self,
        context: TaskContext,
        factors: dict[str, dict[str, tuple[Tensor, Tensor]]],
        added: dict[str, int],
        purpose: str,
        seed: int,
    ) -> None:
        """Freeze what is there, add a router for the task to every block and the given experts."""
        from clmoe.methods.expansion import extend_router
        from clmoe.model.adapter import add_routers, expert_layers, freeze_experts, grow_experts, seeded

        routers = {}
        for name, layer in expert_layers(context.model).items():
            generator = seeded(seed, f"{purpose}:{context.index}:{name}")
            newest = layer.routers.instance[-1].weight
            routers[name] = extend_router(newest, added[name], generator).to(newest.device)  # type: ignore[arg-type]
        freeze_experts(context.model, context.index)
        grow_experts(context.model, context.index, {name: f for name, f in factors.items() if added[name]})
        add_routers(context.model, context.index, routers)

    def _decide(self, context: TaskContext) -> None:
        """Measure the probes on held-out records, decide per block, and keep each block's most active expert."""
        from clmoe.methods.expansion import decide, measure_activations, pick_expert
        from clmoe.model.adapter import expert_layers

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
        """Throw the probes away and add the planned experts, each a copy of its block's most active one."""
        from clmoe.methods.expansion import choose_blocks

        context.load(context.sealed / "initial" if context.previous is None else context.previous)
        self._balance_weight = self.options.balance_weight
        added = choose_blocks(self._decisions, self.options.extend, self.config.seed + context.index)
        factors = {
            name: {linear: (A.repeat(added[name], 1), B.repeat(1, added[name])) for linear, (A, B) in by_linear.items()}
            for name, by_linear in self._sources.items()
        }
        self._grow(context, factors, added, "extend", self.config.seed)

    def end_task(self, context: TaskContext) -> None:
        """Save the plan, fit the task's VAE, and keep its class mean for comparison."""
        from clmoe.methods.expansion import choose_blocks, plan_as_json
        from clmoe.methods.features import add_class_mean, training_features
        from clmoe.utils.files import read_json, write_json
        from clmoe.utils.processes import from_main

        old = context.previous
        plans = [] if old is None else read_json(old / PLAN)
        added = choose_blocks(self._decisions, self.options.extend, self.config.seed + context.index)
        write_json(
            context.work / PLAN, [*plans, {"task": context.task, "blocks": plan_as_json(self._decisions, added)}]
        )
        features = training_features(context, self.options.samples, self.options.feature)
        from_main(lambda: self._add_vae(context, features))
        add_class_mean(context, PROTOTYPES, features)

    def _add_vae(self, context: TaskContext, features: Tensor) -> None:
        """Minutes of work on a CPU and the same in every process: one of them does it, on its GPU where it has one."""
        from clmoe.model.vae_bank import VaeBank
        from clmoe.utils.processes import device

        old, options = context.previous, self.options
        bank = VaeBank(options.locator, options.feature) if old is None else self._bank(old)
        bank.append(features.to(device()), self.config.seed + context.index)
        bank.save(context.work / LOCATOR)

    def extra_loss(self, model: PeftModel, trace: RouteTrace, batch: dict[str, Tensor]) -> Tensor | None:
        """Switch balance loss, summed over the blocks' routers."""
        import torch

        from clmoe.methods.expansion import balance_loss

        mask = batch["attention_mask"]
        losses = [balance_loss(output.logits, output.gate, mask) for output in trace.outputs.values()]
        return self._balance_weight * torch.stack(losses).sum()

    def feature_kind(self) -> FeatureKind:
        return self.options.feature

    def task_scores(self, checkpoint: Path, features: Tensor) -> dict[str, Tensor]:
        """z-scores of the VAE bank, and distances to the class means, negative; ``options.decider`` comes first."""
        from clmoe.model.locator import PrototypeIndex
        from clmoe.utils.processes import device

        if self._scored_by is None or self._scored_by[0] != checkpoint:  # questions come in many small batches
            self._scored_by = (checkpoint, self._bank(checkpoint), PrototypeIndex.load(checkpoint / PROTOTYPES))
        _, bank, index = self._scored_by
        found = {"vae": bank.z_scores(features.to(device())), "prototype": -index.scores(features)}
        first = self.options.decider
        return {first: found[first], **found}

    def _bank(self, checkpoint: Path) -> VaeBank:
        from clmoe.model.vae_bank import VaeBank

        return VaeBank.load(checkpoint / LOCATOR, self.options.locator, self.options.feature)

    def selection(self, model: PeftModel, tasks: Tensor) -> RouteSelection:
        """Each sample is served by its task's routers; initial experts of their own have one before the tasks'."""
        from clmoe.model.adapter import expert_config
        from clmoe.model.routing import NEWEST_ROUTER, RouteSelection

        owners = expert_config(model).router_owners
        if len(owners) == 1:  # nothing was ever extended
            return NEWEST_ROUTER
        return RouteSelection(router=tasks.to(model.device) + int(owners[0] == WARM_UP_OWNER))


METHOD: Any = LlavaCMoe
