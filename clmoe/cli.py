"""The command line. Nothing is imported before it is needed, so that ``clmoe --help`` answers at once."""

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from socket import gethostname
from typing import Any, NoReturn

from clmoe.errors import ClmoeError, Interrupted

USER_ERROR = 2
OTHERS_SPEAK_AFTER = 3.0  # seconds; launchers check their processes at least once a second
OLD = {  # options and a verb of clmoe 0.1
    "--router": "write locator=oracle, locator=last, ... among the key=value settings",
    "--then-eval": "clmoe run trains and evaluates; clmoe eval evaluates a checkpoint",
    "--steps": "clmoe run goes through a whole sequence",
    "card": "clmoe export CHECKPOINT FOLDER writes a checkpoint with its model card",
}


def metrics(options: argparse.Namespace) -> Any:
    """``clmoe metrics``: the metrics of any accuracy matrix."""
    from clmoe.evaluate.matrix import metrics_from_files

    result, lacking = metrics_from_files(options.matrix, options.immediate, options.unit)
    if options.json:
        return {name: None if value is None else round(value, 2) for name, value in result.items()}
    shown = {name: lacking.get(name) if value is None else f"{value:8.2f}" for name, value in result.items()}
    return "\n".join(f"{name:<16}{text}" for name, text in shown.items())


def data(options: argparse.Namespace) -> str:
    """``clmoe data prepare|check``; raises ClmoeError that lists missing files or bad rows, if there are any."""
    from clmoe.benchmarks.base import load_benchmark
    from clmoe.benchmarks.prepare import prepare_benchmark

    if options.action == "check":
        from clmoe.commands import check

        return check(options)
    benchmark = load_benchmark(options.benchmark, options.data, check_files=False)
    return "\n".join(filter(None, [f"{benchmark.name} at {benchmark.root}", prepare_benchmark(benchmark)]))


def doctor(options: argparse.Namespace) -> Any:
    """``clmoe doctor``: what is installed and usable here."""
    from clmoe.doctor import examine, report_text

    findings = examine()
    options.exit_code = int(any(finding.broken for finding in findings))
    return [asdict(finding) for finding in findings] if options.json else report_text(findings)


def _paths(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _seeds(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: write whole numbers separated by commas, as in 0,1,2")
    return list(dict.fromkeys(map(int, parts)))


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _benchmark_arguments(sub: argparse.ArgumentParser, *, option: bool) -> None:
    """Which benchmark, and where its data is."""
    name: dict[str, Any] = {"required": True} if option else {"metavar": "BENCHMARK"}
    text = "a name in configs/benchmarks or a YAML file"
    sub.add_argument("--benchmark" if option else "benchmark", help=text, **name)
    sub.add_argument("--data", type=Path, help="the benchmark's data folder (default: the YAML's root)")


def _sequence_arguments(
    sub: argparse.ArgumentParser, example: str = "training.steps=20 locator=oracle", *, trains: bool = True
) -> None:
    """ZeRO for what trains, base, order and settings."""
    if trains:
        sub.add_argument("--deepspeed", metavar="ZERO", help="zero2, zero2_offload or a JSON file")
        sub.add_argument("--fit", metavar="CARD", help="choose and print settings that fit a card, as in 24GB or A100")
    sub.add_argument("--base", "--model", help="a name in configs/models, a model folder or a hub name")
    sub.add_argument("--seed", type=int, help="seed of weights, order and dropout (default: 0); same as seed=SEED")
    sub.add_argument("--order", default="norm", help="norm, rev, rand or task names separated by commas")
    sub.add_argument("settings", nargs="*", metavar="key=value", help=f"for instance {example}")


def _method_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", required=True, help="method: a name in configs/methods, a YAML or a Python file")
    _benchmark_arguments(sub, option=True)


def _run_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("method", metavar="METHOD", help="a name in configs/methods, a YAML file or a Python file")
    _benchmark_arguments(sub, option=False)
    sub.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="run folder (default: runs/BENCHMARK/METHOD-seedSEED); of a sweep: the folder of its runs",
    )
    sub.add_argument("--seeds", type=_seeds, metavar="K,K", help="sweep: a run for each of these seeds, as in 0,1,2")
    sub.add_argument(
        "--set",
        action="append",
        dest="sets",
        metavar="KEY=V,V",
        help="sweep: a run for each of these values; repeatable",
    )
    sub.add_argument("--restart", action="store_true", help="delete an interrupted training and start it over")
    _sequence_arguments(sub)


def _tune_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("method", metavar="METHOD", help="a name in configs/methods, or a YAML file with tune: in it")
    _benchmark_arguments(sub, option=False)
    sub.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for METHOD.json and trials (default: runs/BENCHMARK/tune)"
    )
    sub.add_argument("--seeds", type=_seeds, metavar="K,K", help="seeds of each trial (default: 100)")
    sub.add_argument("--restart", action="store_true", help="delete an interrupted training and start it over")
    _sequence_arguments(sub, "training.steps=20")
    sub.set_defaults(order="rev")


