"""LLaVA-CMoE (arXiv 2503.21227): probes decide where a task needs new experts (PGKE), and VAEs find its samples (PTL).

In the paper's order:

- eq. 1-2: every FFN mixes LoRA experts under a top-k router; a task owns a router per block, which spans the
  experts that exist at its time. Everything older than the task is frozen, bit for bit.
- section 3.2 (PGKE): probes say which blocks need new experts for a task (``pgke.py``).
- training adds the Switch Transformer's balance loss (``balance_loss``).
- section 3.3 (PTL): a VAE per task finds the task of a test sample (``locators/vae.py``).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor

from clmoe.bases.inputs import AnswersFit
from clmoe.bases.llava import LoadedBase
from clmoe.config import Config
from clmoe.data.records import load_train
from clmoe.errors import ClmoeError
from clmoe.experts.model import expert_config
from clmoe.experts.routing import NEWEST_ROUTER, RouteSelection, RouteTrace
from clmoe.methods.base import Phase, TaskContext, expert_adapter
from clmoe.methods.pgke import ProbeGuided, ProbeOptions
from clmoe.utils.schema import NotNegative

WARM_UP_OWNER = -1


@dataclass(frozen=True)
class Options(ProbeOptions):
    """LLaVA-CMoE's own choices besides ``ProbeOptions``. *Open* marks those the paper does not state.

    Attributes:
        initial_experts_from: *open*: the first experts learn from separate data, or from an unprobed first task.
        warmup_train, warmup_images: LLaVA-format JSON and image folder of ``warmup``, absolute or in the data folder.
        balance_weight, probe_balance_weight: weight of the Switch balance loss, 1e-3.
    """

    initial_experts_from: Literal["warmup", "first_task"] = "first_task"
    warmup_train: str = ""
    warmup_images: str = ""
    balance_weight: NotNegative = 1e-3
    probe_balance_weight: NotNegative = 1e-3

    def __post_init__(self) -> None:
        if self.initial_experts_from == "warmup" and not (self.warmup_train and self.warmup_images):
            raise ClmoeError(
                "options.warmup_train and options.warmup_images are needed: LLaVA-format data disjoint from the "
                "sequence; without such data set options.initial_experts_from=first_task"
            )


class LlavaCMoe(ProbeGuided):
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
                "token, so probes never stand out; set adapter.router_top_k=2 or options.activation=logit"
            )
        experts = adapter.experts + self.options.probe_experts
        if self.grows and experts <= (top_k or 0):
            raise ClmoeError(
                f"adapter.router_top_k {top_k} takes every one of the {experts} experts and probes of a block, so "
                "no probe stands out: lower it or start with more adapter.experts"
            )
        if adapter.train_projector:
            raise ClmoeError("llava_cmoe freezes everything older than the task: set adapter.train_projector=false")

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

    def phases(self, context: TaskContext) -> list[Phase]:
        """Initial experts for the first task, then probes, then the task itself."""
        options, training, first = self.options, self.config.training, context.previous is None
        phases = []
        if first and options.initial_experts_from == "warmup":
            images = context.data / options.warmup_images
            fits = AnswersFit(context.base.encoder, training.max_length)
            records = load_train(context.data / options.warmup_train, images, training.on_bad_record, fits)
            phases = [Phase("initial", records, images, self.begin_task, lambda context: None, of_task=False)]
        if options.extend == "none" or (first and options.initial_experts_from == "first_task"):
            return [*phases, *super().phases(context)]
        return [*phases, *self.probed_phases(context)]

    def extra_loss(self, model: PeftModel, trace: RouteTrace, batch: dict[str, Tensor]) -> Tensor | None:
        """Switch balance loss, summed over the blocks' routers."""
        mask = batch["attention_mask"]
        losses = [balance_loss(output.logits, output.gate, mask) for output in trace.outputs.values()]
        weight = self.options.probe_balance_weight if self._probing else self.options.balance_weight
        return weight * torch.stack(losses).sum()

    def selection(self, model: PeftModel, tasks: Tensor) -> RouteSelection:
        """Each sample uses its task's routers; warmed-up initial experts have a router before the tasks'."""
        owners = expert_config(model).router_owners
        if len(owners) == 1:  # nothing was ever extended
            return NEWEST_ROUTER
        return RouteSelection(router=tasks.to(model.device) + int(owners[0] == WARM_UP_OWNER))


def balance_loss(logits: Tensor, gate: Tensor, mask: Tensor) -> Tensor:
    """Switch Transformer's balance loss of one router, ``E * sum_e f_e P_e``, averaged over samples; 1 when balanced.

    ``f_e`` is the share of picks (gate ``[B, T, E]`` positive) and ``P_e`` the mean probability (softmax of logits
    ``[B, T, E]``) over one sample's real tokens (mask ``[B, T]``).
    """
    real = mask.unsqueeze(-1).to(logits.dtype)
    tokens = real.sum(1)
    picked = (gate > 0).to(logits.dtype) * real
    share = picked.sum(1) / picked.sum((1, 2)).unsqueeze(-1)
    probability = (logits.softmax(-1) * real).sum(1) / tokens
    return (logits.shape[-1] * (share * probability).sum(-1)).mean()


METHODS = {"llava_cmoe": LlavaCMoe}
