"""A whole sequence in one program: the base is loaded once, then every task is trained, sealed and evaluated."""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clmoe.bases.llava import LoadedBase
from clmoe.benchmarks.base import ORDERS, Benchmark, load_benchmark, train_records
from clmoe.benchmarks.prepare import open_benchmark
from clmoe.config import Config, load_config
from clmoe.data.images import unreadable
from clmoe.data.records import Question, TrainRecord
from clmoe.data.rows import all_of
from clmoe.data.styles import read_texts
from clmoe.errors import ClmoeError
from clmoe.evaluate.matrix import AccuracyMatrix
from clmoe.evaluate.run import check_questions, check_tasks, evaluate_checkpoint
from clmoe.methods import method_class
from clmoe.plan.budget import within_budget
from clmoe.plan.spent import write_spent
from clmoe.train.checkpoint import (
    Finished,
    checked_method,
    checkpoint_folders,
    differences,
    lasting,
    read_checkpoint,
)
from clmoe.train.loop import use_deepspeed
from clmoe.train.task import UNION, answers_fit, prepare_request, train_task
from clmoe.utils.files import file_sha256, locked, read_json, write_json
from clmoe.utils.logging import display, say
from clmoe.utils.paths import check_target, resolve_model_path
from clmoe.utils.processes import from_main
from clmoe.utils.schema import told

SETTINGS = "sequence.json"  # what a run folder was started with
TUNED = "tuned.json"  # the choice of `clmoe tune` that the run took its options from


@dataclass(frozen=True)
class Result:
    """A finished sequence.

    Attributes:
        run: its folder, with a checkpoint per task, predictions and tables.
        checkpoints: after each task, oldest first.
        matrix: accuracy on every task after every task, in percent.
        metrics: by name, see ``clmoe.evaluate.matrix``; None where a needed cell was not measured.
    """

    run: Path
    checkpoints: list[Path]
    matrix: AccuracyMatrix
    metrics: dict[str, float | None]


@told('clmoe.run(METHOD, "playground-coin", seed=0, settings={"training.steps": 20})')
def run(
    method: str | Path,
    benchmark: str | Path,
    *,
    order: str = "norm",
    seed: int | None = None,
    output: Path | str | None = None,
    base: str | Path | None = None,
    data: Path | str | None = None,
    deepspeed: str | None = None,
    settings: Mapping[str, Any] | Iterable[str] = (),
    restart: bool = False,
) -> Result:
    """``clmoe run``: a method on the whole sequence of a benchmark, continuing where an earlier call stopped.

    Args:
        method: a name in configs/methods, a YAML file, or a Python file that registers a method.
        benchmark: a name in configs/benchmarks or a YAML file.
        order: ``norm``, ``rev``, ``rand`` or task names separated by commas.
        output: run folder (default: ``runs/<benchmark>/<method>-seed<seed>``) for checkpoints ``01_<task>``, ...
        base: a name in configs/models, a model folder or a hub name.
        data: the benchmark's data folder.
        deepspeed: ``zero2``, ``zero2_offload`` or a JSON file; needs the processes that a launcher starts.
        settings: configuration keys and values, ``{"training.steps": 20}`` or ``["training.steps=20"]``.
        restart: delete an interrupted training and start it over; what is finished stays.

    Raises ClmoeError if the folder holds a run with other settings (they are named, nothing is touched), if files are
    missing or hold rows that cannot be used, and where training or evaluation does.
    """
    method, benchmark, base = str(method), str(benchmark), None if base is None else str(base)
    if isinstance(settings, str):
        settings = [settings]
    if isinstance(settings, Mapping):
        settings = [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]
    pairs = [*([] if seed is None else [f"seed={seed}"]), *settings]
    root = None if data is None else Path(data)
    described, config, tasks = chosen(method, benchmark, pairs, order=order, base=base, data=root)
    folder = default_folder(described.name, method, order, config.seed) if output is None else Path(output)
    check_output(folder, config, described)
    opened = from_main(lambda: open_benchmark(benchmark, root, described.asked(tasks, config.evaluation.general)))
    zero = use_deepspeed(deepspeed)
    with locked(folder):
        checkpoints = _go_on(config, opened, tasks, folder, zero, restart)
    matrix = AccuracyMatrix.read_csv(folder / "matrix.csv")
    return Result(folder, checkpoints, matrix, read_json(folder / "metrics.json"))


def check_output(output: Path, config: Config, benchmark: Benchmark, checkpoint: Path | None = None) -> None:
    """Raise ClmoeError unless results can go to this folder without touching data, base or ``checkpoint``."""
    base = Path(resolve_model_path(config.model.path))
    read = [base] if (base / "config.json").is_file() else []
    check_target("--output", output, benchmark.inputs, [*read, *([] if checkpoint is None else [checkpoint])])


