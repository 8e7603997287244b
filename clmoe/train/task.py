"""One task: check, begin, train, end, publish. Everything is built beside the output and appears at once."""

import gc
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel

from clmoe.bases.inputs import AnswersFit, train_dataset
from clmoe.bases.llava import LoadedBase, load_base, open_encoder
from clmoe.benchmarks.base import Benchmark, Task, train_records
from clmoe.config import Config, dump_config
from clmoe.data.images import unreadable
from clmoe.data.records import Part, TrainRecord, UnionRecords
from clmoe.data.rows import Seen, all_of, grouped
from clmoe.data.styles import diversified
from clmoe.errors import ClmoeError
from clmoe.experts.forward import FeatureStore, blank_image, enable_checkpointing, feature_folder
from clmoe.experts.model import attach_adapter, count_parameters, detach_adapter, load_adapter
from clmoe.locators import make_locator
from clmoe.locators.base import FILE as LOCATOR_FILE
from clmoe.methods import method_class
from clmoe.methods.base import ADAPTER_FILE, Method, Phase, TaskContext
from clmoe.train.checkpoint import (
    CONFIG,
    LINEAGE,
    MANIFEST,
    Finished,
    Lineage,
    build_folder,
    check_same,
    check_successor,
    checked_method,
    differences,
    identity,
    is_complete,
    publish,
    read_checkpoint,
    work_folder,
)
from clmoe.train.loop import PROJECTOR, BatchPlan, Report, TaskTrainer, TrainedModel, total_steps
from clmoe.train.state import states
from clmoe.utils.files import file_sha256, read_json, write_json
from clmoe.utils.logging import EventLog, Progress, Stage, provenance, read_events, timed
from clmoe.utils.processes import count, deferred, device, from_main, is_main, wait_for_all
from clmoe.utils.tensors import check_finite, trainable, writing

UNION = "all"
PHASES = ".phases"  # hidden, so that it is never part of a checkpoint
IDENTITY = "identity.json"
FILES = "trained_on.json"  # in a run folder: the sha256 of the training files of each checkpoint
SAMPLES = "samples.json"  # in a run folder: training samples, with repetitions, of each checkpoint's phases


