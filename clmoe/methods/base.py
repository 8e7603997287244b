"""The hooks of a method, what it sees of a task, and the two kinds of adapter that methods start from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy

from clmoe.bases.inputs import over_train_batches, to_device, train_dataset
from clmoe.bases.llava import LoadedBase, decoder_layers, language_model_pattern, projector_names
from clmoe.config import AdapterConfig, Config, NoOptions, build
from clmoe.data.batches import TrainDataset, collate_train
from clmoe.data.records import TrainRecord
from clmoe.errors import ClmoeError
from clmoe.experts.config import ExpertConfig
from clmoe.experts.forward import adapted_base, answer_logits, answer_tokens, mean_over_samples
from clmoe.experts.model import attach_adapter, detach_adapter, load_adapter
from clmoe.experts.routing import NEWEST_ROUTER, RouterOutput, RouteSelection, RouteTrace, routing
from clmoe.utils.processes import count, in_order, rank, summed

ADAPTER_FILE = "adapter_model.safetensors"
STATISTICS = "statistics.safetensors"  # what the routers did on each task so far; the report shows it
EXPANSION = "expansion.json"  # what each task added to a growing method; the report shows it


@dataclass
class TaskContext:
    """What a method sees of the task being trained.

    Attributes:
        index: position in the sequence, from 0.
        work: for a method's state files; each process has its own folder, and the main one's becomes the checkpoint.
        sealed, trained: the folder with the adapters of the finished phases, by name, and the newest of them.
        previous: the parent checkpoint.
        data: the benchmark's folder; the images of every task are below it.
        features: where the run keeps features of prompts; None keeps none.
    """

    task: str
    index: int
    records: Sequence[TrainRecord]
    image_root: Path
    config: Config
    base: LoadedBase
    model: PeftModel
    work: Path
    sealed: Path
    trained: Path
    previous: Path | None
    data: Path = Path()
    features: Path | None = None

    def load(self, folder: Path) -> None:
        """Replace the live adapter with a saved one."""
        detach_adapter(self.model)
        self.model = load_adapter(self.base.model, folder, trainable=True)


@dataclass(frozen=True)
class Phase:
    """One phase of a task's training; most methods have only one.

    Attributes:
        begin, end: called before training, and once its adapter is sealed, even if an earlier process sealed it.
        learning_rate, steps, batch_size: None takes the configuration's.
        of_task: the records are the task's own, so the benchmark may ask for several passes over them.
    """

    name: str
    records: Sequence[TrainRecord]
    image_root: Path
    begin: Callable[[TaskContext], None]
    end: Callable[[TaskContext], None]
    learning_rate: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    of_task: bool = True


class Method:
    """A continual-learning method; subclasses override what they need.

    Class attributes:
        chain: ``sequence`` (each task continues the adapter of the one before), ``fresh`` (each trains a fresh adapter,
            which ``end_task`` adds to the parent's), ``union`` (all tasks at once), ``none`` (nothing is trained).
        keeps_parts: the answer to a sample depends on its task, so a locator is needed; see ``selection``.
        prototypes_learned: see ``prototypes``; locator ``learned_prototype`` uses them.
        letters: the model learns to answer ``referral`` with the letter of a task; ``generated_letter`` asks for it.
        reads_logits: ``extra_loss`` reads ``batch["logits"]``; otherwise the logits are computed in pieces and dropped.
        needs_gradients: ``change_gradients`` is called, and ``after_step`` sees whole gradients. ZeRO has none.
        memory: the option that sets how many training records of each task are kept; empty if there is none.
        answer_options: options that training does not read; ``clmoe tune`` tries their values on one trained run.
        Options: dataclass of the method's own options.
    """

    chain: ClassVar[Literal["sequence", "fresh", "union", "none"]] = "sequence"
    keeps_parts: ClassVar[bool] = False
    letters: ClassVar[bool] = False
    prototypes_learned: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    memory: ClassVar[str] = ""
    answer_options: ClassVar[tuple[str, ...]] = ()
    Options: ClassVar[type] = NoOptions

    def __init__(self, config: Config) -> None:
        self.config = config
        self.options: Any = build(self.Options, config.options, "options")
        self._measured: dict[str, list[Tensor | float]] = {}

    def adapter(self, base: LoadedBase) -> PeftConfig:
        """The adapter of the first task."""
        raise ClmoeError(f"method {self.config.method} trains nothing")

    def effective_scale(self) -> float | None:
        """``s`` times the mean gate: the factor on an average expert's update, for tables."""
        return None

    @property
    def grows(self) -> bool:
        """Whether later tasks add experts; ``clmoe plan`` says how many parameters these take."""
        return False

    @property
    def shared_rank(self) -> int:
        """Rank of a LoRA on the adapted linears that is kept next to the tasks' own from the second task on."""
        return 0

    def ranked(self, rank: int) -> Config:
        """The configuration with this ``adapter.rank`` and an unchanged scale of the update."""
        adapter = self.config.adapter
        alpha = adapter.alpha * rank / adapter.rank if adapter.scale is None else adapter.alpha
        return replace(self.config, adapter=replace(adapter, rank=rank, alpha=alpha))

    def phases(self, context: TaskContext) -> list[Phase]:
        """The phases of a task's training, in order."""
        return [Phase("trained", context.records, context.image_root, self.begin_task, self.end_task)]

    def check_inputs(self, previous: Path | None, data: Path) -> None:
        """Raise ClmoeError if a file that training reads besides the task's own is missing; nothing is loaded yet."""

    def reads(self, previous: Path | None, data: Path) -> list[Path]:
        """Training files besides the task's own; if one has changed, an interrupted training is not continued."""
        return []

    def begin_task(self, context: TaskContext) -> None:
        """Before training: grow, freeze, choose what trains."""

    def extra_loss(self, model: PeftModel, trace: RouteTrace, batch: dict[str, Tensor]) -> Tensor | None:
        """A loss to add: a mean over the samples of ``batch``, later weighted by their share of the global batch.

        ``batch`` holds the model's inputs, ``labels``, ``rows [B]`` int64 (indices into the phase's records) and, with
        ``reads_logits``, ``logits [N, V]`` float32 with gradient, which predict the answers' N tokens.
        """
        return None

    def rate_factor(self, name: str) -> float:
        """Factor on the learning rate of the parameter ``name``; 0 keeps it out of the training."""
        return 1.0

    def change_gradients(self, model: PeftModel, gradients: dict[str, Tensor], step: int) -> None:
        """Change in place, before step ``step`` (from 0), what the optimizer follows; only with ``needs_gradients``.

        ``gradients``, float32 by parameter name, are those of the whole global batch: accumulated, the same in every
        process, and not yet clipped.
        """

    def after_step(self, model: PeftModel, step: int) -> None:
        """Called after step ``step`` of the optimizer; the parameters still have their gradients, now clipped."""

    def finish(self, model: PeftModel) -> None:
        """Change the weights after the last step, before they are saved as the phase's result."""

    def state(self) -> dict[str, Tensor]:
        """What the method has gathered in the steps so far, for saved states; the same in every process."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what ``state`` returned; called after ``begin_task``."""

    def log(self, name: str, value: Tensor | float) -> None:
        """Record a number during a step; ``events.jsonl`` and the report page get its mean over steps and processes."""
        self._measured.setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else value)

    def end_task(self, context: TaskContext) -> None:
        """After training, with the trained adapter saved in ``context.trained``."""

    def selection(self, model: PeftModel, tasks: Tensor) -> RouteSelection:
        """How to route a batch of samples that belong to ``tasks [B]`` int64; only called with ``keeps_parts``."""
        raise NotImplementedError

    def training_selection(self, model: PeftModel, rows: Tensor | None) -> RouteSelection:
        """How to route a training batch; ``rows [B]`` int64 are its samples' indices in the phase's records."""
        return NEWEST_ROUTER

    def plain_selection(self) -> RouteSelection:
        """How to route any batch without ``keeps_parts``."""
        return NEWEST_ROUTER

    def referral(self, question: str, experts: Mapping[str, str]) -> str:
        """The question that asks the model, routed to ``LETTER_ROUTER``, for a task's letter; only with ``letters``."""
        raise NotImplementedError

    def mixture(self, model: PeftModel, scores: Tensor) -> Tensor | None:
        """Shares ``[B, N]`` of the tasks' parts for samples with these locator scores, ``[B, N]`` float64.

        None, the default, uses the best task alone, see ``selection``. Shares need experts with ``pick`` ``task``, or
        soft prompts.
        """
        return None

    def soft_tokens(self, learned: int) -> int:
        """How many places for soft prompt tokens a prompt has with ``learned`` tasks, in training the newest too."""
        return 0

    def prototypes(self, model: PeftModel) -> Tensor:
        """What stands for each task's image and text features, ``[N, F]``; only with ``prototypes_learned``."""
        raise NotImplementedError