def chosen(
    method: str, benchmark: str, settings: list[str], *, order: str, base: str | None, data: Path | None
) -> tuple[Benchmark, Config, list[str]]:
    """The benchmark, whose files need not exist, the method's configuration on it, and the order of its tasks.

    The configuration keeps to ``budget``.
    """
    described = load_benchmark(benchmark, data, check_files=False)
    config = load_config(method, described.recipe, settings, base, checked_method, benchmark)
    tasks = described.order(order, config.seed)
    return described, within_budget(config, len(tasks), [pair.partition("=")[0] for pair in settings]), tasks


def default_folder(benchmark: str, method: str, order: str, seed: int) -> Path:
    """``runs/<benchmark>/<method>[-<order>]-seed<seed>``; a user's own order gets a number of its own."""
    suffix = {"norm": ""}.get(order, f"-{order}" if order in ORDERS else f"-own{zlib.crc32(order.encode())}")
    return Path("runs") / benchmark / f"{Path(method).stem}{suffix}-seed{seed}"


def _go_on(
    config: Config, benchmark: Benchmark, order: list[str], run: Path, deepspeed: Path | None, restart: bool
) -> list[Path]:
    """Train and evaluate task after task on one base, loaded when it is first needed; returns the checkpoints."""
    method = method_class(config.method)(config)
    trained = {"none": [], "union": [UNION]}.get(method.chain, order)
    steps = list(zip(checkpoint_folders(run, trained), trained, strict=True))
    anew = restart and not any(checkpoint.exists() for checkpoint, _ in steps)
    values = from_main(lambda: _settings(config, benchmark, order, run, anew))
    asked = benchmark.asked(order, config.evaluation.general)
    check_tasks(benchmark, asked)  # those of later tasks too: they would stop the sequence after hours
    if not all(checkpoint.exists() for checkpoint, _ in steps):
        from_main(lambda: _check_rows(config, benchmark, asked))
        method.check_inputs(None, benchmark.root)
    from_main(lambda: write_json(run / SETTINGS, values))
    if config.tuned:
        from_main(lambda: write_json(run / TUNED, read_json(Path(config.tuned))))
    base: LoadedBase | None = None
    done, dones = None, list[Finished]()
    with display(f"{config.name} on {benchmark.name}", len(order)):
        if method.chain == "none" or config.evaluation.general:
            row, base = evaluate_checkpoint(run, benchmark, None, config, order)
            say(row)
        for number, (checkpoint, task) in enumerate(steps, 1):
            request = prepare_request(config, benchmark, task, order, done, checkpoint, deepspeed, restart)
            base = train_task(request, base)
            dones.append(done := read_checkpoint(checkpoint))
            row, base = evaluate_checkpoint(run, benchmark, done, config, order, base=base)
            say(f"{number}/{len(order)} {row}")
    from_main(lambda: write_spent(run, benchmark, config, dones))
    return [checkpoint for checkpoint, _ in steps]


def _check_rows(config: Config, benchmark: Benchmark, names: list[str]) -> None:
    """Read all rows and the images' headers, so that bad ones stop the sequence, all listed, before its first step."""
    fits, on_bad, bad, images = answers_fit(config), config.training.on_bad_record, list[ClmoeError](), set[Path]()
    if config.training.asd_texts:
        read_texts(Path(config.training.asd_texts))
    for task in benchmark.sets(names):
        reads: list[Callable[[], Sequence[TrainRecord | Question]]] = [
            partial(check_questions, benchmark, [task.name], images=True)
        ]
        if not task.general:
            reads.insert(0, partial(train_records, task, on_bad, fits))
        for read in reads:
            try:
                images.update(task.image_root / row.image for row in read() if row.image is not None)
            except ClmoeError as error:
                bad.append(error)
    bad += unreadable(images)
    if bad:
        raise all_of(bad)


def _settings(config: Config, benchmark: Benchmark, order: list[str], run: Path, anew: bool) -> dict[str, Any]:
    """All that decides the run's files.

    Raises ClmoeError if the folder holds those of another run; a run may become longer, or begin ``anew``.
    """
    values = lasting(config)
    del values["evaluation"]["batch_size"]
    values["evaluation"].pop("general", None)  # may be asked for later
    train = {name: file_sha256(benchmark.task(name).train) for name in order}
    values |= {"benchmark": benchmark.name, "order": order, "train": train}
    there = read_json(run / SETTINGS) if (run / SETTINGS).is_file() and not anew else values
    old, here = there["order"], values
    if order[: len(old)] == old:
        here = values | {"order": old, "train": {name: train[name] for name in old}}
    if changed := differences(there, here):
        raise ClmoeError(
            f"{run} holds a run with other settings ({changed}): give the same settings to continue it, choose "
            "another --output, or give --restart if it has finished no task yet"
        )
    return values
