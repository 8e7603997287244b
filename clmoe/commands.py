"""What the verbs do that train, answer or read runs; ``cli`` imports this file when one of them is given."""

import argparse
import json
import mimetypes
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import yaml

from clmoe import sequence
from clmoe.benchmarks.base import Benchmark, load_benchmark
from clmoe.benchmarks.check import check_benchmark
from clmoe.benchmarks.prepare import open_benchmark
from clmoe.config import Config, load_config
from clmoe.contract import check_method
from clmoe.convert.command import convert_any
from clmoe.convert.merge import merge_checkpoint
from clmoe.errors import ClmoeError
from clmoe.evaluate.loaded import load
from clmoe.evaluate.relocate import finished_method, own_locator, relocate, usable_locators
from clmoe.evaluate.run import evaluate_checkpoint
from clmoe.evaluate.scoring import gold_problem
from clmoe.methods import method_class
from clmoe.plan import make_plan, plan_text
from clmoe.plan.cost import MFU, card
from clmoe.plan.fit import fit
from clmoe.report.card import model_card
from clmoe.report.runs import group_runs, read_run
from clmoe.report.tables import alike_note, comparison_table, report_text, spent_table, to_text
from clmoe.train.checkpoint import MANIFEST, checked_method, read_checkpoint, sealed_files
from clmoe.train.loop import use_deepspeed
from clmoe.train.task import UNION, answers_fit, prepare_request, train_task
from clmoe.utils.files import flush, locked, read_json, write_json, write_text
from clmoe.utils.paths import check_target, find_config, resolve_model_path
from clmoe.utils.processes import count, from_main, is_main

OPTIONS = "options."
TUNE_TASKS, TUNE_SEED, MOST_TRIALS = 3, 100, 6


def run(options: argparse.Namespace) -> str:
    """``clmoe run``: a method on a benchmark, or a sweep over every seed and every combination of values."""
    given = {name: value for name, value in vars(options).items() if name not in ("verb", "seeds", "sets", "fit")}
    if options.seeds is None and options.sets is None:
        result = sequence.run(**given | _fitted(options, options.method, options.settings))
        shown = {name: value for name, value in result.metrics.items() if value is not None}
        return f"{result.run}: " + ", ".join(f"{name} {value:.2f}" for name, value in shown.items())
    runs = _combinations(options, [_axis(text) for text in options.sets or []])
    for folder, settings in runs.items():
        try:
            sequence.run(**given | {"output": folder} | _fitted(options, options.method, settings))
        except ClmoeError as error:
            raise ClmoeError(f"{folder}: {error}") from error
    groups, folders = group_runs(list(runs)), " ".join(map(shlex.quote, map(str, runs)))
    tables = [to_text(table) for table in (comparison_table(groups), spent_table(groups))]
    lines = [*tables, alike_note(groups), f"clmoe report --format html {folders}"]
    return "\n".join(filter(None, lines))


