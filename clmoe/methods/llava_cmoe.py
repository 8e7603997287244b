"""LLaVA-CMoE (arXiv 2503.21227): probes decide where a task needs new experts (PGKE), VAEs find its samples (PTL).

In the paper's order:

- eq. 1-2: every FFN mixes LoRA experts under a top-k router; a task owns a router per block that spans the experts of
  its time. Everything older than the task is frozen, bit for bit.
- section 3.2 (PGKE): probe experts, the average of a block's experts, train on a share of the task's data; a block
  gets as many new experts as probes are activated above ``mean - alpha std`` (``decide``), each a copy of the block's
  most activated expert.
- training adds the Switch Transformer's balance loss (``balance_loss``).
- section 3.3 (PTL): a VAE per task finds the task of a test sample (``locators/vae.py``).

Where the paper is silent the choice is an option of ``Options``, whose docstring says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor

from clmoe.bases.llava import LoadedBase
from clmoe.config import Config
from clmoe.data.batches import sample_records
from clmoe.data.records import TrainRecord, load_train
from clmoe.errors import ClmoeError
from clmoe.experts.layer import expert_layers, seeded
from clmoe.experts.model import add_routers, expert_config, freeze_experts, grow_experts
from clmoe.experts.routing import NEWEST_ROUTER, RouterOutput, RouteSelection, RouteTrace
from clmoe.methods.base import (
    EXPANSION,
    Method,
    Phase,
    TaskContext,
    expert_adapter,
    expert_scaling,
    mean_gate,
    over_router_outputs,
)
from clmoe.utils.files import read_json, write_json

WARM_UP_OWNER = -1
Where = Literal["probed", "random", "every", "none"]


@dataclass(frozen=True)
class Options:
    """LLaVA-CMoE's own choices. *Open* marks those the paper does not state.

    Attributes:
        initial_experts_from: *open*: the first experts learn from data disjoint from the sequence (``warmup``, the file
            in ``warmup_train``), and every task is probed; or from the first task, which then is not.
        warmup_train, warmup_images: LLaVA-format JSON and its image folder, for ``warmup``; absolute, or relative to
            the benchmark's data folder.
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
        probe_seed: added to the run's seed for the probes' records, order and router rows, to see how stable the
            decisions are.
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

    def __post_init__(self) -> None:
        if not 0 < self.probe_share <= 1 or not 0 < self.probe_held_out < 1:
            raise ClmoeError("options.probe_share and options.probe_held_out must lie between 0 and 1")
        if min(self.probe_experts, self.probe_epochs) < 1:
            raise ClmoeError("options.probe_experts and options.probe_epochs must be at least 1")
        if self.initial_experts_from == "warmup" and not (self.warmup_train and self.warmup_images):
            raise ClmoeError(
                "options.warmup_train and options.warmup_images are needed: LLaVA-format data disjoint from the "
                "sequence; without such data set options.initial_experts_from=first_task"
            )


