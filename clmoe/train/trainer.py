"""transformers' Trainer with our sample order, optimizer groups and log; it writes no checkpoint of its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.optimization import get_cosine_schedule_with_warmup

from clmoe.config import TrainingConfig
from clmoe.data.collate import TrainDataset, collate_train
from clmoe.model.adapter import PROJECTOR
from clmoe.system.logging import EventLog, Progress
from clmoe.train.loss import TrainedModel, assert_finite, parameter_groups
from clmoe.train.order import BatchPlan, MicroBatches


class Report(TrainerCallback):
    """Feeds the progress bar and ``events.jsonl``; stops at a non-finite loss."""

    def __init__(self, progress: Progress, log: EventLog, task: str, batch_size: int) -> None:
        self.progress, self.log, self.task, self.batch_size = progress, log, task, batch_size

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        self.progress.advance(self.batch_size)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **unused: Any) -> None:
        if not logs or "loss" not in logs:
            return
        assert_finite(logs["loss"], state.global_step)
        self.progress.show(loss=logs["loss"])
        fields = {
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
        }
        self.log.write("step", task=self.task, step=state.global_step, **fields)


class TaskTrainer(Trainer):
    """Trains one task for a fixed number of optimizer steps."""

    def __init__(
        self,
        model: TrainedModel,
        dataset: TrainDataset,
        pad_id: int,
        config: TrainingConfig,
        plan: BatchPlan,
        steps: int,
        report: Report,
        folder: Path,
    ) -> None:
        self.plan, self.steps, self.config, self.pad_id = plan, steps, config, pad_id
        arguments = TrainingArguments(
            output_dir=str(folder),
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
        )
        super().__init__(model=model, args=arguments, train_dataset=dataset, callbacks=[report])
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Our own batches, already cut for this process; the loader draws nothing from the global generator."""
        sampler = MicroBatches(self.plan, self.steps, rank=self.args.process_index)
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=sampler,
            num_workers=self.config.workers,
            collate_fn=partial(collate_train, pad_id=self.pad_id),
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
