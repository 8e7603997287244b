"""The training loop: the loss, and transformers' Trainer with our sample order, optimizer groups, log and states.

It runs alone, under DDP or under DeepSpeed's ZeRO. Trainer writes no checkpoints of its own: those are pickles, and
DeepSpeed's are tied to the number of processes.
"""

import math
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, unset_hf_deepspeed_config

from clmoe.config import TrainingConfig
from clmoe.data.batches import NumberedDataset, TrainDataset, collate_numbered, epoch_permutation, readable
from clmoe.errors import ClmoeError, Interrupted
from clmoe.experts.forward import adapted_base, answer_loss, answer_states, answer_tokens, no_image
from clmoe.experts.routing import RouteTrace, routing
from clmoe.methods.base import Method, measured
from clmoe.train.state import (
    PlainOptimizer,
    ZeroOptimizer,
    find_state,
    load_moments,
    load_own,
    load_weights,
    save_state,
)
from clmoe.utils.files import read_json
from clmoe.utils.logging import EventLog, Progress
from clmoe.utils.names import derived_seed
from clmoe.utils.paths import find_config
from clmoe.utils.processes import Asked, any_of_them, mean_of_each, rank
from clmoe.utils.tensors import check_finite, trainable

PROJECTOR = "modules_to_save"  # in the names of a tuned projector's parameters
LOST_UPDATES = 3  # in a row end the training


class TrainedModel(nn.Module):
    """Answer-token cross-entropy, normalised over the global batch, plus the method's own loss.

    Logits are computed at answer positions only, which is exact, and in pieces unless the method reads them. ``blank``
    holds the inputs of an empty image (``blank_image``), for several processes that train a projector.
    """

    def __init__(
        self, model: PeftModel, method: Method, batch_size: int, blank: dict[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.model, self.method, self.batch_size, self.blank = model, method, batch_size, blank

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor,
        rows: Tensor | None = None,
        **inputs: Tensor,
    ) -> dict[str, Tensor]:
        """The micro-batch's share of the loss of the global batch, which has ``num_items_in_batch`` answer tokens.

        ``input_ids``, ``attention_mask`` and ``labels`` are ``[B, T]`` int64, right-padded; labels are -100 outside
        the answers. ``rows [B]`` int64 are the samples' indices in the phase's records; ``inputs`` are the model's
        other inputs.
        """
        adapted = adapted_base(self.model)
        trace = RouteTrace(real=attention_mask.bool())
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **inputs}
        loss: Tensor | float = 0.0
        if "pixel_values" not in inputs and self.blank is not None:
            # Processes wait for each other's gradients, and ZeRO-2 packs them as they come. So a tuned projector needs
            # gradients of zeros in the same order as with images: from the same graph, which is computed first, too.
            loss = no_image(adapted, self.blank)
        elif "pixel_values" not in inputs:  # one process: zeros move a projector as the others' zeros would
            loss = 0.0 * sum(p.sum() for name, p in trainable(self.model).items() if PROJECTOR in name)
        with routing(self.method.training_selection(self.model, rows), trace):
            states = answer_states(adapted, batch)
        if self.method.reads_logits:
            batch["logits"] = adapted.lm_head(states).float()
            answers = cross_entropy(batch["logits"], answer_tokens(labels), reduction="sum")
        else:
            answers = answer_loss(adapted.lm_head, states, answer_tokens(labels))
        loss = loss + answers / num_items_in_batch.clamp(min=1)  # there are none if all records are masked
        batch |= {} if rows is None else {"rows": rows}
        extra = self.method.extra_loss(self.model, trace, batch)
        if extra is not None:
            loss = loss + extra * (len(input_ids) / self.batch_size)
        return {"loss": loss}