def measured(method: Method) -> dict[str, float]:
    """Means of everything logged since the last call, over all processes; every process must call it."""
    mine = {name: (sum(map(float, values)), len(values)) for name, values in method._measured.items()}
    method._measured.clear()
    shares = in_order(range(count()), lambda _: mine)
    parts = {name: [share[name] for share in shares if name in share] for share in shares for name in share}
    return {name: sum(total for total, _ in found) / sum(n for _, n in found) for name, found in parts.items()}


def attach_on_meta(method: Method, base: LoadedBase) -> PeftModel:
    """A base from ``meta_base`` with the adapter of the method's first task."""
    with torch.device("meta"):
        return attach_adapter(base.model, method.adapter(base))


def lora_scaling(adapter: AdapterConfig) -> float:
    """``alpha / rank``, or the effective scale itself: plain LoRA has no gate."""
    return adapter.alpha / adapter.rank if adapter.scale is None else adapter.scale


def mean_gate(adapter: AdapterConfig) -> float:
    """The mean gate of an expert where it is used: 1/E when all are mixed, 1/k when ``k < E`` are kept."""
    return 1 / min(adapter.router_top_k or adapter.experts, adapter.experts)


def expert_scaling(adapter: AdapterConfig) -> float:
    """``s``: ``alpha / rank`` with ``rank`` counted as ``rank_is`` says, or what gives the wanted effective scale."""
    return adapter.alpha / adapter.rank if adapter.scale is None else adapter.scale / mean_gate(adapter)


