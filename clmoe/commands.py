"""What the verbs do: each function takes the parsed options and calls the rooms below."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmoe.benchmarks.base import Benchmark, load_benchmark
from clmoe.config import Config, load_config
from clmoe.errors import ClmoeError
from clmoe.methods.base import method_class
from clmoe.system.lock import locked
from clmoe.system.processes import from_main

if TYPE_CHECKING:
    from clmoe.demo.examples import Example
    from clmoe.evaluate.evaluation import Checkpoint, Request
    from clmoe.model.llava import LoadedBase
    from clmoe.model.routing import RouterChoice
    from clmoe.train.lineage import Finished
    from clmoe.train.task import TrainRequest


BAD_SHOWN = 50
"""So many bad rows are printed."""


def open_benchmark(name: str, data: Path | None) -> Benchmark:
    """The benchmark with its data in place; the playground's is rendered on first use.

    Raises:
        ClmoeError: unknown benchmark or missing files.
    """
    benchmark = load_benchmark(name, data)
    if benchmark.built_on_first_use:
        from clmoe.benchmarks.builders import prepare_playground

        prepare_playground(benchmark)
    return benchmark


def _method_config(options: Namespace, benchmark: Benchmark) -> Config:
    """The method's configuration on the benchmark, its rank fitted to a budget where one is given."""
    config = load_config(options.config, benchmark.recipe, options.overrides, options.model)
    if config.adapter.budget is None:
        return config
    from clmoe.methods.budget import within_budget

    return within_budget(config)


def run_train(options: Namespace) -> str:
    """``clmoe train``; returns one line for the terminal."""
    from clmoe.train.task import prepare_request
    from clmoe.train.zero import deepspeed_settings, stand_alone

    deepspeed = None
    if options.deepspeed:
        deepspeed = deepspeed_settings(options.deepspeed)
        stand_alone()
    benchmark = from_main(lambda: open_benchmark(options.benchmark, options.data))
    config = _method_config(options, benchmark)
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
        from clmoe.system.logging import clock, read_events, seconds_left
        from clmoe.train.lineage import read_checkpoint

        done = read_checkpoint(request.output)
        config, order = request.config, request.order
        limit = None if request.learned[-1] == order[-1] else config.evaluation.limit
        row = evaluate_checkpoint(request.run, request.benchmark, done, config, order, limit=limit, base=base)
        line += f"; {row}"
        left = seconds_left(read_events(request.run / "events.jsonl"), request.stage.next(), None)
        line += f" ({clock(left)} left)" if left and base is not None else ""
    return line


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
    from clmoe.system.logging import Stage, write_timing

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


def run_eval(options: Namespace) -> str:
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
    from clmoe.system.paths import resolve_model_path

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


def run_report(options: Namespace) -> Any:
    """``clmoe report``."""
    from clmoe.report.run import read_run
    from clmoe.report.write import report_text, write_report

    if options.json:
        return [{"run": str(run), "label": read_run(run).label, **read_run(run).metrics} for run in options.runs]
    output = options.output or options.runs[0] / "report"
    written = write_report(options.runs, output, options.format, options.data)
    return report_text(options.runs) + "\nwritten: " + ", ".join(str(path) for path in written)


def run_metrics(options: Namespace) -> Any:
    """``clmoe metrics``."""
    from clmoe.evaluate.continual import metrics_from_files

    result = metrics_from_files(options.matrix, options.immediate)
    rounded = {name: None if value is None else round(value, 2) for name, value in result.items()}
    if options.json:
        return rounded
    return "\n".join(f"{name:<16}{'' if value is None else format(value, '8.2f')}" for name, value in rounded.items())


def run_plan(options: Namespace) -> Any:
    """``clmoe plan``: what the method would train and take, or the steps of the sequence."""
    benchmark = load_benchmark(options.benchmark, options.data, check_files=False)
    config = _method_config(options, benchmark)
    order = benchmark.order(options.order, config.seed)
    if options.steps:
        if options.extended_blocks is not None:
            raise ClmoeError("--extended-blocks belongs to the parameters, which --steps does not print: leave one out")
        return _sequence(method_class(config.method).chain, order)
    from clmoe.methods.plan import make_plan, plan_text
    from clmoe.train.forecast import Ask, make_forecast
    from clmoe.train.forecast_text import forecast_text
    from clmoe.train.zero import planned_sharding

    ask = Ask(planned_sharding(options.deepspeed, options.gpus), options.tokens, options.answer_tokens)
    method = method_class(config.method)(config)
    plan = make_plan(method, options.extended_blocks)
    forecast = make_forecast(method, benchmark, order, plan, ask)
    options.exit_code = int(bool(forecast.missing))
    if options.json:
        return {**plan.as_json(), **forecast.as_json()}
    return f"{plan_text(plan)}\n\n{forecast_text(forecast)}"