def tune(options: argparse.Namespace) -> str:
    """``clmoe tune``: choose the best combination of the values that the method's ``tune`` lists, on three tasks."""
    known = {"order": options.order, "base": options.base, "data": options.data}
    described, config, order = sequence.chosen(options.method, options.benchmark, options.settings, **known)
    grid = _grid(config)
    options.output = options.output or Path("runs") / described.name / "tune"
    options.order = ",".join(order[:TUNE_TASKS])
    if options.seeds is None and not any(pair.startswith("seed=") for pair in options.settings):
        options.seeds = [TUNE_SEED]
    trials: dict[str, dict[str, Any]] = {}
    trained: dict[tuple[str, ...], Path] = {}  # the last checkpoint, by the settings that act in training
    given = {name: getattr(options, name) for name in ("method", "benchmark", "order", "base", "data", "restart")}
    late = ("label=", *(f"{OPTIONS}{name}=" for name in method_class(config.method).answer_options))
    for folder, settings in _combinations(options, list(grid.items())).items():
        _, tried, _ = sequence.chosen(options.method, options.benchmark, settings, **known)
        acts = tuple(pair for pair in settings if not pair.startswith(late))
        if acts in trained and not (folder / sequence.SETTINGS).is_file():
            asked = {"checkpoint": trained[acts], "settings": [pair for pair in settings if pair not in acts]}
            asked |= {"config": None, "base": None, "tasks": None, "scoring": "fixed", "output": folder}
            evaluate(argparse.Namespace(**vars(options) | asked))
            last = read_json(folder / "metrics.json")["last"]
        else:
            result = sequence.run(output=folder, **given | _fitted(options, options.method, settings))
            trained[acts], last = result.checkpoints[-1], result.metrics["last"]
        built = method_class(tried.method)(tried).options  # YAML reads 1e-05 as text, which the option's type corrects
        values = {key: getattr(built, key.removeprefix(OPTIONS)) for key in grid}
        trial = trials.setdefault(json.dumps(values), {"settings": values, "last": {}})
        trial["last"][str(tried.seed)] = last
    for trial in trials.values():
        trial["mean"] = sum(trial["last"].values()) / len(trial["last"])
    best = max(trials.values(), key=lambda trial: trial["mean"])  # the first of equals
    found = {"method": config.method, "benchmark": described.name, "order": order[:TUNE_TASKS], "grid": grid}
    path = options.output / f"{Path(options.method).stem}.json"
    from_main(lambda: write_json(path, found | {"trials": list(trials.values()), "chosen": best["settings"]}))
    lines = [f"{', '.join(f'{k}={v}' for k, v in t['settings'].items())}: {t['mean']:.2f}" for t in trials.values()]
    return "\n".join([*lines, f"{path}: chosen {best['settings']}; tuned={path} makes a run use it"])


def _grid(config: Config) -> dict[str, list[Any]]:
    """What ``clmoe tune`` tries. Raises ClmoeError for nothing, keys other than options, or over ``MOST_TRIALS``."""
    lists = all(isinstance(values, list) and values for values in config.tune.values())
    if not (config.tune and lists and all(key.startswith(OPTIONS) for key in config.tune)):
        raise ClmoeError(
            f"tune: {config.name} needs keys of options with lists of values, as in {{options.beta: [0, 1]}}"
        )
    if (number := prod(map(len, config.tune.values()))) > MOST_TRIALS:
        raise ClmoeError(
            f"tune: {number} trials of {config.name}: no method of a comparison gets more than {MOST_TRIALS}"
        )
    return config.tune


def _combinations(options: argparse.Namespace, axes: list[tuple[str, list[Any]]]) -> dict[Path, list[str]]:
    """The settings of each run of a sweep by its folder; a wrong one in the last run stops it before the first."""
    keys = [key for key, _ in axes]
    for key in keys:
        if key == "seed" or keys.count(key) > 1 or any(pair.startswith(f"{key}=") for pair in options.settings):
            raise ClmoeError(f"--set {key}: is given twice, or has an option of its own (seeds: --seeds 0,1,2)")
    seeds = [[f"seed={seed}"] for seed in options.seeds or ()] or [[]]
    known = {"order": options.order, "base": options.base, "data": options.data}
    found: dict[Path, list[str]] = {}
    for values, seed in product(product(*(values for _, values in axes)), seeds):
        pairs = [f"{key}={json.dumps(value)}" for key, value in zip(keys, values, strict=True)]
        settings = [*options.settings, *pairs, *seed]
        described, config, order = sequence.chosen(options.method, options.benchmark, settings, **known)
        default = sequence.default_folder(described.name, options.method, options.order, config.seed)
        stem, _, number = default.name.rpartition("-seed")
        named = [pair.replace('"', "") for pair in pairs]
        name = re.sub(r"[^\w.=-]+", "_", "-".join([stem, *named, f"seed{number}"]))
        label = " ".join([config.name, *named])
        found[(options.output or default.parent) / name] = [*settings, f"label={json.dumps(label)}"]
        method = method_class(config.method)(config)
        if method.chain != "none":  # what training checks before it loads anything
            prepare_request(config, described, UNION if method.chain == "union" else order[0], order, None, Path(name))
    return found