def total_steps(training: TrainingConfig, records: int, passes: int = 1, tasks: int = 1) -> int:
    """Optimizer steps over ``records``; a partial last batch is filled from the next epoch.

    ``training.steps`` is per task; the union has several. ``passes`` multiplies the epochs.
    """
    if training.steps is not None:
        return training.steps * tasks
    return max(1, -(-round(records * (training.epochs * passes)) // training.batch_size))


@dataclass(frozen=True)
class BatchPlan:
    """How global batches are cut into processes' shares and ``accumulation`` forward passes of ``micro`` samples."""

    seed: int
    records: int
    batch_size: int
    micro_batch_size: int | None = None
    processes: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % (self.processes * self.micro):
            raise ClmoeError(
                f"training.batch_size {self.batch_size} cannot be cut into {self.processes} processes x "
                f"micro-batches of {self.micro}: change batch_size, micro_batch_size or processes"
            )

    @property
    def micro(self) -> int:
        return self.micro_batch_size or max(1, self.batch_size // self.processes)

    @property
    def accumulation(self) -> int:
        return self.batch_size // (self.processes * self.micro)

    def batch(self, step: int) -> list[int]:
        """Record indices of the global batch of ``step``."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = {p // self.records for p in positions}
        orders = {epoch: epoch_permutation(self.seed, epoch, self.records) for epoch in epochs}
        return [int(orders[p // self.records][p % self.records]) for p in positions]

    def rows(self, steps: int) -> list[int]:
        """Record indices that the first ``steps`` global batches read, each once."""
        read = min(steps * self.batch_size, self.records)
        return [int(row) for row in epoch_permutation(self.seed, 0, self.records)[:read]]


class MicroBatches:
    """The micro-batches of one process, from ``first_step`` on: a ``batch_sampler`` for torch's DataLoader."""

    def __init__(self, plan: BatchPlan, steps: int, first_step: int = 0, rank: int = 0) -> None:
        self.plan, self.steps, self.first_step, self.rank = plan, steps, first_step, rank

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.plan.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps):
            batch = self.plan.batch(step)
            for k in range(self.plan.accumulation):
                start = (k * self.plan.processes + self.rank) * self.plan.micro
                yield batch[start : start + self.plan.micro]


def parameter_groups(
    model: nn.Module, lr: float, projector_lr: float, factor: Callable[[str], float] = lambda name: 1.0
) -> list[dict[str, object]]:
    """Trainable parameters in one group per learning rate, the projector's last; ``factor`` is per parameter."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in trainable(model).items():
        inside = PROJECTOR in name
        groups.setdefault((inside, (projector_lr if inside else lr) * factor(name)), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda item: item[0][0])
    return [{"params": parameters, "lr": rate} for (_, rate), parameters in ordered]


def deepspeed_settings(name: str) -> Path:
    """``zero2`` -> ``configs/deepspeed/zero2.json``, or a JSON file. Raises ClmoeError if they cannot work."""
    path = find_config("deepspeed", name, ".json")
    settings = read_json(path)
    if find_spec("deepspeed") is None:
        raise ClmoeError("--deepspeed: DeepSpeed is not installed; pip install 'clmoe[train]'")
    for kind in ("bf16", "fp16"):
        if settings.get(kind, {}).get("enabled"):
            raise ClmoeError(
                f'{path}: {kind} would round the adapter\'s float32 weights; set "enabled": false and choose the '
                "base's type with model.dtype"
            )
    if settings.get("zero_optimization", {}).get("stage") not in (1, 2):
        raise ClmoeError(f"{path}: zero_optimization.stage must be 1 or 2; stage 3 would also spread the frozen base")
    return path


def use_deepspeed(name: str | None) -> Path | None:
    """The settings that ``--deepspeed`` names, with this process prepared for them; None without DeepSpeed."""
    if name is None:
        return None
    path = deepspeed_settings(name)
    if "RANK" not in os.environ:  # no launcher: DeepSpeed insists on being told that this process is the only one
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
    return path


class Report(TrainerCallback):
    """Feeds the progress bar and ``events.jsonl``; stops at a non-finite loss."""

    def __init__(self, progress: Progress, log: EventLog, task: str, batch_size: int, method: Method) -> None:
        self.progress, self.log, self.task, self.batch_size, self.method = progress, log, task, batch_size, method

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        self.progress.advance(self.batch_size)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **unused: Any) -> None:
        if not logs or "loss" not in logs:
            return
        check_finite({"the loss": torch.tensor(logs["loss"])}, f"step {state.global_step}")
        self.progress.show(loss=logs["loss"])
        fields = {name: logs[name] for name in ("loss", "learning_rate")}
        fields |= {"grad_norm": logs["grad_norm"] if math.isfinite(logs["grad_norm"]) else None}
        own = measured(self.method)
        self.log.write("step", task=self.task, step=state.global_step, **fields, **({"measured": own} if own else {}))


class Snapshots(TrainerCallback):
    """Restores the state found, calls the method after each step, and saves a state every few steps and on SIGTERM.

    Dropout follows from the step, so no generator is saved.
    """

    def __init__(self, trainer: "TaskTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        self.trainer.begin()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        self.trainer.check_gradient()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        trainer = self.trainer
        torch.manual_seed(derived_seed(trainer.plan.seed, f"{trainer.phase.name}:{state.global_step}:{rank()}"))

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        trained = self.trainer.trained
        if not self.trainer.lost_in_a_row:
            trained.method.after_step(trained.model, state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        trainer, step = self.trainer, state.global_step
        if step == trainer.steps:  # the phase is about to be sealed, which is the better state
            return
        stop = any_of_them(trainer.asked.now)
        due = trainer.config.save_steps and step % trainer.config.save_steps == 0
        if stop or due:
            trained, keep = trainer.trained, trainer.config.keep_states
            save_state(trainer.phase, step, trained, trainer.moments(), keep, trained.method.state())
        if stop:
            raise Interrupted(f"stopped by SIGTERM after step {step} of {trainer.steps}; its state is saved")


class OneDevice(TrainingArguments):
    """A process computes on one GPU. transformers would split each batch over all and average our shares of a sum."""

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


def _outlive_sigterm(worker: int) -> None:
    """A data worker ignores the signal that a launcher sends to all processes: the current step needs its batches."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class TaskTrainer(Trainer):
    """Trains one phase of a task for a fixed number of optimizer steps, from its newest saved state."""

    def __init__(
        self,
        model: TrainedModel,
        dataset: TrainDataset,
        pad_id: int,
        config: TrainingConfig,
        plan: BatchPlan,
        steps: int,
        report: Report,
        phase: Path,
        asked: Asked,
        deepspeed: Path | None = None,
    ) -> None:
        """``phase`` is the folder that will be sealed; states lie beside it.

        ``train`` raises Interrupted after the step in which ``asked`` was set, with the state saved.
        """
        self.plan, self.steps, self.config, self.pad_id = plan, steps, config, pad_id
        self.trained, self.phase, self.asked = model, phase, asked
        self.lost = self.lost_in_a_row = 0  # updates whose gradient was not finite
        self.found = find_state(phase)
        self.first_step = 0
        if self.found is not None:
            self.first_step = load_weights(self.found, model)
            model.method.load_state(load_own(self.found))
        arguments = OneDevice(
            output_dir=str(phase.parent),
            max_steps=steps,
            per_device_train_batch_size=plan.micro,
            gradient_accumulation_steps=plan.accumulation,
            max_grad_norm=config.max_grad_norm,
            lr_scheduler_type="cosine",
            warmup_steps=round(config.warmup_ratio * steps),
            logging_steps=config.logging_steps,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=list(config.trackers) or "none",
            run_name=f"{phase.parent.parent.name.strip('.').removesuffix('.partial')}-{phase.name}",
            disable_tqdm=True,
            seed=plan.seed,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,  # every trainable parameter gets a gradient, if only of zeros
            ddp_broadcast_buffers=False,  # they are the frozen experts, the same everywhere
            deepspeed=None if deepspeed is None else str(deepspeed),
        )
        super().__init__(model=model, args=arguments, train_dataset=dataset, callbacks=[report, Snapshots(self)])
        self.remove_callback(PrinterCallback)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):  # its own place would go with the phase's folder
                callback.logging_dir = str(phase.parents[2] / "tensorboard" / str(arguments.run_name))
        self.model_accepts_loss_kwargs = True
        self._clip, self.accelerator.clip_grad_norm_ = self.accelerator.clip_grad_norm_, self._clip_and_keep_norm

    def _clip_and_keep_norm(self, *arguments: Any, **named: Any) -> Any:
        """Trainer calls this instead of accelerate's own, once per update; the method changes the gradients first.

        The norm is kept because callbacks do not get it.
        """
        adapted, method = self.trained.model, self.trained.method
        if method.needs_gradients:
            found = {name: p.grad for name, p in trainable(adapted).items() if p.grad is not None}
            method.change_gradients(adapted, found, self.state.global_step)
        self.norm = self._clip(*arguments, **named)
        return self.norm

    def begin(self) -> None:
        """Set up the prepared model; give optimizer and scheduler the moments, step and rates of the state found."""
        if isinstance(self.model_wrapped, DistributedDataParallel):
            self.model_wrapped.register_comm_hook(None, mean_of_each)
        if self.found is None:
            return
        step, scheduler = self.first_step, cast(LambdaLR, self.lr_scheduler)
        load_moments(self.found, self.model, self.moments(), step)  # type: ignore[arg-type]
        self.state.global_step = self._globalstep_last_logged = step
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": step, "_last_lr": rates})
        for group, rate in zip(self._adamw.param_groups, rates, strict=True):
            group["lr"] = rate

    def moments(self) -> PlainOptimizer:
        return ZeroOptimizer(self._adamw, self.deepspeed.optimizer) if self.deepspeed else PlainOptimizer(self._adamw)

    def release(self) -> None:
        """Take DeepSpeed's hooks off the model and forget its settings, so that another training can follow."""
        if self.deepspeed:
            self.deepspeed.destroy()
            unset_hf_deepspeed_config()

    def check_gradient(self) -> None:
        """Leave an update out if the gradient overflowed. Raises ClmoeError when several in a row were lost to that."""
        norm = self.deepspeed.get_global_grad_norm() if self.deepspeed else self.norm
        if math.isfinite(float(norm)):
            self.lost_in_a_row = 0
            return
        self.lost, self.lost_in_a_row = self.lost + 1, self.lost_in_a_row + 1
        if self.lost_in_a_row == min(LOST_UPDATES, self.steps):
            raise ClmoeError(
                f"the gradient overflowed in {self.lost_in_a_row} steps in a row, the last of them step "
                f"{self.state.global_step + 1}: its norm is {float(norm)}, and nothing is learned. Lower "
                "training.learning_rate or adapter.scale, or choose model.dtype=bfloat16"
            )
        for parameter in trainable(self.trained.model).values():  # clipping made NaN of them; ZeRO drops them itself
            parameter.grad = None

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *arguments: Any) -> Any:
        """The micro-batches of one update. Raises what a data worker could not read, without the worker's traceback."""
        return super().get_batch_samples(readable(epoch_iterator), *arguments)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Our own batches, already cut for this process; the loader draws nothing from the global generator."""
        sampler = MicroBatches(self.plan, self.steps, self.first_step, self.args.process_index)
        return DataLoader(
            NumberedDataset(cast(TrainDataset, self.train_dataset)),
            batch_sampler=sampler,
            num_workers=self.config.workers,
            worker_init_fn=_outlive_sigterm,
            collate_fn=partial(collate_numbered, pad_id=self.pad_id),
            generator=torch.Generator().manual_seed(self.plan.seed),
            pin_memory=self.args.dataloader_pin_memory,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with separate groups for the projector and for what the method wants."""
        config, trained = self.config, self.trained
        rates = config.learning_rate, config.projector_learning_rate
        groups = parameter_groups(trained.model, *rates, trained.method.rate_factor)
        self.optimizer = self._adamw = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        return self._adamw
