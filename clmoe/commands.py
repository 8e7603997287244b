"""What the verbs do that train, answer or read runs; ``cli`` imports this file when one of them is given."""

import argparse
import mimetypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clmoe import sequence
from clmoe.benchmarks.base import Benchmark, load_benchmark
from clmoe.benchmarks.check import check_benchmark, check_recipe
from clmoe.benchmarks.prepare import open_benchmark
from clmoe.config import Config, load_config
from clmoe.convert.command import convert_any
from clmoe.errors import ClmoeError
from clmoe.evaluate.answer import load
from clmoe.evaluate.run import evaluate_checkpoint
from clmoe.evaluate.scoring import gold_problem
from clmoe.methods import method_class
from clmoe.plan import make_plan, plan_text
from clmoe.report.page import write_report
from clmoe.report.runs import read_run
from clmoe.report.tables import report_text
from clmoe.train.checkpoint import read_checkpoint
from clmoe.train.loop import use_deepspeed
from clmoe.train.task import UNION, answers_fit, prepare_request, train_task
from clmoe.utils.files import locked, write_text
from clmoe.utils.paths import check_target, find_config
from clmoe.utils.processes import from_main


def train(options: argparse.Namespace) -> str:
    """``clmoe train``: one task, from the checkpoint before it to the next."""
    deepspeed = use_deepspeed(options.deepspeed)
    _, config, order = _chosen(options)
    needed = order if options.task == UNION else [options.task]
    benchmark = from_main(lambda: open_benchmark(options.benchmark, options.data, needed))
    sequence.check_output(options.output, config, benchmark, options.previous)
    previous = None if options.previous is None else read_checkpoint(options.previous)
    request = prepare_request(config, benchmark, options.task, order, previous, options.output, deepspeed)
    with locked(request.run):
        done = train_task(request) is None
    return f"{request.output}: {'finished before' if done else 'trained'}"


def check(options: argparse.Namespace) -> str:
    """``clmoe data check``: all that is bad in a benchmark's data."""
    benchmark = load_benchmark(options.benchmark, options.data, check_files=False)
    order = benchmark.order(options.order, 0)
    if options.bad is not None:
        files = [find_config("benchmarks", options.benchmark), *benchmark.inputs]
        picture = (mimetypes.guess_type(options.bad.name)[0] or "").startswith("image/")
        check_target("--bad", options.bad, [*files, options.bad] if picture else files, file=True)
    check_recipe(benchmark.recipe, f"benchmark {benchmark.name}: recipe")
    config = load_config("lora", benchmark.recipe, [], options.base)
    checked = check_benchmark(benchmark, gold_problem, order, answers_fit(config))
    lines = [f"{benchmark.name} at {benchmark.root}", *checked.lines, *(f"note: {note}" for note in checked.notes)]
    lines.append(f"answers are held against {config.training.max_length} tokens of {config.model.path}")
    if not checked.bad:
        return "\n".join(lines)
    if options.bad is not None:
        write_text(options.bad, "".join(f"{line}\n" for line in checked.bad))
    found = [f"bad: {line}" for line in checked.report()]
    raise ClmoeError("\n".join([f"{len(checked.bad)} bad (--bad FILE writes a line for each)", *lines, *found]))


def _chosen(options: argparse.Namespace) -> tuple[Benchmark, Config, list[str]]:
    given = {"order": options.order, "base": options.base, "data": options.data}
    return sequence.chosen(options.config, options.benchmark, options.settings, **given)


def evaluate(options: argparse.Namespace) -> str:
    """``clmoe eval``: a checkpoint, or the bare base, on tasks."""
    described = load_benchmark(options.benchmark, options.data, check_files=False)
    asked = {"tasks": options.tasks, "scoring": options.scoring}
    done = None
    if options.checkpoint == "base":
        config = load_config(options.config or "zero_shot", described.recipe, options.settings, options.base)
    else:
        if options.config or options.base:
            raise ClmoeError("--config and --base belong to --checkpoint base: a checkpoint brings its own")
        for pair in options.settings:
            if pair.split("=")[0].split(".")[0] not in ("evaluation", "locator", "options", "label"):
                raise ClmoeError(f"{pair}: only evaluation.*, locator.*, options.* and label can change after training")
        done = read_checkpoint(Path(options.checkpoint), options.settings)
        if done.lineage.benchmark != described.name:
            raise ClmoeError(f"{done.folder} was trained on benchmark {done.lineage.benchmark}, not {described.name}")
        config = done.config
    order = described.order(options.order, config.seed)
    needed = options.tasks or (order if done is None else done.lineage.tasks)
    benchmark = from_main(lambda: open_benchmark(options.benchmark, options.data, needed))
    sequence.check_output(options.output, config, benchmark, None if done is None else done.folder)
    with locked(options.output):
        return evaluate_checkpoint(options.output, benchmark, done, config, order, **asked)[0]


def report(options: argparse.Namespace) -> Any:
    """``clmoe report``: tables and figures of runs."""
    if options.json:
        return [{"run": str(read.path), "label": read.label, **read.metrics} for read in map(read_run, options.runs)]
    output = options.output or options.runs[0] / "report"
    check_target("--output", output, [run / "matrix.csv" for run in options.runs])
    written = write_report(options.runs, output, options.format, options.data)
    return f"{report_text(options.runs)}\n{output}: {', '.join(path.name for path in written)}"


def plan(options: argparse.Namespace) -> Any:
    """``clmoe plan``: what a sequence trains and needs, before it is run."""
    benchmark, config, order = _chosen(options)
    settings = options.gpus, options.deepspeed, options.tokens, options.extended_blocks
    values = make_plan(method_class(config.method)(config), benchmark, order, *settings)
    options.exit_code = int(bool(values["missing"]))
    return values if options.json else plan_text(values)


def demo(options: argparse.Namespace) -> None:
    """``clmoe demo``: ask a checkpoint in the browser."""
    from clmoe.demo import build_page, launch, read_examples

    done = read_checkpoint(options.checkpoint)
    title = f"{done.config.name} on {done.lineage.benchmark}, after {done.lineage.tasks[-1]}"
    examples = []
    try:
        benchmark = open_benchmark(options.benchmark or done.lineage.benchmark, options.data, done.lineage.tasks)
        examples = read_examples(benchmark, done.lineage.tasks)
    except ClmoeError as error:
        if options.benchmark or options.data:
            raise
        print(f"clmoe demo: no examples (--benchmark and --data say where they are): {error}", file=sys.stderr)
    page = build_page(load(options.checkpoint, options.model), title, examples)
    print(f"{title}: {launch(page, options.port)} (stop with Ctrl-C)", flush=True)
    page.block_thread()


COMMANDS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "run": sequence.command,
    "train": train,
    "eval": evaluate,
    "report": report,
    "plan": plan,
    "convert": convert_any,
    "demo": demo,
}
