"""MR-LoRA (MLLM-CL, 2025): a LoRA per task, and one more that reads image and question and says which one to use.

Task t trains ``B_t A_t`` alone, from the bare base. Before it, a router, also a LoRA on the bare base, learns from
scratch, from a few stored samples of each of tasks 1..t, to answer ``referral(question)`` with the letter of its task:

    y = W0 x + s * B_i A_i x,    i = argmax over letters of p( letter | image, referral(q); base + s * B_r A_r )

The released code's router is a LoRA on the base with the mean of all tasks' LoRAs merged in, including task t's:
``options.variant=released`` trains it last, next to them. The code describes each expert in a sentence
(``options.descriptions``) and picks a random task if the model gives no letter; here only letters count.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor

from clmoe.bases.inputs import answer_letters
from clmoe.config import Config
from clmoe.errors import ClmoeError
from clmoe.experts.layer import expert_layers
from clmoe.experts.model import attach_adapter, detach_adapter
from clmoe.experts.routing import LETTER_ROUTER, RouteSelection
from clmoe.methods.base import ADAPTER_FILE, Phase, TaskContext, lora_adapter
from clmoe.methods.bounds import Separate
from clmoe.methods.letter_router import begin_beside, place_router, referral, router_records
from clmoe.methods.memory import MEMORY, Remembered, check_memory, load_memory, save_memory
from clmoe.utils.schema import Count, Positive, Steps


@dataclass(frozen=True)
class Options:
    """MR-LoRA's own choices; the defaults are those of the released scripts.

    Attributes:
        stored: training records kept of each task for the router, 20.
        router_rank: a multiple of ``adapter.rank``; 128.
        router_rate: learning rate of the router relative to the tasks', 0.25 (5e-6 to 2e-5).
        router_epochs, router_batch: passes over the stored records, 40, and the global batch, 32 (4 on each of 8 GPUs).
        variant: the router's base is bare (``published``), or has the mean of all tasks' LoRAs added (``released``).
        descriptions: of tasks, for the list of experts that the router reads; a task without one is listed by name.
    """

    stored: Steps = 20
    router_rank: Count = 128
    router_rate: Positive = 0.25
    router_epochs: Count = 40
    router_batch: Count = 32
    variant: Literal["published", "released"] = "published"
    descriptions: dict[str, str] = field(default_factory=dict)


class MrLora(Separate):
    """The router is kept as experts of ``LETTER_ROUTER``, before those of the tasks."""

    letters = True
    memory = "stored"
    Options = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if self.options.router_rank % config.adapter.rank:
            raise ClmoeError(
                f"options.router_rank {self.options.router_rank} is not a multiple of adapter.rank "
                f"{config.adapter.rank}: the router is kept as several experts of that rank"
            )

    @property
    def shared_rank(self) -> int:
        return self.options.router_rank

    def ranked(self, rank: int) -> Config:
        """The router's rank scales with the tasks'."""
        config = super().ranked(rank)
        router = self.options.router_rank // self.config.adapter.rank * rank
        return replace(config, options=config.options | {"router_rank": router})

    def referral(self, question: str, experts: Mapping[str, str]) -> str:
        return referral(question, {key: self.options.descriptions.get(task, task) for key, task in experts.items()})

    def check_inputs(self, previous: Path | None, data: Path) -> None:
        check_memory(previous, data)

    def phases(self, context: TaskContext) -> list[Phase]:
        """From the second task on, the router, then the task's own LoRA; as released, the router comes last."""
        options, training = self.options, self.config.training
        self._memory = [*load_memory(context.previous), Remembered.of(context, options.stored)]
        own = super().phases(context)
        if len(self._memory) == 1:
            return own
        letters, tasks = answer_letters(context.base, len(self._memory)), [past.task for past in self._memory]
        experts = dict(zip(letters, tasks, strict=True))
        records = router_records(self._memory, list(letters), lambda question: self.referral(question, experts))
        rate, size = options.router_rate * training.learning_rate, options.router_batch
        steps = -(-len(records) * options.router_epochs // size)
        during = records, context.data, self._begin_router, lambda context: None
        router = Phase("router", *during, rate, steps, size, of_task=False)
        if self.options.variant == "published":
            return [router, *own]
        later = replace(router, begin=self._begin_beside, end=self.end_task)
        return [*(replace(phase, end=lambda context: None) for phase in own), later]

    def _begin_router(self, context: TaskContext) -> None:
        """A fresh LoRA of the router's rank, with the tasks' scale."""
        adapter, rank = self.config.adapter, self.options.router_rank
        wider = replace(adapter, rank=rank, alpha=adapter.alpha * rank / adapter.rank)
        self._attach(context, replace(self.config, adapter=wider))

    def _begin_beside(self, context: TaskContext) -> None:
        """Fresh experts for the router next to the tasks' LoRAs, which are frozen and count ``1 / t`` each."""
        self._append_own(context)
        begin_beside(context.model, context.index + 1, self.options.router_rank, self.config.seed)

    def begin_task(self, context: TaskContext) -> None:
        """A fresh LoRA for the task, as if no router came before it."""
        self._attach(context, self.config)

    def _attach(self, context: TaskContext, config: Config) -> None:
        detach_adapter(context.model)
        torch.manual_seed(config.seed)  # peft draws from the global generator
        context.model = attach_adapter(context.base.model, lora_adapter(config, context.base))

    def end_task(self, context: TaskContext) -> None:
        """Append the trained LoRA to the parent's, replace the old router with the new one, and keep the samples."""
        self._append_own(context)
        save_memory(self._memory, context.work / MEMORY)
        kind = "lora_{factor}.weight" if self.options.variant == "published" else "clmoe_experts.{linear}.{factor}"
        if context.index:
            place_router(context.model, context.index + 1, context.sealed / "router" / ADAPTER_FILE, kind)

    def _append_own(self, context: TaskContext) -> None:
        """Append the task's LoRA as ``separate`` does, whichever phase is running."""
        phase, context.trained = context.trained, context.sealed / "trained"
        super().end_task(context)
        context.trained = phase

    def selection(self, model: PeftModel, tasks: Tensor) -> RouteSelection:
        """A task's LoRA, or the router; as released, the router has the mean of all LoRAs next to it."""
        if self.options.variant == "published" or bool((tasks != LETTER_ROUTER).any()):
            return super().selection(model, tasks)
        count = 1 + max(next(iter(expert_layers(model).values())).routers.owners)
        shares = torch.tensor([1 / count] * count + [1.0], device=model.device)  # the last is for -1, the router
        return RouteSelection(weights=shares.expand(len(tasks), -1))


METHODS = {"mrlora": MrLora}
