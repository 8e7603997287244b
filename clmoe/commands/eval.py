"""``clmoe eval``: a checkpoint, or the bare model, on tasks."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from clmoe.benchmarks.base import Benchmark
from clmoe.commands.opening import open_benchmark
from clmoe.config import Config, load_config
from clmoe.errors import ClmoeError
from clmoe.methods.base import method_class
from clmoe.utils.files import locked
from clmoe.utils.processes import from_main

if TYPE_CHECKING:
    from clmoe.evaluate.evaluation import Checkpoint, Request
    from clmoe.model.llava import LoadedBase
    from clmoe.model.routing import RouterChoice
    from clmoe.train.lineage import Finished


def run(options: Namespace) -> str:
    """``clmoe eval``; returns the scores as one line."""
    benchmark = from_main(lambda: open_benchmark(options.benchmark, options.data))
    with locked(options.output):
        return _evaluate_base(options, benchmark) if options.checkpoint == "base" else _evaluate(options, benchmark)


def _evaluate(options: Namespace, benchmark: Benchmark) -> str:
    """A finished checkpoint."""
    if options.config or options.model:
        raise ClmoeError("--config and --model belong to --checkpoint base: a checkpoint brings its own")
    from clmoe.evaluate.run_info import check_run_order
    from clmoe.train.lineage import read_checkpoint

    done = read_checkpoint(Path(options.checkpoint), options.overrides)
    if options.tasks:
        from clmoe.evaluate.evaluation import check_tasks

        check_tasks(benchmark, options.tasks)
    _refuse_training_overrides(options.overrides)
    config = done.config
    order = benchmark.order(options.order, config.seed)
    if done.lineage.benchmark != benchmark.name:
        raise ClmoeError(f"{done.folder} was trained on benchmark {done.lineage.benchmark}, not {benchmark.name}")
    from_main(lambda: check_run_order(options.output, order))
    limit = None if done.lineage.tasks[-1] == order[-1] else config.evaluation.limit
    return evaluate_checkpoint(
        options.output,
        benchmark,
        done,
        config,
        order,
        limit=limit,
        tasks=options.tasks,
        router=options.router,
        scoring=options.scoring,
    )


def _refuse_training_overrides(overrides: list[str]) -> None:
    for pair in overrides:
        if pair.split("=")[0].split(".")[0] not in ("evaluation", "options", "label"):
            raise ClmoeError(f"{pair}: only evaluation.*, options.* and label can change after training")


def _evaluate_base(options: Namespace, benchmark: Benchmark) -> str:
    """The bare model as row ``zero_shot``."""
    from clmoe.evaluate.continual import ZERO_SHOT
    from clmoe.evaluate.evaluation import Checkpoint, Request, check_tasks
    from clmoe.evaluate.run_info import check_run_order, write_run_info
    from clmoe.model.fingerprint import base_fingerprint
    from clmoe.utils.paths import resolve_model_path

    config = load_config(options.config or "zero_shot", benchmark.recipe, options.overrides, options.model)
    order = benchmark.order(options.order, config.seed)
    names = options.tasks or order
    check_tasks(benchmark, names)
    from_main(lambda: check_run_order(options.output, order))
    identity = base_fingerprint(resolve_model_path(config.model.path))
    checkpoint = Checkpoint(None, identity, ZERO_SHOT, [], config, identity)
    requests = [Request(name, "located", options.scoring, None) for name in names]
    _fill(options.output, benchmark, checkpoint, requests, order, "located", None)
    from_main(lambda: write_run_info(options.output, benchmark, config, order, options.scoring, None))
    return _row(options.output, ZERO_SHOT, requests)


def evaluate_checkpoint(
    run: Path,
    benchmark: Benchmark,
    done: Finished,
    config: Config,
    order: list[str],
    *,
    limit: int | None = None,
    tasks: list[str] | None = None,
    router: RouterChoice = "located",
    scoring: str = "fixed",
    base: LoadedBase | None = None,
) -> str:
    """Evaluate a checkpoint on the tasks it has learned, and on its newest one with the task known.

    Returns the scores as one line.
    """
    from clmoe.evaluate.evaluation import Checkpoint, Request, check_tasks
    from clmoe.evaluate.growth import record_growth
    from clmoe.evaluate.run_info import write_run_info
    from clmoe.evaluate.usage import record_usage

    learned = done.lineage.tasks
    names = tasks or learned
    check_tasks(benchmark, names)
    checkpoint = Checkpoint(done.folder, done.identity, learned[-1], learned, config, done.lineage.base)
    requests = [Request(name, router, scoring, limit) for name in names]
    if method_class(config.method).finds_task and router == "located" and tasks is None:
        requests.append(Request(learned[-1], "oracle", scoring, limit))
    _fill(run, benchmark, checkpoint, requests, order, router, base)

    def write() -> str:
        write_run_info(run, benchmark, config, order, scoring, done)
        record_growth(run, done, order)
        record_usage(run, done, order)
        return _row(run, learned[-1], requests)

    return from_main(write)


def _fill(
    run: Path,
    benchmark: Benchmark,
    checkpoint: Checkpoint,
    requests: list[Request],
    order: list[str],
    router: RouterChoice,
    base: LoadedBase | None,
) -> None:
    """Evaluate what is missing and rebuild the run's tables."""
    from clmoe.evaluate.evaluation import evaluate, unanswered
    from clmoe.evaluate.tables import write_tables
    from clmoe.utils.logging import Stage, write_timing

    missing = from_main(lambda: unanswered(run, benchmark, checkpoint, requests))
    if missing:
        from clmoe.evaluate.answer import open_answerer
        from clmoe.methods.features import feature_folder

        answerer = open_answerer(checkpoint, base, feature_folder(run))
        last = checkpoint.after
        stage = Stage(order.index(last), len(order)) if last in order else None
        evaluate(run, benchmark, checkpoint, missing, answerer, stage)
    untrained = method_class(checkpoint.config.method).chain == "none"
    scoring = requests[0].scoring
    from_main(lambda: write_tables(run, order, router, scoring=scoring, untrained=untrained))
    from_main(lambda: write_timing(run))


def _row(run: Path, after: str, requests: list[Request]) -> str:
    """``after text: sqa 40.0, text 91.3``."""
    from clmoe.evaluate.evaluation import read_score

    scores = [(request.stem(), read_score(run, after, request.stem(), request.scoring)) for request in requests]
    return f"after {after}: " + ", ".join(f"{stem} {score:.1f}" for stem, score in scores if score is not None)