@dataclass(frozen=True)
class TrainRequest:
    """One task to train; ``prepare_request`` makes it.

    ``task`` is ``all`` for methods that train on the union. ``order`` is the whole sequence, ``previous`` the verified
    parent, ``output`` the folder that becomes the checkpoint; ``restart`` drops an interrupted training of it.
    """

    config: Config
    benchmark: Benchmark
    task: str
    order: list[str]
    previous: Finished | None
    output: Path
    deepspeed: Path | None = None
    restart: bool = False

    @property
    def run(self) -> Path:
        return self.output.parent

    @property
    def learned(self) -> list[str]:
        """Tasks that the finished checkpoint has learned."""
        if self.task == UNION:
            return list(self.order)
        return [*(self.previous.lineage.tasks if self.previous else []), self.task]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result: an interrupted request with the same identity is continued."""
        parent = None if self.previous is None else self.previous.identity
        return identity(self.config, self.benchmark.name, parent, self.learned)

    @property
    def tasks(self) -> list[str]:
        """Tasks whose records this training reads."""
        return self.order if self.task == UNION else [self.task]

    @cached_property
    def files(self) -> dict[str, str]:
        """The sha256 of the training files, by task, and of the other files that the method reads."""
        found = {name: file_sha256(self.benchmark.task(name).train) for name in self.tasks}
        previous = None if self.previous is None else self.previous.folder
        others = [*method_class(self.config.method)(self.config).reads(previous, self.benchmark.root)]
        others += [Path(texts)] if (texts := self.config.training.asd_texts) else []
        return found | {f"{path.parent.name}/{path.name}": file_sha256(path) for path in others if path.is_file()}

    @property
    def noted(self) -> dict[str, Any]:
        """What an unfinished training records, so that only the same request on the same files continues it."""
        return self.identity | {"train": self.files}

    @property
    def stage(self) -> Stage:
        """Position in the sequence."""
        return Stage(0, 1) if self.task == UNION else Stage(self.order.index(self.task), len(self.order))


def prepare_request(
    config: Config,
    benchmark: Benchmark,
    task: str,
    order: list[str],
    previous: Finished | None,
    output: Path,
    deepspeed: Path | None = None,
    restart: bool = False,
) -> TrainRequest:
    """A request, after all checks that need no model. Raises ClmoeError if method, task and parent do not fit."""
    method = checked_method(config)
    if method.chain == "none":
        raise ClmoeError(f"method {config.method} trains nothing: evaluate it with clmoe eval --checkpoint base")
    if (task == UNION) != (method.chain == "union"):
        raise ClmoeError(
            f"method {config.method} trains {'on --task all only' if method.chain == 'union' else 'one task at a time'}"
        )
    if deepspeed is not None and method.needs_gradients:
        raise ClmoeError(
            f"method {config.method} works on whole gradients, but --deepspeed {deepspeed.stem} spreads them over the "
            "processes: leave it out (in scripts: LAUNCHER=torchrun); several processes then train under DDP"
        )
    if task != UNION:
        benchmark.task(task)
        if task not in order:
            raise ClmoeError(f"--task {task} is not in --order {','.join(order)}")
        if previous is None and order[0] != task:
            before = order[order.index(task) - 1]
            raise ClmoeError(
                f"--task {task} comes after {before} in --order {','.join(order)}: give --previous, the checkpoint of "
                f"{before}, or --order {task} to start from the base"
            )
    if previous is not None:
        if method.chain == "union":
            raise ClmoeError(f"method {config.method} trains on all tasks at once: leave out --previous")
        check_successor(previous, config, benchmark.name, task)
    return TrainRequest(config, benchmark, task, order, previous, output, deepspeed, restart)


def finished(request: TrainRequest) -> bool:
    """True if the output already exists. Raises ClmoeError if it is damaged or not what this request makes."""
    output = request.output
    if not output.exists():
        return False
    if not (output / MANIFEST).is_file():
        raise ClmoeError(f"--output {output} exists and is not a finished checkpoint: choose another or delete it")
    check_same(read_checkpoint(output), request.identity)
    there = by_checkpoint(request.run / FILES).get(output.name, request.files)
    if changed := differences({"train": there}, {"train": request.files}):
        raise ClmoeError(f"{output} was trained on other data ({changed}): choose another --output or delete it")
    if is_main():  # left by a command that was stopped right after publishing
        shutil.rmtree(output / PHASES, ignore_errors=True)
    return True


def by_checkpoint(path: Path) -> dict[str, dict[str, Any]]:
    """``FILES`` or ``SAMPLES``, by checkpoint folder of the run; checkpoints of older versions are not in it."""
    return read_json(path) if path.is_file() else {}


def answers_fit(config: Config, base: LoadedBase | None = None) -> AnswersFit:
    """The check that ``training.max_length`` leaves something to learn, with the tokenizer of the configured base."""
    return AnswersFit((base or open_encoder(config.model)).encoder, config.training.max_length)


def training_records(config: Config, task: Task, fits: AnswersFit, seen: Seen | None = None) -> Sequence[TrainRecord]:
    """What a task is trained on and its locator fitted to: its file's records, ``training.asd`` of them rewritten."""
    training = config.training
    records = train_records(task, training.on_bad_record, fits, seen)
    return diversified(records, training.asd, config.seed, training.asd_texts, fits, task.image_root)


def load_records(request: TrainRequest, base: LoadedBase | None) -> tuple[Sequence[TrainRecord], Path, list[str]]:
    """The training records, the folder that their images are relative to, and what is odd about them, one line each."""
    benchmark, on_bad = request.benchmark, request.config.training.on_bad_record
    fits, parts, notes = answers_fit(request.config, base), [], []
    for task in map(benchmark.task, request.tasks):
        records = training_records(request.config, task, fits, seen := Seen())
        bad = f"{len(seen.bad)} of {seen.rows} rows cannot be used (training.on_bad_record={on_bad})"
        lines = [*([bad] if seen.bad else []), *grouped(seen.bad), *seen.notes(images=not task.text_rows)]
        notes += [f"{task.name}: {line}" for line in lines]
        paths = {task.image_root / record.image for record in records if record.image is not None}
        if bad_images := from_main(partial(unreadable, paths)):
            raise all_of(bad_images)
        if request.task != UNION:
            return records, task.image_root, notes
        parts.append(Part.of(task.name, records, task.image_root, benchmark.root, task.passes))
    return UnionRecords(parts), benchmark.root, notes