class LlavaCMoe(Method):
    """Initial experts, then for each task: probe, decide, extend, train; a VAE per task at the end."""

    keeps_parts = True
    Options = Options

    def __init__(self, config: Config) -> None:
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

    def effective_scale(self) -> float:
        return expert_scaling(self.config.adapter) * mean_gate(self.config.adapter)

    @property
    def grows(self) -> bool:
        return self.options.extend != "none"

    def phases(self, context: TaskContext) -> list[Phase]:
        """Initial experts with the first task, probes, then the task itself."""
        options, first = self.options, context.previous is None
        main = Phase("trained", context.records, context.image_root, self._extend, self.end_task)
        if options.extend == "none" or (first and options.initial_experts_from == "first_task"):
            plain = Phase("trained", context.records, context.image_root, self.begin_task, self.end_task)
            return [*self._initial_phase(context), plain]
        train, self._held_out = self._probe_split(context.records)
        training = self.config.training
        steps = max(options.probe_min_steps, -(-len(train) * options.probe_epochs // training.batch_size))
        rate = options.probe_rate * training.learning_rate
        probe = Phase("probe", train, context.image_root, self._add_probes, self._decide, rate, steps)
        return [*self._initial_phase(context), probe, main]

    def _initial_phase(self, context: TaskContext) -> list[Phase]:
        """Training of the initial experts on the warm-up data, before the first task."""
        options = self.options
        if context.previous is not None or options.initial_experts_from != "warmup":
            return []
        images = context.data / options.warmup_images
        records = load_train(context.data / options.warmup_train, images)
        return [Phase("initial", records, images, self.begin_task, lambda context: None, of_task=False)]

    def _probe_split(self, records: Sequence[TrainRecord]) -> tuple[list[TrainRecord], list[TrainRecord]]:
        """Two disjoint parts of a share of the records: to train the probes, and to measure their activations."""
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
        added = choose_blocks(self._decisions, self.options.extend, self.config.seed + context.index)
        factors = {
            name: {linear: (A.repeat(added[name], 1), B.repeat(1, added[name])) for linear, (A, B) in by_linear.items()}
            for name, by_linear in self._sources.items()
        }
        self._grow(context, factors, added, "extend", self.config.seed)

    def end_task(self, context: TaskContext) -> None:
        """Record what the probes said and what was added."""
        old = [] if context.previous is None else read_json(context.previous / EXPANSION)
        added = choose_blocks(self._decisions, self.options.extend, self.config.seed + context.index)
        newest = {"task": context.task, "blocks": decisions_as_json(self._decisions, added)}
        write_json(context.work / EXPANSION, [*old, newest])

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
    """What the probes said of one block.

    Attributes:
        activations: ``[E + N_p]`` of the block's experts, probes last.
        probes: how many of them are probes.
        threshold: mean - alpha * std (population) over ``activations``.
        extend: ``N_s``, the number of experts to add.
        margin: distance of the probe nearest to the limit from it; the decision is safe where this is not small.
    """

    activations: list[float]
    probes: int
    threshold: float
    extend: int
    margin: float

    @property
    def most_active(self) -> int:
        """Index of the most activated expert, probes included; ties go to the older one."""
        return max(range(len(self.activations)), key=lambda i: (self.activations[i], -i))


def decide(activations: Tensor, probes: int, alpha: float) -> BlockDecision:
    """Count the probes whose activation is strictly above ``max(mean - alpha * std, 0)``.

    With concentrated routing ``mean - alpha * std`` is negative and a probe that is never used would pass; the floor
    at 0 stops that.

    Args:
        activations: ``[E + probes]``, the last ``probes`` entries are the probes'.
        alpha: 0.8 in the paper.
    """
    values = activations.double()
    threshold = float(values.mean() - alpha * values.std(unbiased=False))
    limit = max(threshold, 0.0)
    probed = values[-probes:]
    return BlockDecision(
        values.tolist(), probes, threshold, int((probed > limit).sum()), float((probed - limit).abs().min())
    )


def choose_blocks(decisions: dict[str, BlockDecision], where: Where, seed: int) -> dict[str, int]:
    """Number of experts to add to each block, by the probes or by an ablation.

    ``random`` gives the probes' numbers to blocks drawn at random (same total); ``every`` adds one expert to each
    block; ``none`` adds nothing.
    """
    if where == "none":
        return dict.fromkeys(decisions, 0)
    if where == "every":
        return dict.fromkeys(decisions, 1)
    counts = {block: decision.extend for block, decision in decisions.items()}
    if where == "random":
        blocks = list(counts)
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
        return {block: counts[blocks[k]] for block, k in zip(blocks, order, strict=True)}
    return counts


def average_expert(A: Tensor, B: Tensor, rank: int, copies: int) -> tuple[Tensor, Tensor]:
    """``copies`` experts that each equal the mean of the factors of all given ones: how probes start.

    ``A [E*r, din]``, ``B [dout, E*r]`` -> ``A [copies*r, din]``, ``B [dout, copies*r]``.
    """
    mean_A = A.detach().view(-1, rank, A.shape[1]).mean(0)
    mean_B = B.detach().reshape(B.shape[0], -1, rank).mean(1)
    return mean_A.repeat(copies, 1), mean_B.repeat(1, copies)


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
    """Switch Transformer's balance loss of one router, a mean over samples.

    ``E * sum_e f_e P_e`` with ``f_e`` the share of picks and ``P_e`` the mean softmax probability, both over one
    sample's non-padding tokens, so that the loss does not depend on how a batch is cut. 1 when balanced.

    Args:
        logits, gate: ``[B, T, E]`` float32; an expert is picked where its gate is positive.
        mask: ``[B, T]``, nonzero where a token is real.
    """
    real = mask.unsqueeze(-1).to(logits.dtype)
    tokens = real.sum(1)
    picked = (gate > 0).to(logits.dtype) * real
    share = picked.sum(1) / picked.sum((1, 2)).unsqueeze(-1)
    probability = (logits.softmax(-1) * real).sum(1) / tokens
    return (logits.shape[-1] * (share * probability).sum(-1)).mean()


def decisions_as_json(decisions: dict[str, BlockDecision], added: dict[str, int]) -> dict[str, Any]:
    """As saved: per block the activations, the threshold, its margin, and what was added."""
    return {
        block: {
            "activations": decision.activations,
            "probes": decision.probes,
            "threshold": decision.threshold,
            "margin": decision.margin,
            "probed": decision.extend,
            "added": added[block],
        }
        for block, decision in decisions.items()
    }


def measure_activations(
    context: TaskContext, records: Sequence[TrainRecord], kind: Literal["frequency", "logit"]
) -> dict[str, Tensor]:
    """Activation of every expert of every patched module under the newest routers, ``[E]`` float64.

    ``frequency``: share of non-padding tokens whose top-k holds the expert, from int64 counts; ``logit``: mean logit.
    """

    def total(output: RouterOutput, mask: Tensor) -> tuple[Tensor, int]:
        real = mask.bool()
        values = (output.gate[real] > 0).sum(0) if kind == "frequency" else output.logits[real].double().sum(0)
        return values.cpu(), int(real.sum())

    batches = over_router_outputs(context, records, total)
    activations = {}
    for name in batches[0]:
        values, tokens = zip(*(batch[name] for batch in batches), strict=True)
        activations[name] = torch.stack(values).sum(0).double() / sum(tokens)
    return activations


METHODS = {"llava_cmoe": LlavaCMoe}
