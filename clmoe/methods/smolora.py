"""SMoLoRA (ICCV 2025): of eight LoRA experts, one is picked by what a sample shows and one by how to answer it.

The first half of a linear's experts is for visual understanding (VU), the second for instruction following (IF):

    i = argmax W_vu x_mean        x_mean: mean of x over the sample's prompt
    j = argmax W_if e             e: embedding of the instruction of the sample's task
    v = s * B_i A_i x,  f = s * B_j A_j x,  (alpha, beta) = softmax( w_A . v, w_B . f )
    y = W0 x + alpha * v + beta * f

Experts, ``w_A`` and ``w_B`` train on every task; both gates train on the first task only and are then fixed. Nothing is
replayed. A test sample gets the instruction of the task that the locator finds.

*Open*: how a gate learns through its argmax (ours: its softmax's gradient, straight through), and the embedding (ours:
the mean of the frozen base's features of a task's questions without images, scaled to length 1; the paper: a sentence
encoder's embedding of a fixed text for each task).

In the released code the mask is a constant, so neither gate ever learns; during generation, ``x_mean`` is the newest
token alone; and the scripts give the task of each test set. ``options.variant=released`` reproduces the first two, and
``locator=oracle`` with it the third. Training there includes the answer, and padding, in ``x_mean``, which here would
show the gate what it has to predict.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.nn.functional import normalize

from clmoe.bases.llava import LoadedBase
from clmoe.config import Config
from clmoe.data.batches import first_questions, sample_records
from clmoe.errors import ClmoeError
from clmoe.experts.forward import FeatureStore
from clmoe.experts.layer import expert_layers
from clmoe.experts.model import add_task_gates
from clmoe.experts.routing import RouteSelection
from clmoe.experts.separable import SeparableBank, best
from clmoe.methods.base import Phase, TaskContext, expert_adapter
from clmoe.methods.lora import MoeLora
from clmoe.utils.schema import Positive, Steps

GATES = (".instance.", ".instruction.")  # in the names of their weights


@dataclass(frozen=True)
class Options:
    """SMoLoRA's own choices.

    Attributes:
        variant: gates that train on the first task (``published``), or that never do (``released``).
        gate_rate: *open*: learning rate of the gates relative to the experts'.
        samples: *open*: training records used for a task's embedding.
    """

    variant: Literal["published", "released"] = "published"
    gate_rate: Positive = 1.0
    samples: Steps = 200


class SMoLora(MoeLora):
    """The experts that a task's instruction picks are kept as the task's gates, which the located task selects."""

    keeps_parts = True
    Options = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        adapter = config.adapter
        if adapter.router_scope != "per_linear":
            raise ClmoeError(f"adapter.router_scope {adapter.router_scope}: {config.method} needs per_linear")
        if adapter.router_top_k != 2 or adapter.experts % 2:
            raise ClmoeError(
                f"adapter.experts {adapter.experts}, router_top_k {adapter.router_top_k}: {config.method} takes 2 of "
                "an even number of experts, one from each half"
            )
        self._gates_learn = self.options.variant == "published"

    def adapter(self, base: LoadedBase) -> PeftConfig:
        config = expert_adapter(self.config, base)
        config.instruction_width = base.model.config.get_text_config().hidden_size
        return config

    def rate_factor(self, name: str) -> float:
        if not any(gate in name for gate in GATES):
            return 1.0
        return self.options.gate_rate if self._gates_learn else 0.0

    def phases(self, context: TaskContext) -> list[Phase]:
        """From the second task on, the gates are fixed."""
        self._gates_learn = self.options.variant == "published" and context.previous is None
        return super().phases(context)

    def begin_task(self, context: TaskContext) -> None:
        """Show every linear the task's instruction."""
        self._banks = banks(context.model)
        self._show(self._instruction(context))

    def _show(self, embedding: Tensor) -> None:
        for bank in self._banks.values():
            bank.embedding = embedding

    def _instruction(self, context: TaskContext) -> Tensor:
        """``e [D]`` float32 of the task."""
        config, base = self.config, context.base
        size, share = config.evaluation.batch_size, config.evaluation.share_images
        store = FeatureStore(base, config.locator.feature, size, None, share, "text")
        questions = first_questions(sample_records(context.records, self.options.samples, config.seed))
        features = store.features(context.model, questions, context.image_root)
        return normalize(features.double().mean(0), dim=0).float().to(base.device)

    def state(self) -> dict[str, Tensor]:
        """``e``: processes other than those at the task's start would compute it with different rounding."""
        bank = next(iter(self._banks.values()))
        return {"instruction": bank.embedding}  # type: ignore[dict-item]

    def load_state(self, state: dict[str, Tensor]) -> None:
        device = next(iter(self._banks.values())).fusion.device
        self._show(state["instruction"].to(device))

    @torch.no_grad()
    def end_task(self, context: TaskContext) -> None:
        """Keep the experts that the task's instruction picks."""
        embedding = self._instruction(context).unsqueeze(0)
        found = {
            name: best(bank.instruction(embedding), trains=False)[0] for name, bank in banks(context.model).items()
        }
        add_task_gates(context.model, {name: torch.cat([torch.zeros_like(j), j]) for name, j in found.items()})

    def selection(self, model: PeftModel, tasks: Tensor) -> RouteSelection:
        """Use the experts of the samples' tasks' instructions, and let the gates see whole prompts."""
        kept: dict[str, Tensor] | None = None if self.options.variant == "released" else {}
        return RouteSelection(task=tasks.to(model.device), whole=True, kept=kept)


def banks(model: PeftModel) -> dict[str, SeparableBank]:
    """The gates of every linear."""
    return {name: cast(SeparableBank, layer.routers) for name, layer in expert_layers(model).items()}


METHODS = {"smolora": SMoLora}