def train_task(request: TrainRequest, base: LoadedBase | None = None) -> LoadedBase | None:
    """Train one task and publish its checkpoint; does nothing if it is already finished.

    ``base``, as the previous task returned it, saves loading it. Returns the base as it was, for the next task.
    """
    if finished(request):
        return base
    _spare_imports()
    config, learned, data = request.config, request.learned, request.benchmark.root
    method = method_class(config.method)(config)
    records, images, notes = load_records(request, base)
    batch_plan(request, records)
    previous = None if request.previous is None else request.previous.folder
    method.check_inputs(previous, data)
    from_main(lambda: check_work(request))
    if base is None:
        base = load_base(config.model, device())
    if request.previous is not None and request.previous.lineage.base != base.fingerprint:
        raise ClmoeError(f"--previous {previous} was trained on a different base from {config.model.path}")
    from_main(lambda: print("".join(f"{line}\n" for line in notes), end="", file=sys.stderr))
    building = from_main(lambda: open_work(request.output, request.noted))
    sealed = building / PHASES
    with TemporaryDirectory(prefix="clmoe-") as scratch:  # where the methods of all but the main process write
        work, task, index = building if is_main() else Path(scratch), learned[-1], len(learned) - 1
        model = _model(request, method, base)
        folders = work, sealed, sealed, previous, data, feature_folder(request.run)
        context = TaskContext(task, index, records, images, config, base, model, *folders)
        log = EventLog(request.run / "events.jsonl")
        log.write("started", task=request.task, **provenance())
        phases = method.phases(context)
        for phase in phases:
            batch_plan(request, phase.records, phase.batch_size)
        for phase in phases:
            parameters = _run_phase(request, method, context, phase, log)
        if method.keeps_parts:
            with timed(log, "located", task=request.task):
                _fit_locator(request, context)
        wait_for_all()  # until no process reads the phases' folders any more
        from_main(lambda: _publish(request, method, context, phases, parameters))
    detach_adapter(context.model)
    return context.base


@cache
def _spare_imports() -> None:
    """Keep what the imports made out of garbage collection: Trainer collects before each training.

    Done once per process, before there is a model: whatever is frozen is never freed from a cycle.
    """
    gc.collect()  # an evaluation may have come first
    gc.freeze()


def check_work(request: TrainRequest) -> None:
    """Raise ClmoeError, naming what differs, if an interrupted training of the output has other settings.

    With ``restart`` it is deleted instead.
    """
    work = work_folder(request.output)
    marker = work / PHASES / IDENTITY
    if request.restart:
        shutil.rmtree(work, ignore_errors=True)
    there = read_json(marker) if marker.is_file() else request.noted
    if changed := differences({"train": request.files} | there, request.noted):  # older versions recorded no files
        raise ClmoeError(
            f"{work} holds an interrupted training with other settings ({changed}): give the same settings to "
            "continue it, choose another --output, or give --restart to delete it and start over"
        )


def open_work(output: Path, identity: dict[str, Any]) -> Path:
    """The folder to build ``output`` in; what an interrupted command left unfinished there is removed."""
    work = work_folder(output)
    phases = work / PHASES
    marker = phases / IDENTITY
    if work.exists() and not marker.is_file():
        shutil.rmtree(work)  # stopped before it had begun
    write_json(marker, identity)
    for leftover in [path for path in work.iterdir() if path != phases]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for leftover in phases.iterdir():
        if leftover.is_dir() and not (leftover / MANIFEST).is_file():
            shutil.rmtree(leftover)
    return work


def _fit_locator(request: TrainRequest, context: TaskContext) -> None:
    """Add the task to the parent's locator, on features of its training data."""
    config = request.config
    locator = make_locator(config.locator, config.seed)
    if not locator.fits:
        return
    if context.previous is not None:
        locator.load(context.previous / LOCATOR_FILE)
    store = FeatureStore.of(context.base, config, context.features, locator.view)
    features = store.of_training(context.model, context.records, context.image_root, config)

    def fit() -> None:  # up to minutes of work, the same in every process: one of them does it
        locator.fit(features)
        locator.save(context.work / LOCATOR_FILE)

    from_main(fit)


def _publish(request: TrainRequest, method: Method, context: TaskContext, phases: list[Phase], parameters: int) -> None:
    """Complete the checkpoint's files, put it in place, and only then remove what was used to make them."""
    work, config = context.work, request.config
    save_adapter(context.model, work)
    (work / CONFIG).write_text(dump_config(config), encoding="utf-8")
    lineage = Lineage(
        method=config.method,
        benchmark=request.benchmark.name,
        tasks=request.learned,
        seed=config.seed,
        parent=None if request.previous is None else request.previous.identity,
        base=context.base.fingerprint,
        steps=_phase_steps(request, phases[-1]),
        trainable_parameters=parameters,
        adapter_parameters=count_parameters(context.model)[1],
        effective_scale=method.effective_scale(),
    )
    write_json(work / LINEAGE, asdict(lineage))
    batch = config.training.batch_size
    samples = {phase.name: _phase_steps(request, phase) * (phase.batch_size or batch) for phase in phases}
    for path, values in ((request.run / FILES, request.files), (request.run / SAMPLES, samples)):
        write_json(path, by_checkpoint(path) | {request.output.name: values})
    publish(work, request.output)
    shutil.rmtree(request.output / PHASES)