def _train_arguments(sub: argparse.ArgumentParser) -> None:
    _method_arguments(sub)
    sub.add_argument("--task", required=True, help="task to train; 'all' for methods that train on the union")
    sub.add_argument("--previous", type=Path, help="checkpoint of the previous task")
    sub.add_argument("--output", type=Path, required=True, help="folder that becomes the checkpoint")
    sub.add_argument("--restart", action="store_true", help="delete an interrupted training and start it over")
    _sequence_arguments(sub)


def _eval_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--checkpoint", required=True, help="checkpoint folder, or 'base' for the bare model")
    sub.add_argument("--config", help="with --checkpoint base: the method's name, zero_shot")
    _benchmark_arguments(sub, option=True)
    sub.add_argument("--tasks", type=_paths, help="default: the tasks that the checkpoint has learned")
    sub.add_argument("--output", type=Path, required=True, help="run folder for predictions and tables")
    sub.add_argument(
        "--scoring",
        choices=("fixed", "official"),
        default="fixed",
        help="score what a metric means, or what the benchmark's published scripts print",
    )
    _sequence_arguments(sub, "locator=oracle evaluation.batch_size=16", trains=False)


def _matrix_arguments(sub: argparse.ArgumentParser) -> None:
    _benchmark_arguments(sub, option=False)
    sub.add_argument("--methods", type=_paths, required=True, metavar="M,M", help="methods that keep parts per task")
    sub.add_argument(
        "--locators", type=_paths, default=["all"], metavar="L,L", help="default: all that a method can use"
    )
    sub.add_argument("--seeds", type=_seeds, metavar="K,K", help="seeds of the runs (default: 0)")
    sub.add_argument("--order", default="norm", help="order of the runs: norm, rev, rand or task names with commas")
    sub.add_argument("--runs", type=Path, metavar="DIR", help="folder with METHOD-seedK, ... (default: runs/BENCHMARK)")
    sub.add_argument("--output", type=Path, help="default: matrix, beside the runs")


def _report_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders; equal labels are averaged")
    sub.add_argument("--format", type=_paths, default=["md", "csv"], help="any of md, csv, tex, pdf, svg, html")
    sub.add_argument("--output", type=Path, help="default: report, beside the runs; for one run, in it")
    sub.add_argument("--data", type=Path, help="html: the benchmark's data folder, if it has moved since the runs")
    sub.add_argument("--json", action="store_true", help="print the metrics as JSON instead of tables")


def _metrics_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("matrix", type=Path, metavar="MATRIX.csv", help="rows: after training that task; columns: tasks")
    sub.add_argument("--immediate", type=Path, metavar="ROW.csv", help="scores right after training, task known")
    sub.add_argument("--unit", choices=("percent", "fraction"), help="unit of the scores (default: percent)")
    sub.add_argument("--json", action="store_true", help="print the metrics as JSON")


def _plan_arguments(sub: argparse.ArgumentParser) -> None:
    _method_arguments(sub)
    sub.add_argument("--gpus", type=_at_least_one, default=1, metavar="N", help="processes, one per GPU")
    sub.add_argument(
        "--tokens", type=_at_least_one, metavar="T", help="tokens of a sample (default: the image's and 64 of text)"
    )
    sub.add_argument(
        "--extended-blocks", type=float, metavar="X", help="blocks that a later task extends by one expert, on average"
    )
    sub.add_argument(
        "--mfu",
        type=float,
        metavar="SHARE",
        help="with --fit: share of the card's rate, for hours (default: 0.4)",
    )
    sub.add_argument("--json", action="store_true", help="print the figures as JSON")
    _sequence_arguments(sub)