def run_doctor(options: Namespace) -> Any:
    """``clmoe doctor``: what is installed and usable here."""
    from clmoe.system.doctor import examine, report_text

    findings = examine()
    options.exit_code = int(any(finding.broken for finding in findings))
    return [finding.as_json() for finding in findings] if options.json else report_text(findings)


def _sequence(chain: str, order: list[str]) -> str:
    """One line per ``clmoe train``: number, task, the task it continues or -."""
    if chain == "none":
        return ""
    if chain == "union":
        return "01 all -"
    parents = ["-"] * len(order) if chain == "separate" else ["-", *order[:-1]]
    return "\n".join(f"{i:02} {task} {parent}" for i, (task, parent) in enumerate(zip(order, parents, strict=True), 1))


def run_data(options: Namespace) -> str:
    """``clmoe data prepare|check``: build what can be built, or read every row and image of a benchmark and count.

    Raises:
        ClmoeError: files are missing (each is named with its source), or rows are bad (they are listed).
    """
    benchmark = load_benchmark(options.benchmark, options.data, check_files=False)
    title = f"{benchmark.name} at {benchmark.root}"
    if options.action == "prepare":
        from clmoe.benchmarks.builders import prepare_benchmark

        return "\n".join(filter(None, [title, prepare_benchmark(benchmark)]))
    from clmoe.benchmarks.check import check_benchmark
    from clmoe.evaluate.scoring import gold_problem

    checked = check_benchmark(benchmark, gold_problem)
    lines = [title, *checked.lines, *(f"note: {note}" for note in checked.notes)]
    if not checked.bad:
        return "\n".join(lines)
    bad = checked.bad
    if options.bad is not None:
        from clmoe.system.files import write_text

        write_text(options.bad, "".join(f"{line}\n" for line in bad))
    shown = [f"bad: {line}" for line in bad[:BAD_SHOWN]]
    rest = len(bad) - len(shown)
    shown += [f"bad: and {rest} more; --bad FILE writes all of them"] if rest else []
    raise ClmoeError("\n".join([f"{len(bad)} bad", *lines, *shown]))


def run_convert(options: Namespace) -> str:
    """``clmoe convert``: tells from the files what SRC is; returns what was found and written."""
    from clmoe.convert.detect import check_options, detect

    source, target = options.source, options.target
    kind = detect(source)
    check_options(kind, source, options)
    if target.exists():
        raise ClmoeError(f"{target} exists: choose another folder or delete it")
    if kind == "liuhaotian":
        from clmoe.convert.liuhaotian import convert_liuhaotian

        found = convert_liuhaotian(source, target, options.vision)
    elif kind == "llama":
        from clmoe.convert.vicuna import convert_vicuna

        found = convert_vicuna(source, target, options.vision, options.projector)
    else:
        from clmoe.convert.legacy_adapters import convert_adapter

        benchmark = load_benchmark(options.benchmark, None, check_files=False)
        found = convert_adapter(source, target, options.model, benchmark, options.tasks)
    return f"{found}\nwritten and read back: {target}"


def run_card(options: Namespace) -> str:
    """``clmoe card``; returns the path written."""
    from clmoe.report.card import measured_scores
    from clmoe.system.files import write_text
    from clmoe.train.card import model_card
    from clmoe.train.checkpoint import CARD
    from clmoe.train.lineage import read_checkpoint

    done = read_checkpoint(options.checkpoint)
    scores = measured_scores(done, options.run or options.checkpoint.resolve().parent)
    output = options.output or options.checkpoint / CARD
    write_text(output, model_card(done.config, done.lineage, scores))
    return f"written: {output}"


def run_demo(options: Namespace) -> None:
    """``clmoe demo``: serve the page until it is interrupted."""
    from clmoe.train.lineage import read_checkpoint

    done = read_checkpoint(options.checkpoint)
    from clmoe.demo.page import build_page, launch
    from clmoe.evaluate.answer import load

    examples = _examples(options, done)
    title = f"{done.config.name} on {done.lineage.benchmark}, after {done.lineage.tasks[-1]}"
    page = build_page(load(options.checkpoint, options.model), title, examples)
    print(f"{title}: {launch(page, options.port)} (stop with Ctrl-C)", flush=True)
    page.block_thread()


def _examples(options: Namespace, done: Finished) -> list[Example]:
    """Test questions of the benchmark; a checkpoint whose benchmark is not at hand is shown without, and says so."""
    from clmoe.demo.examples import read_examples

    try:
        benchmark = open_benchmark(options.benchmark or done.lineage.benchmark, options.data)
        return read_examples(benchmark, done.lineage.tasks)
    except ClmoeError as error:
        if options.benchmark or options.data:
            raise
        print(f"clmoe demo: no examples (--benchmark and --data say where they are): {error}", file=sys.stderr)
        return []
