"""One task: check, begin, train, end, publish. Everything is built beside the output and appears at once."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmoe.benchmarks.base import Benchmark
from clmoe.config import Config, dump_config
from clmoe.data.records import TrainRecord, load_train
from clmoe.data.union import Part, UnionRecords
from clmoe.errors import ClmoeError
from clmoe.methods.base import Method, method_class
from clmoe.methods.context import Phase, TaskContext
from clmoe.system.trackers import check_trackers, tracking
from clmoe.train.card import model_card
from clmoe.train.checkpoint import CARD, MANIFEST, build_folder, is_complete, publish
from clmoe.train.lineage import (
    CONFIG,
    LINEAGE,
    Finished,
    check_same_run,
    check_successor,
    lineage_of,
    read_checkpoint,
    training_identity,
)
from clmoe.train.order import BatchPlan, total_steps
from clmoe.train.work import PHASES, open_work, own_folder, remove_phases
from clmoe.train.zero import spreads_weights
from clmoe.utils.files import write_json, write_text
from clmoe.utils.logging import EventLog, Progress, Stage, provenance, read_events, timed
from clmoe.utils.processes import count, deferred, device, from_main, is_main, wait_for_all
from clmoe.utils.tensors import writing

if TYPE_CHECKING:
    from peft import PeftModel

    from clmoe.model.llava import LoadedBase

UNION = "all"


@dataclass(frozen=True)
class TrainRequest:
    """One call of ``clmoe train``.

    Attributes:
        task: to train, ``all`` for methods that train on the union.
        order: the whole sequence, for progress and for the union.
        previous: parent checkpoint, verified, or None.
        output: folder that becomes the checkpoint.
        deepspeed: ZeRO's settings, None to train without DeepSpeed.
    """

    config: Config
    benchmark: Benchmark
    task: str
    order: list[str]
    previous: Finished | None
    output: Path
    deepspeed: Path | None = None

    @property
    def run(self) -> Path:
        """The run folder that holds the checkpoint, its events and tables."""
        return self.output.parent

    @property
    def learned(self) -> list[str]:
        """Tasks that the finished checkpoint has learned."""
        if self.task == UNION:
            return list(self.order)
        return [*(self.previous.lineage.tasks if self.previous else []), self.task]

    @property
    def stage(self) -> Stage:
        """Position in the sequence."""
        return Stage(0, 1) if self.task == UNION else Stage(self.order.index(self.task), len(self.order))


def prepare_request(
    config: Config,
    benchmark: Benchmark,
    task: str,
    order: list[str],
    previous: Path | None,
    output: Path,
    deepspeed: Path | None = None,
) -> TrainRequest:
    """Check all that can be checked without loading a model.

    Raises:
        ClmoeError: unknown task, a parent that does not fit, or a way of chaining that the method does not use.
    """
    chain = method_class(config.method).chain
    if chain == "none":
        raise ClmoeError(f"method {config.method} trains nothing: evaluate it with clmoe eval --checkpoint base")
    if (task == UNION) != (chain == "union"):
        raise ClmoeError(
            f"method {config.method} trains {'on --task all only' if chain == 'union' else 'one task at a time'}"
        )
    check_trackers(config.training.trackers)
    check_shared_images(config)
    if task != UNION:
        benchmark.task(task)
        if task not in order:
            raise ClmoeError(f"--task {task} is not in --order {','.join(order)}")
    if method_class(config.method).reads_weights and deepspeed is not None and spreads_weights(deepspeed):
        raise ClmoeError(
            f"--deepspeed {deepspeed}: method {config.method} compares whole weights, which ZeRO-3 spreads over the "
            "processes; use zero2"
        )
    if previous is not None and chain != "sequence":
        raise ClmoeError(f"method {config.method} starts every task anew: leave out --previous")
    parent = None if previous is None else read_checkpoint(previous)
    if parent is not None:
        check_successor(parent, config, benchmark.name, task)
    return TrainRequest(config, benchmark, task, order, parent, output, deepspeed)


def check_shared_images(config: Config) -> None:
    """``training.share_images`` fits the rest of the configuration.

    Raises:
        ClmoeError: with dropout, or an attention that takes no block mask.
    """
    if not config.training.share_images:
        return
    if config.adapter.dropout:
        raise ClmoeError(
            f"training.share_images with adapter.dropout {config.adapter.dropout}: records that share an image's "
            "tokens would share their dropout, too; set adapter.dropout=0"
        )
    if config.model.attention == "flash_attention_2":
        raise ClmoeError(
            "training.share_images needs a block mask, which flash_attention_2 does not take: set model.attention=sdpa"
        )


def finished(request: TrainRequest) -> bool:
    """The output is there already, made by this very command.

    Raises:
        ClmoeError: the output holds something else, or is damaged.
    """
    if not request.output.exists():
        return False
    if not (request.output / MANIFEST).is_file():
        raise ClmoeError(
            f"--output {request.output} exists and is not a finished checkpoint: choose another or delete it"
        )
    done = read_checkpoint(request.output)
    check_same_run(done, request.config, request.benchmark.name, request.previous, request.learned)
    if is_main():
        remove_phases(request.output)  # left by a command that was stopped just after it had published
    return True


def load_records(request: TrainRequest) -> tuple[Sequence[TrainRecord], Path]:
    """The training records and the folder that their images are relative to."""
    benchmark = request.benchmark
    if request.task != UNION:
        task = benchmark.task(request.task)
        return load_train(task.train, task.image_root), task.image_root
    parts = []
    for name in request.order:
        task = benchmark.task(name)
        records = load_train(task.train, task.image_root)
        parts.append(Part.of(name, records, task.image_root, benchmark.root, task.passes))
    return UnionRecords(parts), benchmark.root


def train_task(request: TrainRequest) -> LoadedBase | None:
    """Train one task and publish its checkpoint; does nothing when it is finished.

    Returns the loaded base for reuse by an evaluation, None if nothing had to be done.
    """
    if finished(request):
        return None
    from clmoe.model.adapter import detach_adapter

    method = method_class(request.config.method)(request.config)
    records, image_root = load_records(request)
    batch_plan(request, records)
    previous = None if request.previous is None else request.previous.folder
    method.check_inputs(previous, request.benchmark.root)
    base = _load_base(request)
    building = from_main(lambda: open_work(request.output, _identity(request)))
    sealed = building / PHASES
    with own_folder(building) as work:
        context = TaskContext(
            request.learned[-1],
            len(request.learned) - 1,
            records,
            image_root,
            request.config,
            base,
            _model(request, method, base),
            work,
            sealed,
            sealed,
            previous,
            request.benchmark.root,
        )
        log = EventLog(request.run / "events.jsonl")
        log.write("started", task=request.task, **provenance())
        phases = method.phases(context)
        for phase in phases:
            _run_phase(request, method, context, phase, log)
        wait_for_all()  # until nobody reads the phases' folders any more
        from_main(lambda: _publish(request, method, context, phases))
    detach_adapter(context.model)
    return context.base


def _publish(request: TrainRequest, method: Method, context: TaskContext, phases: list[Phase]) -> None:
    """Complete the checkpoint's files, put it in its place, and then only remove what served to make them."""
    work = context.work
    save_adapter(context.model, work)
    (work / CONFIG).write_text(dump_config(request.config), encoding="utf-8")
    steps = _phase_steps(request, phases[-1])
    lineage = lineage_of(
        method,
        context.model,
        benchmark=request.benchmark.name,
        tasks=request.learned,
        parent=request.previous,
        base=context.base.fingerprint,
        steps=steps,
    )
    write_json(work / LINEAGE, lineage.as_json())
    write_text(work / CARD, model_card(request.config, lineage))
    publish(work, request.output)
    remove_phases(request.output)


