"""transformers' Trainer with our sample order, optimizer groups, log and mid-training state; alone, DDP or DeepSpeed.

It writes no checkpoint of its own: those are pickles, and DeepSpeed's are tied to the number of processes.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import unset_hf_deepspeed_config
from transformers.optimization import get_cosine_schedule_with_warmup

from clmoe.config import TrainingConfig
from clmoe.data.collate import NumberedDataset, TrainDataset, collate_numbered, collate_train
from clmoe.data.packing import collate_packed
from clmoe.errors import Interrupted
from clmoe.model.adapter import PROJECTOR
from clmoe.system.trackers import Track
from clmoe.train.loss import TrainedModel, parameter_groups
from clmoe.train.order import BatchPlan, MicroBatches, step_seed
from clmoe.train.state import (
    PlainOptimizer,
    ZeroOptimizer,
    find_state,
    load_moments,
    load_weights,
    save_state,
)
from clmoe.utils.logging import EventLog, Progress
from clmoe.utils.processes import any_of_them, rank
from clmoe.utils.tensors import check_finite, trainable


class Report(TrainerCallback):
    """Feeds the progress bar, ``events.jsonl`` and the trackers; stops at a non-finite loss."""

    def __init__(self, progress: Progress, log: EventLog, track: Track, task: str, batch_size: int) -> None:
        self.progress, self.log, self.track, self.task, self.batch_size = progress, log, track, task, batch_size

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        self.progress.advance(self.batch_size)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **unused: Any) -> None:
        if not logs or "loss" not in logs:
            return
        check_finite({"the loss": torch.tensor(logs["loss"])}, f"step {state.global_step}")
        self.progress.show(loss=logs["loss"])
        fields = {
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
        }
        self.log.write("step", task=self.task, step=state.global_step, **fields)
        self.track(fields, state.global_step)


class Snapshots(TrainerCallback):
    """Saves the training's state every few steps and when SIGTERM came; makes dropout a function of the step."""

    def __init__(self, trainer: TaskTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        trainer = self.trainer
        torch.manual_seed(step_seed(trainer.plan.seed, trainer.phase.name, state.global_step, rank()))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        trainer, step = self.trainer, state.global_step
        if step == trainer.steps:  # the phase is about to be sealed, which is the better state
            return
        stop = any_of_them(trainer.stop_asked())
        due = trainer.config.save_steps and step % trainer.config.save_steps == 0
        if stop or due:
            trainer.save_state(step)
        if stop:
            raise Interrupted(f"stopped by SIGTERM after step {step} of {trainer.steps}; its state is saved")


class OneDevice(TrainingArguments):
    """A process computes on one GPU: with several in sight transformers would split each batch over all of them.

    It then takes the mean of the parts' losses, where ours are shares of one sum.
    """

    @property
    def n_gpu(self) -> int:
        """0 on the CPU, else 1."""
        return min(1, super().n_gpu)


def _outlive_sigterm(worker: int) -> None:
    """A data worker ignores the signal that a launcher sends to all processes: the step under way needs its batches.

    It ends when the training process ends it.
    """
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
        deepspeed: Path | None = None,
    ) -> None:
        """`phase`: the folder that the phase will be sealed in; states lie beside it. `deepspeed`: ZeRO's settings."""
        self.plan, self.steps, self.config, self.pad_id, self.phase = plan, steps, config, pad_id, phase
        self.found = find_state(phase)
        self.first_step = 0 if self.found is None else load_weights(self.found, model)
        arguments = OneDevice(
            output_dir=str(phase.parent),
            max_steps=steps,
            per_device_train_batch_size=plan.micro,
            gradient_accumulation_steps=plan.accumulation,
            max_grad_norm=config.max_grad_norm,
            logging_steps=config.logging_steps,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
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
        self.model_accepts_loss_kwargs = True

    def run(self, stop_asked: Callable[[], bool]) -> None:
        """Train to the last step, unless ``stop_asked``, which is called after each step but the last.

        Raises:
            Interrupted: it was asked; the state is saved.
        """
        self.stop_asked = stop_asked
        self.train()

    def _prepare_for_training(self, *arguments: Any, **named: Any) -> Any:
        """Trainer's own preparation of model and optimizer, then the moments and the step of the state found."""
        prepared = super()._prepare_for_training(*arguments, **named)
        if self.found is not None:
            load_moments(self.found, self.model, self._moments(), self.first_step)  # type: ignore[arg-type]
            self.state.global_step = self.first_step
            self._schedule_from(self.first_step)
        return prepared

    def _schedule_from(self, step: int) -> None:
        """The learning rates as they are after ``step`` steps."""
        scheduler = cast(LambdaLR, self.lr_scheduler)
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": step, "_last_lr": rates})
        for group, rate in zip(self._adamw.param_groups, rates, strict=True):
            group["lr"] = rate

    def save_state(self, step: int) -> None:
        """Write the state after ``step`` steps; called by every process."""
        save_state(self.phase, step, self.model, self._moments(), self.config.keep_states)  # type: ignore[arg-type]

    def _moments(self) -> PlainOptimizer | ZeroOptimizer:
        return ZeroOptimizer(self._adamw, self.deepspeed.optimizer) if self.deepspeed else PlainOptimizer(self._adamw)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Within the block every process has the trained parameters whole (ZeRO-3 spreads them)."""
        parameters = list(trainable(self.model).values())  # type: ignore[arg-type]
        if not any(hasattr(p, "ds_id") for p in parameters):
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(parameters):
            yield

    def release(self) -> None:
        """Take DeepSpeed's hooks off the model and forget its settings, so that another training can follow."""
        if self.deepspeed:
            self.deepspeed.destroy()
            unset_hf_deepspeed_config()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Our own batches, already cut for this process; the loader draws nothing from the global generator."""
        sampler = MicroBatches(self.plan, self.steps, self.first_step, self.args.process_index)
        collate = collate_packed if self.config.share_images else collate_train
        return DataLoader(
            NumberedDataset(cast(TrainDataset, self.train_dataset)),
            batch_sampler=sampler,
            num_workers=self.config.workers,
            worker_init_fn=_outlive_sigterm,
            collate_fn=partial(collate_numbered, pad_id=self.pad_id, collate=collate),
            generator=torch.Generator().manual_seed(self.plan.seed),
            pin_memory=self.args.dataloader_pin_memory,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a group of its own for the projector."""
        config = self.config
        trained = cast(TrainedModel, self.model)
        groups = parameter_groups(trained, PROJECTOR, config.learning_rate, config.projector_learning_rate)
        self._adamw = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        self.optimizer = self._adamw
        return self._adamw

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Linear warm-up, cosine decay to zero."""
        warmup = round(self.config.warmup_ratio * num_training_steps)
        self.lr_scheduler = get_cosine_schedule_with_warmup(self._adamw, warmup, num_training_steps)
        return self.lr_scheduler