def _data_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "action", choices=("prepare", "check"), help="build what can be built, or read every row and decode every image"
    )
    _benchmark_arguments(sub, option=False)
    sub.add_argument("--bad", type=Path, metavar="FILE", help="check: write the list of all bad rows here")
    sub.add_argument("--order", default="norm", help="check: task names separated by commas (default: all)")
    sub.add_argument("--base", "--model", help="check: base to count training.max_length with (default: the recipe's)")


def _check_method_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("method", metavar="METHOD", help="a Python file, or a name in configs/methods")
    sub.add_argument("--seed", type=int, help="seed of weights, order and dropout (default: 0)")
    sub.add_argument("settings", nargs="*", metavar="key=value", help="for instance options.weight=2")


def _doctor_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="print the findings as JSON")


def _convert_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", type=Path, metavar="SRC", help="folder of the LLaVA, LLaMA, adapter or old checkpoint")
    sub.add_argument("target", type=Path, metavar="DST", help="folder to write; must not exist")
    sub.add_argument("--vision", type=Path, metavar="CLIP", help="folder of the CLIP model with the vision tower")
    sub.add_argument("--projector", type=Path, metavar="BIN", help="with a LLaMA: the first stage's mm_projector.bin")
    sub.add_argument("--base", "--model", dest="model", metavar="BASE", help="with an adapter: what it was trained on")
    sub.add_argument("--benchmark", help="with an adapter: a name in configs/benchmarks or a YAML file")
    sub.add_argument("--tasks", type=_paths, help="with an adapter: what it has learned, oldest first")


def _export_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint folder")
    sub.add_argument("target", type=Path, metavar="FOLDER", help="folder to write; must not exist")
    sub.add_argument("--merge", action="store_true", help="add the updates to the base: a model without an adapter")
    sub.add_argument("--base", "--model", dest="base", metavar="BASE", help="folder or hub name, if the base has moved")


def _demo_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint folder")
    sub.add_argument("--port", type=int, help="default: the first free one from 7860")
    sub.add_argument("--benchmark", help="its test questions are the examples (default: the checkpoint's)")
    sub.add_argument("--data", type=Path, help="the benchmark's data folder (default: the YAML's root)")
    sub.add_argument(
        "--base", "--model", dest="model", metavar="BASE", help="folder or hub name, if the base has moved"
    )


VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "run": ("Train and evaluate a method on a whole sequence; continues where it stopped.", _run_arguments),
    "tune": ("Choose a method's own options on three tasks of another order, in a few trials.", _tune_arguments),
    "train": ("Train one task; does nothing when the output is finished.", _train_arguments),
    "eval": ("Evaluate a checkpoint on tasks; fills only cells that are missing.", _eval_arguments),
    "matrix": ("Evaluate finished runs of several methods under several locators; trains nothing.", _matrix_arguments),
    "report": ("Tables and figures from one or several run folders.", _report_arguments),
    "metrics": ("Continual-learning metrics of any accuracy matrix.", _metrics_arguments),
    "plan": ("What a sequence trains and needs. Exit code 1: files are missing.", _plan_arguments),
    "data": ("Build or verify a benchmark's files.", _data_arguments),
    "check-method": ("Does a method keep what clmoe promises? Exit code 1: it does not.", _check_method_arguments),
    "doctor": ("Versions, devices, what is usable. Exit code 1: something is broken.", _doctor_arguments),
    "convert": ("Convert another project's LLaVA or adapter to a folder of ours.", _convert_arguments),
    "export": ("Write a checkpoint as a folder for the hub, with a model card.", _export_arguments),
    "demo": ("Ask a checkpoint about an image in the browser; shows task and experts.", _demo_arguments),
}  # fmt: skip
LIGHT = {"metrics": metrics, "data": data, "doctor": doctor}  # need neither transformers nor peft