def _fitted(options: argparse.Namespace, method: str, settings: list[str], gpus: int | None = None) -> dict[str, Any]:
    """The settings and ZeRO's, with what ``--fit`` adds to them and prints. Raises ClmoeError if nothing fits."""
    if options.fit is None:
        return {"settings": settings, "deepspeed": options.deepspeed}
    known = {"order": options.order, "base": options.base, "data": options.data}
    described, config, order = sequence.chosen(method, options.benchmark, settings, **known)
    tasks = [described.task(name) for name in order]
    found = fit(config, settings, card(options.fit), gpus or count(), options.deepspeed, tasks)
    if gpus is None and not found.fits:
        raise ClmoeError(found.line)
    if is_main():
        print(found.line, file=sys.stderr)
    return {"settings": [*settings, *found.settings], "deepspeed": found.deepspeed}


def _axis(text: str) -> tuple[str, list[Any]]:
    """``key=v,v`` -> the key and its values, each written as YAML."""
    key, equals, values = text.partition("=")
    try:
        found = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError:
        found = []
    if not (key and equals and found):
        raise ClmoeError(f"--set {text}: write KEY=VALUE,VALUE, for instance --set options.gamma=0.3,0.7")
    return key, found


def train(options: argparse.Namespace) -> str:
    """``clmoe train``: one task, from the checkpoint before it to the next."""
    vars(options).update(_fitted(options, options.config, options.settings))
    deepspeed = use_deepspeed(options.deepspeed)
    _, config, order = _chosen(options)
    needed = order if options.task == UNION else [options.task]
    benchmark = from_main(lambda: open_benchmark(options.benchmark, options.data, needed))
    sequence.check_output(options.output, config, benchmark, options.previous)
    previous = None if options.previous is None else read_checkpoint(options.previous)
    places = previous, options.output, deepspeed, options.restart
    request = prepare_request(config, benchmark, options.task, order, *places)
    with locked(request.run):
        done = train_task(request) is None
    return f"{request.output}: {'finished before' if done else 'trained'}"


def check(options: argparse.Namespace) -> str:
    """``clmoe data check``: list all that is bad in a benchmark's data."""
    benchmark = load_benchmark(options.benchmark, options.data, check_files=False)
    order = benchmark.order(options.order, 0)
    if options.bad is not None:
        files = [find_config("benchmarks", options.benchmark), *benchmark.inputs]
        picture = (mimetypes.guess_type(options.bad.name)[0] or "").startswith("image/")
        check_target("--bad", options.bad, [*files, options.bad] if picture else files, file=True)
    config = load_config("lora", benchmark.recipe, [], options.base)
    asked = benchmark.asked(order, config.evaluation.general)
    checked = check_benchmark(benchmark, gold_problem, asked, answers_fit(config))
    lines = [f"{benchmark.name} at {benchmark.root}", *checked.lines, *(f"note: {note}" for note in checked.notes)]
    lines.append(f"answers are checked against {config.training.max_length} tokens of {config.model.path}")
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
        named = options.config or "zero_shot", described.recipe, options.settings, options.base
        config = load_config(*named, checked_method, options.benchmark)
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
    asks_general = config.evaluation.general and not options.tasks
    needed = options.tasks or (order if done is None or asks_general else done.lineage.tasks)
    needed = described.asked(needed, asks_general)
    benchmark = from_main(lambda: open_benchmark(options.benchmark, options.data, needed))
    sequence.check_output(options.output, config, benchmark, None if done is None else done.folder)
    with locked(options.output):
        return evaluate_checkpoint(options.output, benchmark, done, config, order, **asked)[0]


def matrix(options: argparse.Namespace) -> str:
    """``clmoe matrix``: trained runs of methods that keep parts per task, each under several locators."""
    from clmoe.report.locators import write_matrix  # here for matplotlib, a second that the other verbs do not need

    described = load_benchmark(options.benchmark, options.data, check_files=False)
    folder = options.runs or Path("runs") / described.name
    output = options.output or folder / "matrix"
    runs = {
        (method, seed): folder / sequence.default_folder(described.name, method, options.order, seed).name
        for method, seed in product(options.methods, options.seeds or [0])
    }
    check_target("--output", output, [run / "matrix.csv" for run in runs.values()])
    benchmark = from_main(lambda: open_benchmark(options.benchmark, options.data, described.order(options.order, 0)))
    usable = {run: usable_locators(finished_method(run)) for run in runs.values()}
    owners = {(own_locator(run), seed): run for (_, seed), run in runs.items()}
    results = {}
    for (method, seed), run in runs.items():
        names = usable[run] if options.locators == ["all"] else options.locators
        trained_with = {name: owner for (name, of), owner in owners.items() if of == seed}
        with locked(run):
            results[method, seed] = relocate(run, benchmark, names, folder / "features", trained_with)
    text = from_main(lambda: write_matrix(results, output, benchmark.name))
    return f"{text}\n{output}: matrix.md, matrix.csv, confusion.csv, matrix.png, matrix.svg"


