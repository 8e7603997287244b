"""LLaVA-CMoE (arXiv 2503.21227): probes decide where a task needs new experts (PGKE), VAEs find its samples (PTL).

In the paper's order:

- eq. 1-2: every FFN mixes LoRA experts under a top-k router; a task owns a router per block that spans the experts of
  its time. Everything older than the task is frozen, bit for bit.
- section 3.2 (PGKE): probes, averages of a block's experts, train on a share of the data; a block gets as many copies
  of its most activated expert as probes are activated above ``mean - alpha std`` (``decide``).
- training adds the Switch Transformer's balance loss (``balance_loss``).
- section 3.3 (PTL): a VAE per task finds the task of a test sample (``locators/vae.py``).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor

from clmoe.bases.inputs import AnswersFit
from clmoe.bases.llava import LoadedBase
from clmoe.config import Config
from clmoe.data.batches import sample_records
from clmoe.data.records import TrainRecord, load_train
from clmoe.errors import ClmoeError
from clmoe.experts.layer import expert_layers, seeded
from clmoe.experts.model import add_routers, expert_config, freeze_experts, grow_experts
from clmoe.experts.routing import NEWEST_ROUTER, RouterOutput, RouteSelection, RouteTrace
from clmoe.methods.base import EXPANSION, Phase, TaskContext, expert_adapter, router_sums
from clmoe.methods.lora import MoeLora
from clmoe.utils.files import read_json, write_json
from clmoe.utils.schema import Count, Inside, NotNegative, Positive, Range

WARM_UP_OWNER = -1
Where = Literal["probed", "random", "every", "none"]
Factors = dict[str, dict[str, tuple[Tensor, Tensor]]]  # module -> linear -> ``A [n*r, din]``, ``B [dout, n*r]``


@dataclass(frozen=True)
class Options:
    """LLaVA-CMoE's own choices. *Open* marks those the paper does not state.

    Attributes:
        initial_experts_from: *open*: the first experts learn from data of their own, or from an unprobed first task.
        warmup_train, warmup_images: LLaVA-format JSON and image folder of ``warmup``, absolute or in the data folder.
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
        probe_seed: added to the run's seed for the probes' records, order and router rows: are decisions stable?
    """

    initial_experts_from: Literal["warmup", "first_task"] = "first_task"
    warmup_train: str = ""
    warmup_images: str = ""
    extend: Where = "probed"
    probe_share: Annotated[float, Range(0, 1, "low")] = 0.1
    probe_held_out: Inside = 0.2
    probe_experts: Annotated[int, Range(1, 1024)] = 1
    probe_rate: Positive = 1.5
    probe_epochs: Count = 1
    probe_min_steps: Annotated[int, Range(0, 2**31 - 1)] = 100
    alpha: Annotated[float, Range(-1e6, 1e6)] = 0.8
    activation: Literal["frequency", "logit"] = "frequency"
    balance_weight: NotNegative = 1e-3
    probe_balance_weight: NotNegative = 1e-3
    probe_seed: Annotated[int, Range(0, 2**31 - 1)] = 0

    def __post_init__(self) -> None:
        if self.initial_experts_from == "warmup" and not (self.warmup_train and self.warmup_images):
            raise ClmoeError(
                "options.warmup_train and options.warmup_images are needed: LLaVA-format data disjoint from the "
                "sequence; without such data set options.initial_experts_from=first_task"
            )


class LlavaCMoe(MoeLora):
    """Initial experts, then for each task: probe, decide, extend, train."""

    keeps_parts = True
    Options = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        adapter, top_k = config.adapter, config.adapter.router_top_k
        if adapter.router_scope != "per_block":
            raise ClmoeError("llava_cmoe grows whole blocks: set adapter.router_scope=per_block")
        if (top_k or adapter.experts) < 2:
            raise ClmoeError(
                "adapter.router_top_k must be at least 2: a renormalised top-1 gives the router no gradient"
            )
        if top_k is None and self.options.activation == "frequency":
            raise ClmoeError(
                "options.activation=frequency needs adapter.router_top_k: a dense gate uses every expert on every "
                "token and probes never stand out; set adapter.router_top_k=2 or options.activation=logit"
            )
        experts = adapter.experts + self.options.probe_experts
        if self.grows and experts <= (top_k or 0):
            raise ClmoeError(
                f"adapter.router_top_k {top_k} takes every one of the {experts} experts and probes of a block, so that "
                "no probe stands out: lower it or start with more adapter.experts"
            )
        if adapter.train_projector:
            raise ClmoeError("llava_cmoe freezes all that is older than the task: set adapter.train_projector=false")
        self._balance_weight = self.options.balance_weight
        self._probe_seed = config.seed + self.options.probe_seed
        self._decisions: dict[str, BlockDecision] = {}
        self._sources: Factors = {}

    def adapter(self, base: LoadedBase) -> PeftConfig:
        owner = WARM_UP_OWNER if self.options.initial_experts_from == "warmup" else 0
        return expert_adapter(self.config, base, owner)

    def check_inputs(self, previous: Path | None, data: Path) -> None:
        if previous is not None or self.options.initial_experts_from != "warmup":
            return
        for name in ("warmup_train", "warmup_images"):
            path = data / getattr(self.options, name)
            if not path.exists():
                raise ClmoeError(f"options.{name}: {path} does not exist")

    def reads(self, previous: Path | None, data: Path) -> list[Path]:
        warms_up = previous is None and self.options.initial_experts_from == "warmup"
        return [data / self.options.warmup_train] if warms_up else []

    @property
    def grows(self) -> bool:
        return self.options.extend != "none"

    def phases(self, context: TaskContext) -> list[Phase]:
        """Initial experts with the first task, probes, then the task itself."""
        options, training, first = self.options, self.config.training, context.previous is None
        phases = []
        if first and options.initial_experts_from == "warmup":
            images = context.data / options.warmup_images
            fits = AnswersFit(context.base.encoder, training.max_length)
            records = load_train(context.data / options.warmup_train, images, training.on_bad_record, fits)
            phases = [Phase("initial", records, images, self.begin_task, lambda context: None, of_task=False)]
        if options.extend == "none" or (first and options.initial_experts_from == "first_task"):
            return [*phases, *super().phases(context)]
        train, self._held_out = self._probe_split(context.records)
        steps = max(options.probe_min_steps, -(-len(train) * options.probe_epochs // training.batch_size))
        rate = options.probe_rate * training.learning_rate
        probe = Phase("probe", train, context.image_root, self._add_probes, self._decide, rate, steps)
        main = Phase("trained", context.records, context.image_root, self._extend, self.end_task)
        return [*phases, probe, main]

    def _probe_split(self, records: Sequence[TrainRecord]) -> tuple[list[TrainRecord], list[TrainRecord]]:
        """Two disjoint parts of a share of the records: to train the probes, and to measure their activations."""
        if len(records) < 2:
            raise ClmoeError("probes need at least 2 training records: one to train on and one to measure")
        drawn = sample_records(records, max(2, round(self.options.probe_share * len(records))), self._probe_seed)
        kept = min(len(drawn) - 1, max(1, round(self.options.probe_held_out * len(drawn))))
        return drawn[kept:], drawn[:kept]

    def _add_probes(self, context: TaskContext) -> None:
        """Every block gets probes that start as the average of its experts; all older is frozen."""
        self._balance_weight = self.options.probe_balance_weight
        averages = {
            name: {k: average_expert(*e.packed(), e.rank) for k, e in layer.experts.items()}
            for name, layer in expert_layers(context.model).items()
        }
        self._grow(context, averages, dict.fromkeys(averages, self.options.probe_experts), "probe", self._probe_seed)

    def _grow(self, context: TaskContext, source: Factors, added: dict[str, int], purpose: str, seed: int) -> None:
        """Freeze what is there; every block gets a router for the task, and so many copies of its source expert."""
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
        """Drop the probes and add the experts that were decided, each a copy of its block's most active one."""
        context.load(context.sealed / "initial" if context.previous is None else context.previous)
        self._balance_weight = self.options.balance_weight
        self._grow(context, self._sources, self._added(context), "extend", self.config.seed)

    def _added(self, context: TaskContext) -> dict[str, int]:
        return choose_blocks(self._decisions, self.options.extend, self.config.seed + context.index)

    def end_task(self, context: TaskContext) -> None:
        """Record what the probes said and what was added."""
        old = [] if context.previous is None else read_json(context.previous / EXPANSION)
        added = self._added(context)
        blocks = {name: asdict(decision) | {"added": added[name]} for name, decision in self._decisions.items()}
        write_json(context.work / EXPANSION, [*old, {"task": context.task, "blocks": blocks}])

    def extra_loss(self, model: PeftModel, trace: RouteTrace, batch: dict[str, Tensor]) -> Tensor | None:
        """Switch balance loss, summed over the blocks' routers."""
        mask = batch["attention_mask"]
        losses = [balance_loss(output.logits, output.gate, mask) for output in trace.outputs.values()]
        return self._balance_weight * torch.stack(losses).sum()

    def selection(self, model: PeftModel, tasks: Tensor) -> RouteSelection:
        """Each sample is served by its task's routers; initial experts of their own have one before the tasks'."""
        owners = expert_config(model).router_owners
        if len(owners) == 1:  # nothing was ever extended
            return NEWEST_ROUTER
        return RouteSelection(router=tasks.to(model.device) + int(owners[0] == WARM_UP_OWNER))