def _command(verb: str) -> Callable[[argparse.Namespace], Any]:
    if verb in LIGHT:
        return LIGHT[verb]
    from clmoe.utils.versions import unfit

    if reason := unfit():
        raise ClmoeError(reason)
    from clmoe.commands import COMMANDS

    return COMMANDS[verb]


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Options, with ``key=value`` settings accepted anywhere among them."""
    parser = argparse.ArgumentParser(
        prog="clmoe",
        description="Continual instruction tuning of LLaVA-1.5 with LoRA-expert mixture-of-experts.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (text, add_arguments) in VERBS.items():
        add_arguments(verbs.add_parser(name, help=text, description=text))
    options, rest = parser.parse_known_args(arguments)
    strangers = [part for part in rest if part.startswith("-") or "=" not in part]
    if strangers or (rest and not hasattr(options, "settings")):
        parser.error(f"unrecognized arguments: {' '.join(strangers or rest)}")
    if hasattr(options, "settings"):
        options.settings = [*options.settings, *rest]
        given = [part.removeprefix("seed=") for part in options.settings if part.startswith("seed=")]
        given += [] if options.seed is None else [str(options.seed)]
        if len(given) + bool(getattr(options, "seeds", None)) > 1:
            parser.error("the seed is given twice: write --seed K, or for several runs --seeds K,K")
        if options.seed is not None:
            options.settings.append(f"seed={options.seed}")
        del options.seed
    return options


def main(arguments: list[str] | None = None) -> None:
    """Entry point. An error that the user can fix is one line on stderr and exit code 2."""
    given = sys.argv[1:] if arguments is None else arguments
    _refuse_old(given)
    options = _parse(given)
    _silence_libraries()
    from clmoe.utils.processes import EXIT_CODE, count, is_main, leave, lost_another, stop, stopping_on_sigterm

    try:
        with stopping_on_sigterm():
            result = _command(options.verb)(options)
    except (ClmoeError, OSError) as error:  # the latter: a full disk, a lost mount; what was finished before is whole
        _leave(f"clmoe {options.verb}: {error}", USER_ERROR)
    except Interrupted as error:
        _leave(f"clmoe {options.verb}: {error}; the same command continues from there", EXIT_CODE)
    except RuntimeError as error:
        if not lost_another(error):
            raise
        _report_lost(f"clmoe {options.verb}", error)
        leave(EXIT_CODE)
    stop()
    if is_main() and result is not None:
        print(json.dumps(result, indent=1) if getattr(options, "json", False) else result)
    code = getattr(options, "exit_code", 0)
    if code or count() > 1:
        leave(code)


def _refuse_old(arguments: list[str]) -> None:
    """Say what replaced a verb or option of clmoe 0.1."""
    for position, argument in enumerate(arguments):
        name = argument.split("=")[0]
        if name in OLD and (position == 0 or name.startswith("--")):
            print(f"clmoe: {name} is gone: {OLD[name]}", file=sys.stderr)
            sys.exit(USER_ERROR)


def _silence_libraries() -> None:
    """Drop remarks that users can do nothing about."""
    # transformers on its own deprecated property, accelerate on DDP's, DeepSpeed on torch's
    remarks = r"`(is_gradient_checkpointing` is deprecated|broadcast_buffers` is deprecated|torch\.distributed)"
    warnings.filterwarnings("ignore", message=remarks, category=FutureWarning)
    # if it is installed on a machine without a GPU, DeepSpeed says so in every command, used or not
    logging.getLogger("DeepSpeed").addFilter(lambda record: "accelerator to CPU" not in record.getMessage())


def _leave(message: str, code: int) -> NoReturn:
    """Stop with this code and say why.

    The main process reports what stops all. A process that the launcher has not ended after a moment is the only one
    that knows why it stops.
    """
    from clmoe.utils.processes import is_main, leave, rank

    if not is_main():
        if code != USER_ERROR:
            leave(code)
        time.sleep(OTHERS_SPEAK_AFTER)
        message = f"{message} (process {rank()}, on {gethostname()})"
    print(message, file=sys.stderr)
    leave(code)


def _report_lost(command: str, error: RuntimeError) -> None:
    """Print one line on each machine whose processes still run: another process ended, and with it the command."""
    from clmoe.utils.processes import count, local_rank, rank

    if local_rank() == 0:
        who = f"process {rank()} on {gethostname()} lost another of the {count()} processes"
        why = f"{str(error).splitlines()[0][:120]}; the lost one's machine may say more"
        print(f"{command}: {who} ({why}); the same command continues from the last saved state", file=sys.stderr)


if __name__ == "__main__":
    main()
