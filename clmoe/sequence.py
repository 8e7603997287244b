"""A whole sequence in one program: the base is loaded once, then every task is trained, sealed and evaluated.

Every step leaves a finished file or none, so the same call continues after any interruption and ends in the same bytes.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clmoe.bases.llava import LoadedBase
from clmoe.benchmarks.base import ORDERS, Benchmark, load_benchmark
from clmoe.benchmarks.prepare import open_benchmark
from clmoe.config import Config, load_config
from clmoe.data.records import load_train
from clmoe.errors import ClmoeError
from clmoe.evaluate.matrix import AccuracyMatrix
from clmoe.evaluate.run import check_questions, check_tasks, evaluate_checkpoint
from clmoe.methods import method_class
from clmoe.train.checkpoint import Finished, differences, lasting, read_checkpoint
from clmoe.train.loop import use_deepspeed
from clmoe.train.task import UNION, prepare_request, train_task
from clmoe.utils.files import file_sha256, locked, read_json, write_json
from clmoe.utils.logging import display, say
from clmoe.utils.processes import from_main

SETTINGS = "sequence.json"
"""What a run folder was started with."""


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


def run(
    method: str,
    benchmark: str,
    *,
    order: str = "norm",
    seed: int | None = None,
    output: Path | str | None = None,
    base: str | None = None,
    data: Path | str | None = None,
    deepspeed: str | None = None,
    settings: Mapping[str, Any] | Iterable[str] = (),
) -> Result:
    """``clmoe run``: a method on the whole sequence of a benchmark, or on from where an earlier call stopped.

    Args:
        method: a name in configs/methods, a YAML file, or a Python file that registers a method.
        benchmark: a name in configs/benchmarks or a YAML file.
        order: ``norm``, ``rev``, ``rand`` or task names separated by commas.
        output: run folder; by default ``runs/<benchmark>/<method>-seed<seed>`` below the current folder. Checkpoints
            become ``01_<task>``, ``02_<task>``, ...
        base: a name in configs/models, a model folder or a hub name.
        data: the benchmark's data folder.
        deepspeed: ``zero2``, ``zero2_offload`` or a JSON file; needs the processes that a launcher starts.
        settings: configuration keys and values, ``{"training.steps": 20}`` or ``["training.steps=20"]``.

    Raises:
        ClmoeError: the folder holds a run with other settings (they are named, nothing is touched), files are missing
            or hold rows that cannot be used, or what training and evaluation raise.
    """
    if isinstance(settings, Mapping):
        settings = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    pairs = [*([] if seed is None else [f"seed={seed}"]), *settings]
    root = None if data is None else Path(data)
    described, config, tasks = chosen(method, benchmark, pairs, order=order, base=base, data=root)
    opened = from_main(lambda: open_benchmark(benchmark, root, tasks))
    folder = default_folder(described.name, method, order, config.seed) if output is None else Path(output)
    zero = use_deepspeed(deepspeed)
    kind = method_class(config.method)(config)
    trained = {"none": [], "union": [UNION]}.get(kind.chain, tasks)
    steps = [(folder / f"{number:02}_{task}", task) for number, task in enumerate(trained, 1)]
    with locked(folder):
        values = from_main(lambda: _settings(config, opened, tasks))
        from_main(lambda: _check_settings(folder, values))
        check_tasks(opened, tasks)  # those of later tasks too: they would stop the sequence after hours
        if not all(checkpoint.exists() for checkpoint, _ in steps):
            from_main(lambda: _check_rows(opened, tasks))
            kind.check_inputs(None, opened.root)
        from_main(lambda: write_json(folder / SETTINGS, values))
        with display(f"{config.name} on {opened.name}", len(tasks)):
            if kind.chain == "none":
                say(evaluate_checkpoint(folder, opened, None, config, tasks)[0])
            _train_all(config, opened, tasks, steps, zero)
    matrix = AccuracyMatrix.read_csv(folder / "matrix.csv")
    return Result(folder, [checkpoint for checkpoint, _ in steps], matrix, read_json(folder / "metrics.json"))


def chosen(
    method: str, benchmark: str, settings: list[str], *, order: str, base: str | None, data: Path | None
) -> tuple[Benchmark, Config, list[str]]:
    """The benchmark, whose files need not be there, the method's configuration on it, and the order of its tasks.

    Arguments are those of ``run``.
    """
    described = load_benchmark(benchmark, data, check_files=False)
    config = load_config(method, described.recipe, settings, base)
    return described, config, described.order(order, config.seed)


def default_folder(benchmark: str, method: str, order: str, seed: int) -> Path:
    """``runs/<benchmark>/<method>[-<order>]-seed<seed>``; orders of the user's own get a number of their own."""
    suffix = {"norm": ""}.get(order, f"-{order}" if order in ORDERS else f"-own{zlib.crc32(order.encode())}")
    return Path("runs") / benchmark / f"{Path(method).stem}{suffix}-seed{seed}"


def _train_all(
    config: Config, benchmark: Benchmark, order: list[str], steps: list[tuple[Path, str]], deepspeed: Path | None
) -> None:
    """Train and evaluate task after task on one base, which is loaded when it is first needed."""
    base: LoadedBase | None = None
    done: Finished | None = None
    for number, (checkpoint, task) in enumerate(steps, 1):
        request = prepare_request(config, benchmark, task, order, done, checkpoint, deepspeed)
        base = train_task(request, base)
        done = read_checkpoint(checkpoint)
        row, base = evaluate_checkpoint(checkpoint.parent, benchmark, done, config, order, base=base)
        say(f"{number}/{len(order)} {row}")


def _check_rows(benchmark: Benchmark, order: list[str]) -> None:
    """Read every training and test row of the sequence, so that a bad one stops it before the first step."""
    for name in order:
        task = benchmark.task(name)
        load_train(task.train, task.image_root)
    check_questions(benchmark, order)


def _settings(config: Config, benchmark: Benchmark, order: list[str]) -> dict[str, Any]:
    """Everything that decides the run's files."""
    values = lasting(config)
    del values["evaluation"]["batch_size"]
    train = {name: file_sha256(benchmark.task(name).train) for name in order}
    return {**values, "benchmark": benchmark.name, "order": order, "train": train}


def _check_settings(run: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder of another run before anything is written; a sequence may be made longer."""
    if not (run / SETTINGS).is_file():
        return
    there, here = read_json(run / SETTINGS), dict(settings)
    if here["order"][: len(there["order"])] == there["order"]:
        here["order"], here["train"] = there["order"], {name: here["train"][name] for name in there["order"]}
    changed = differences(there, here)
    if changed:
        raise ClmoeError(
            f"{run} holds a run with other settings ({changed}): give the same settings to continue it, or choose "
            "another --output"
        )