@dataclass(frozen=True)
class BlockDecision:
    """What the probes said of one block, as it stands in the file.

    Attributes:
        activations: ``[E + N_p]`` of the block's experts, the ``probes`` last.
        threshold: mean - alpha * std (population) over ``activations``.
        margin: distance of the probe nearest to the limit from it; the decision is safe where this is not small.
        probed: ``N_s``, the number of experts to add.
    """

    activations: list[float]
    probes: int
    threshold: float
    margin: float
    probed: int

    @property
    def most_active(self) -> int:
        """Index of the most activated expert, probes included; ties go to the older one."""
        return max(range(len(self.activations)), key=lambda i: (self.activations[i], -i))


def decide(activations: Tensor, probes: int, alpha: float) -> BlockDecision:
    """Count the probes, the last of ``activations [E + probes]``, that are above ``max(mean - alpha * std, 0)``.

    The floor at 0 stops unused probes where concentrated routing makes ``mean - alpha * std`` negative.
    """
    values = activations.double()
    threshold = float(values.mean() - alpha * values.std(unbiased=False))
    above = values[-probes:] - max(threshold, 0.0)
    return BlockDecision(values.tolist(), probes, threshold, float(above.abs().min()), int((above > 0).sum()))


def choose_blocks(decisions: dict[str, BlockDecision], where: Where, seed: int) -> dict[str, int]:
    """Number of experts to add to each block; ``random`` gives the probes' numbers to blocks drawn at random."""
    if where in ("none", "every"):
        return dict.fromkeys(decisions, int(where == "every"))
    counts = [decision.probed for decision in decisions.values()]
    if where == "random":
        order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed)).tolist()
        counts = [counts[k] for k in order]
    return dict(zip(decisions, counts, strict=True))