def report(options: argparse.Namespace) -> Any:
    """``clmoe report``: tables and figures of runs."""
    from clmoe.report.page import default_folder, write_report  # here for matplotlib, as above

    if options.json:
        return [{"run": str(read.path), "label": read.label, **read.metrics} for read in map(read_run, options.runs)]
    output = options.output or default_folder(options.runs)
    check_target("--output", output, [run / "matrix.csv" for run in options.runs])
    written = write_report(options.runs, output, options.format, options.data)
    return f"{report_text(options.runs)}\n{output}: {', '.join(path.name for path in written)}"


def plan(options: argparse.Namespace) -> Any:
    """``clmoe plan``: what a sequence trains and needs, before it is run."""
    chosen = None if options.fit is None else card(options.fit)
    mfu = MFU if options.mfu is None else options.mfu
    if not 0 < mfu <= 1:
        raise ClmoeError(f"--mfu {mfu:g}: write a share of the card's rate, above 0 and at most 1")
    vars(options).update(_fitted(options, options.config, options.settings, options.gpus))
    benchmark, config, order = _chosen(options)
    settings = options.gpus, options.deepspeed, options.tokens, options.extended_blocks, chosen, mfu
    values = make_plan(method_class(config.method)(config), benchmark, order, *settings)
    options.exit_code = int(bool(values["missing"]) or not values.get("card", {"fits": True})["fits"])
    return values if options.json else plan_text(values)


def contract(options: argparse.Namespace) -> str:
    """``clmoe check-method``: a line per promise as it is tried; exit code 1 if one is not kept."""
    broken = 0
    for promise, problem in check_method(options.method, options.settings):
        print(f"{'FAIL' if problem else 'ok':<5}{promise}{': ' * bool(problem)}{problem}", flush=True)
        broken += bool(problem)
    options.exit_code = int(broken > 0)
    return f"{options.method}: {f'{broken} promises broken' if broken else 'keeps every promise'}"


def export(options: argparse.Namespace) -> str:
    """``clmoe export``: a checkpoint, or its base with it merged in, and a model card; whole or not at all."""
    moved = [] if options.base is None else [f"model.path={json.dumps(options.base)}"]
    done, target = read_checkpoint(options.checkpoint, moved), options.target
    base = Path(resolve_model_path(done.config.model.path))
    if target.exists():
        raise ClmoeError(f"{target} exists: choose another folder or delete it")
    check_target("FOLDER", target, folders=[done.folder, *([base] if base.is_dir() else [])])
    card, work = model_card(done, target.name, options.merge), target.parent / f".{target.name}.partial"
    shutil.rmtree(work, ignore_errors=True)
    try:
        if options.merge:
            found = f"{merge_checkpoint(done, work)} tensors of {done.config.model.path} changed"
        else:
            names = [*sealed_files(done.folder), MANIFEST]
            for name in names:
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(done.folder / name, work / name)
            found = f"{len(names)} files of {done.folder}"
            found += ", among them memory.json, records of the training data" if "memory.json" in names else ""
        write_text(work / "README.md", card)
        work.rename(target)
        flush(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return f"{target}: {found}, and README.md. To publish it: hf upload OWNER/NAME {target}"


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
    "run": run,
    "tune": tune,
    "train": train,
    "eval": evaluate,
    "matrix": matrix,
    "report": report,
    "plan": plan,
    "check-method": contract,
    "convert": convert_any,
    "export": export,
    "demo": demo,
}