def _run_phase(request: TrainRequest, method: Method, context: TaskContext, phase: Phase, log: EventLog) -> int:
    """Train and seal one phase, or take an interrupted run's; then end it. Returns how many parameters it trained."""
    context.trained = context.sealed / phase.name
    if not from_main(lambda: is_complete(context.trained)):
        phase.begin(context)
        steps = _phase_steps(request, phase)
        with timed(log, "trained", task=request.task, phase=phase.name, steps=steps, processes=count()) as extra:
            extra |= _train(request, method, context, phase, steps, log)
    # Always from the file: what follows is the same whether this process trained it or an interrupted one.
    context.load(context.trained)
    parameters = sum(p.numel() for name, p in trainable(context.model).items() if method.rate_factor(name))
    with timed(log, "ended", task=request.task, phase=phase.name):
        phase.end(context)
    return parameters


def batch_plan(request: TrainRequest, records: Sequence[TrainRecord], batch_size: int | None = None) -> BatchPlan:
    """How this task's global batches are cut. Raises ClmoeError if they cannot be divided over the processes."""
    training = request.config.training
    sizes = batch_size or training.batch_size, training.micro_batch_size
    return BatchPlan(request.config.seed, len(records), *sizes, count())


def save_adapter(model: PeftModel, folder: Path) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors``, readable by peft."""
    with writing(folder / ADAPTER_FILE):
        # embeddings never train; "auto" would look for the base's files to find that out
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's own, an empty template


def _model(request: TrainRequest, method: Method, base: LoadedBase) -> PeftModel:
    """The adapter as the parent left it, or a fresh one."""
    if request.previous is not None and method.chain == "sequence":
        return load_adapter(base.model, request.previous.folder, trainable=True)
    torch.manual_seed(request.config.seed)  # peft's own LoRA draws its weights from the global generator
    return attach_adapter(base.model, method.adapter(base))


def _phase_steps(request: TrainRequest, phase: Phase) -> int:
    if phase.steps is not None:
        return phase.steps
    training, records = request.config.training, len(phase.records)
    if request.task == UNION:  # its records already hold every task's passes
        return total_steps(training, records, tasks=len(request.order))
    return total_steps(training, records, request.benchmark.task(request.task).passes if phase.of_task else 1)


def _train(
    request: TrainRequest, method: Method, context: TaskContext, phase: Phase, steps: int, log: EventLog
) -> dict[str, Any]:
    """Train a phase from its newest saved state and seal it; returns the model's wrapper class, and lost updates."""
    training = request.config.training
    base = replace(context.base, soft_tokens=method.soft_tokens(context.index + 1))
    if phase.learning_rate is not None:
        training = replace(training, learning_rate=phase.learning_rate)
    plan = batch_plan(request, phase.records, phase.batch_size)
    dataset = train_dataset(base, phase.records, phase.image_root, training.max_length, plan.rows(steps))
    if training.gradient_checkpointing:
        enable_checkpointing(context.model)
    for name, parameter in trainable(context.model).items():
        parameter.requires_grad_(method.rate_factor(name) > 0)
    stage = request.stage
    part = "" if phase.name == "trained" else f" ({phase.name})"
    title = f"{request.config.name} {stage.index + 1}/{stage.total} {request.task}{part}"
    with deferred() as asked:
        with Progress(title, steps, read_events(log.path), stage) as progress:
            report = Report(progress, log, request.task, plan.batch_size, method)
            tuned = count() > 1 and any(PROJECTOR in name for name in trainable(context.model))
            trained = TrainedModel(context.model, method, plan.batch_size, blank_image(base) if tuned else None)
            pad, zero = base.tokenizer.pad_token_id, request.deepspeed
            trainer = TaskTrainer(trained, dataset, pad, training, plan, steps, report, context.trained, asked, zero)
            progress.skip(trainer.first_step)
            trainer.train()
        method.finish(context.model)
        from_main(lambda: _seal(context.model, context.trained))
    trainer.release()
    if trainer.lost:
        lost = f"{trainer.lost} of {steps} updates were lost because the gradient overflowed"
        warnings.warn(f"{request.output} ({phase.name}): {lost}", stacklevel=2)
    engine = {"engine": type(trainer.model_wrapped).__name__}
    return engine | ({"lost_updates": trainer.lost} if trainer.lost else {})


def _seal(model: PeftModel, folder: Path) -> None:
    """Save a phase's adapter and remove its states. Raises ClmoeError if a weight is not finite."""
    check_finite(trainable(model), f"the end of phase {folder.name}")
    build_folder(folder, lambda target: save_adapter(model, target))
    for state in states(folder):
        shutil.rmtree(state)