def average_expert(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The mean of the factors of all experts, how probes start: ``A [E*r, din]``, ``B [dout, E*r]`` -> of one."""
    mean_A = A.detach().view(-1, rank, A.shape[1]).mean(0)
    return mean_A, B.detach().reshape(B.shape[0], -1, rank).mean(1)


def pick_expert(A: Tensor, B: Tensor, rank: int, index: int) -> tuple[Tensor, Tensor]:
    """A copy of expert ``index``: how the experts of an extended block start. ``A [r, din]``, ``B [dout, r]``."""
    rows = slice(index * rank, (index + 1) * rank)
    return A[rows].detach().clone(), B[:, rows].detach().clone()


def extend_router(weight: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """A copy of ``weight [E, din]`` with ``rows`` new ones from ``N(0, std of the copied rows)``."""
    old = weight.detach().cpu()
    new = torch.randn(rows, old.shape[1], generator=generator) * old.std(unbiased=False)
    return torch.cat([old, new])


def balance_loss(logits: Tensor, gate: Tensor, mask: Tensor) -> Tensor:
    """Switch Transformer's balance loss of one router, ``E * sum_e f_e P_e``, a mean over samples; 1 when balanced.

    ``f_e`` is the share of picks (gate ``[B, T, E]`` positive) and ``P_e`` the mean probability (softmax of logits
    ``[B, T, E]``) over one sample's real tokens (mask ``[B, T]``).
    """
    real = mask.unsqueeze(-1).to(logits.dtype)
    tokens = real.sum(1)
    picked = (gate > 0).to(logits.dtype) * real
    share = picked.sum(1) / picked.sum((1, 2)).unsqueeze(-1)
    probability = (logits.softmax(-1) * real).sum(1) / tokens
    return (logits.shape[-1] * (share * probability).sum(-1)).mean()


def measure_activations(
    context: TaskContext, records: Sequence[TrainRecord], kind: Literal["frequency", "logit"]
) -> dict[str, Tensor]:
    """Each expert's share of real tokens whose top-k holds it, or its mean logit: patched module -> ``[E]`` float64."""

    def count(output: RouterOutput, mask: Tensor) -> tuple[Tensor, Tensor]:
        real = mask.bool()
        values = (output.gate[real] > 0).sum(0) if kind == "frequency" else output.logits[real].double().sum(0)
        return values.cpu(), real.sum().cpu()

    sums = router_sums(context, records, count)
    return {name: values.double() / tokens for name, (values, tokens) in sums.items()}


METHODS = {"llava_cmoe": LlavaCMoe}