def _run_phase(request: TrainRequest, method: Method, context: TaskContext, phase: Phase, log: EventLog) -> None:
    """Train and seal one phase, or take it as an interrupted run sealed it; then end it."""
    context.trained = context.sealed / phase.name
    if not from_main(lambda: is_complete(context.trained)):
        phase.begin(context)
        steps = _phase_steps(request, phase)
        with timed(log, "trained", task=request.task, phase=phase.name, steps=steps, processes=count()) as extra:
            extra["engine"] = _train(request, method, context, phase, steps, log)
    # Always from the file: what follows is the same whether this process trained it or an interrupted one.
    context.load(context.trained)
    with timed(log, "ended", task=request.task, phase=phase.name):
        phase.end(context)


def batch_plan(request: TrainRequest, records: Sequence[TrainRecord]) -> BatchPlan:
    """How this task's global batches are cut; refuses an indivisible choice."""
    training = request.config.training
    groups = None
    if training.share_images:
        from clmoe.data.packing import image_groups

        groups = image_groups(records)
    size, micro = training.batch_size, training.micro_batch_size
    return BatchPlan(request.config.seed, len(records), size, micro, count(), groups)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors``, readable by peft."""
    with writing(folder / "adapter_model.safetensors"):
        model.save_pretrained(str(folder), safe_serialization=True)
    (folder / CARD).unlink(missing_ok=True)  # peft's own, an empty form


def _load_base(request: TrainRequest) -> LoadedBase:
    from clmoe.model.llava import load_base

    base = load_base(request.config.model, device())
    if request.previous is not None and request.previous.lineage.base != base.fingerprint:
        raise ClmoeError(
            f"--previous {request.previous.folder} was trained on another base than {request.config.model.path}"
        )
    return base


def _identity(request: TrainRequest) -> dict[str, Any]:
    """What an interrupted command must have been asked for that this one goes on with its work."""
    return {
        "benchmark": request.benchmark.name,
        "config": training_identity(request.config),
        "parent": None if request.previous is None else request.previous.identity,
        "tasks": request.learned,
    }


def _model(request: TrainRequest, method: Method, base: LoadedBase) -> PeftModel:
    """The adapter as the parent left it, or fresh."""
    from clmoe.model.adapter import attach_adapter, load_adapter

    if request.previous is not None:
        return load_adapter(base.model, request.previous.folder, trainable=True)
    import torch

    torch.manual_seed(request.config.seed)  # peft's own LoRA draws its weights from the global generator
    return attach_adapter(base.model, method.adapter(base))


def _phase_steps(request: TrainRequest, phase: Phase) -> int:
    """Optimizer steps; ``training.steps`` counts per task, so the union takes them once for each of its tasks."""
    if phase.steps is not None:
        return phase.steps
    training = request.config.training
    union = request.task == UNION
    steps = None if training.steps is None else training.steps * (len(request.order) if union else 1)
    # the union's records hold a task's passes already
    epochs = training.epochs * (request.benchmark.task(request.task).passes if phase.of_task and not union else 1)
    return total_steps(len(phase.records), training.batch_size, epochs, steps)


def _train(request: TrainRequest, method: Method, context: TaskContext, phase: Phase, steps: int, log: EventLog) -> str:
    """Train a phase from its newest saved state, seal it, and remove the states.

    Returns what the model was wrapped in: ``DeepSpeedEngine``, ``DistributedDataParallel``, or its own class.
    """
    from clmoe.data.batches import train_dataset
    from clmoe.train.loss import TrainedModel, enable_checkpointing
    from clmoe.train.trainer import Report, TaskTrainer

    training, base = request.config.training, context.base
    if phase.learning_rate is not None:
        training = replace(training, learning_rate=phase.learning_rate)
    dataset = train_dataset(base, phase.records, phase.image_root, training.max_length)
    if training.gradient_checkpointing:
        enable_checkpointing(context.model)
    plan = batch_plan(request, phase.records)
    stage = request.stage
    title = f"{request.config.name} {stage.index + 1}/{stage.total} {request.task}"
    title += "" if phase.name == "trained" else f" ({phase.name})"
    with deferred() as asked:
        with (
            Progress(title, steps, read_events(log.path), stage) as progress,
            tracking(training.trackers, request.run, f"{request.output.name}-{phase.name}") as track,
        ):
            report = Report(progress, log, track, request.task, plan.batch_size)
            trained = TrainedModel(context.model, method, plan.batch_size)
            folder, pad = context.trained, base.tokenizer.pad_token_id
            trainer = TaskTrainer(trained, dataset, pad, training, plan, steps, report, folder, request.deepspeed)
            progress.skip(trainer.first_step)
            trainer.run(lambda: asked.now)
        with trainer.whole_weights():
            from_main(lambda: _seal(context.model, folder))
    engine = type(trainer.model_wrapped).__name__
    trainer.release()
    if request.deepspeed is not None and spreads_weights(request.deepspeed):
        context.base = _load_base(request)
    return engine


def _seal(model: PeftModel, folder: Path) -> None:
    """Save a phase's adapter; the states of its training are needed no more.

    Raises:
        ClmoeError: a weight is not finite.
    """
    from clmoe.train.state import states
    from clmoe.utils.tensors import check_finite, trainable

    check_finite(trainable(model), f"the end of phase {folder.name}")
    build_folder(folder, lambda target: save_adapter(model, target))
    for state in states(folder):
        shutil.rmtree(state)