def expert_rank(adapter: AdapterConfig) -> int:
    """The rank of one expert. Raises ClmoeError if the total rank is not a multiple of the number of experts."""
    if adapter.rank_is == "per_expert":
        return adapter.rank
    if adapter.rank % adapter.experts:
        raise ClmoeError(f"adapter.rank {adapter.rank} (total) is not a multiple of adapter.experts {adapter.experts}")
    return adapter.rank // adapter.experts


def lora_adapter(config: Config, base: LoadedBase) -> LoraConfig:
    """peft's own LoRA on the language model; the checkpoint loads in stock peft."""
    adapter = config.adapter
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=lora_scaling(adapter) * adapter.rank,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=language_model_pattern(adapter.targets, base.family.decoder),
        modules_to_save=_saved_modules(adapter, base),
    )


def expert_adapter(config: Config, base: LoadedBase, owner: int = 0) -> ExpertConfig:
    """``experts`` LoRA experts of task ``owner``, with one instance router per linear or block."""
    adapter, rank = config.adapter, expert_rank(config.adapter)
    routers = {"router_scope": adapter.router_scope, "router_top_k": adapter.router_top_k, "router_owners": [owner]}
    owners, scaling = [owner] * adapter.experts, expert_scaling(adapter)
    return _experts(config, base, owners, rank, scaling, frozen_before=owner, **routers)


def lora_parts_adapter(
    config: Config, base: LoadedBase, pick: Literal["sum", "task"], owners: list[int]
) -> ExpertConfig:
    """The LoRAs of ``owners`` as experts without a router, in every block: added up, or picked by the sample's task."""
    adapter = config.adapter
    return _experts(config, base, owners, adapter.rank, lora_scaling(adapter), router_owners=[], pick=pick)


def _experts(
    config: Config, base: LoadedBase, owners: list[int], rank: int, scaling: float, **fields: Any
) -> ExpertConfig:
    return ExpertConfig(
        rank=rank,
        scaling=scaling,
        dropout=config.adapter.dropout,
        as_released=config.adapter.as_released,
        projections=list(config.adapter.targets),
        layout={str(block): list(owners) for block in range(len(decoder_layers(base.model)))},
        seed=config.seed,
        modules_to_save=_saved_modules(config.adapter, base),
        decoder=base.family.decoder,
        **fields,
    )


def _saved_modules(adapter: AdapterConfig, base: LoadedBase) -> list[str] | None:
    return projector_names(base) if adapter.train_projector else None


@torch.no_grad()
def router_sums(
    context: TaskContext,
    records: Sequence[TrainRecord],
    count: Callable[[RouterOutput, Tensor], tuple[Tensor, ...]],
) -> dict[str, list[Tensor]]:
    """Sums of the newest routers' outputs over whole training records, with dropout off, by patched module.

    ``count`` gets a router's output and the mask ``[B, T]`` of real tokens, and returns CPU tensors to add up.
    """
    base, config = context.base, context.config
    adapted = adapted_base(context.model.eval())
    dataset = train_dataset(base, records, context.image_root, config.training.max_length)

    def one(batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
        del batch["labels"]
        with routing(NEWEST_ROUTER, trace := RouteTrace()):
            adapted.model(**batch, use_cache=False)
        return {name: count(output, batch["attention_mask"]) for name, output in trace.outputs.items()}

    batches = over_train_batches(base, dataset, config.evaluation.batch_size, one)
    return {
        name: [reduce(torch.add, parts) for parts in zip(*(batch[name] for batch in batches), strict=True)]
        for name in batches[0]
    }


def loss_gradients(
    model: PeftModel,
    base: LoadedBase,
    dataset: TrainDataset,
    rows: Sequence[int],
    weights: Sequence[Tensor],
    batch_size: int,
    per: Literal["token", "sample"],
) -> list[Tensor]:
    """Gradient with respect to ``weights`` of the mean cross-entropy over ``rows``, float32, the same in every process.

    The mean is over all answer tokens, as in training, or over the samples' means.
    """
    totals, parts = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights], 0
    mine = rows[rank() :: count()]
    for start in range(0, len(mine), batch_size):
        items = dataset.__getitems__(mine[start : start + batch_size])
        batch = to_device(collate_train(items, base.tokenizer.pad_token_id), base)
        tokens = answer_tokens(batch["labels"])
        losses = cross_entropy(answer_logits(adapted_base(model), batch), tokens, reduction="none")
        here = len(tokens) if per == "token" else len(items)
        value = losses.sum() if per == "token" else here * mean_over_samples(losses, batch["labels"])
        for total, gradient in zip(totals, torch.autograd.grad(value, weights, allow_unused=True), strict=True):
            if gradient is not None:  # a batch without images gives a tuned projector none
                total += gradient
        parts += here
    whole = float(summed(torch.tensor(parts, device=base.device)))
    return [summed(total).div_(whole) for total in totals]
