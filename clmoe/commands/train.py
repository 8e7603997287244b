"""``clmoe train``: one task, and its evaluation with ``--then-eval``."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from clmoe.commands.eval import evaluate_checkpoint
from clmoe.commands.opening import method_config, open_benchmark
from clmoe.utils.files import locked
from clmoe.utils.processes import from_main

if TYPE_CHECKING:
    from clmoe.train.task import TrainRequest


def run(options: Namespace) -> str:
    """``clmoe train``; returns one line for the terminal."""
    from clmoe.train.task import prepare_request
    from clmoe.train.zero import deepspeed_settings, stand_alone

    deepspeed = None
    if options.deepspeed:
        deepspeed = deepspeed_settings(options.deepspeed)
        stand_alone()
    benchmark = from_main(lambda: open_benchmark(options.benchmark, options.data))
    config = method_config(options, benchmark)
    order = benchmark.order(options.order, config.seed)
    request = prepare_request(config, benchmark, options.task, order, options.previous, options.output, deepspeed)
    if options.then_eval:
        from clmoe.evaluate.evaluation import check_questions, check_tasks
        from clmoe.evaluate.run_info import check_run_order

        from_main(lambda: check_run_order(request.run, order))
        check_tasks(benchmark, order)  # those of later tasks too: they would stop the sequence after hours
        if not request.output.exists():
            from_main(lambda: check_questions(benchmark, order))
    with locked(request.run):
        return _train_and_evaluate(request, options.then_eval)


def _train_and_evaluate(request: TrainRequest, then_evaluate: bool) -> str:
    from clmoe.train.task import train_task

    base = train_task(request)
    line = f"{request.output}: {'finished before' if base is None else 'trained'}"
    if then_evaluate:
        from clmoe.train.lineage import read_checkpoint
        from clmoe.utils.logging import clock, read_events, seconds_left

        done = read_checkpoint(request.output)
        config, order = request.config, request.order
        limit = None if request.learned[-1] == order[-1] else config.evaluation.limit
        row = evaluate_checkpoint(request.run, request.benchmark, done, config, order, limit=limit, base=base)
        line += f"; {row}"
        left = seconds_left(read_events(request.run / "events.jsonl"), request.stage.next(), None)
        line += f" ({clock(left)} left)" if left and base is not None else ""
    return line
