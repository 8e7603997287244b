"""The command line: parsing only. Every verb answers without importing torch when there is nothing to do."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from clmoe.errors import ClmoeError

USER_ERROR = 2


def _paths(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clmoe",
        description="Continual instruction tuning of LLaVA-1.5 with LoRA-expert mixture-of-experts.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text)

    def method_arguments(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--config", required=True, help="method: a name in configs/methods or a YAML file")
        sub.add_argument("--benchmark", required=True, help="a name in configs/benchmarks or a YAML file")
        sub.add_argument("--data", type=Path, help="the benchmark's data folder (default: the YAML's root)")
        sub.add_argument("--model", help="a name in configs/models, a model folder or a hub name")
        sub.add_argument("--order", default="norm", help="norm, rev, rand or task names separated by commas")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="for instance training.steps=20")

    train = verb("train", "Train one task; does nothing when the output is finished.")
    method_arguments(train)
    train.add_argument("--task", required=True, help="task to train; 'all' for methods that train on the union")
    train.add_argument("--previous", type=Path, help="checkpoint of the task before")
    train.add_argument("--output", type=Path, required=True, help="folder that becomes the checkpoint")
    train.add_argument("--then-eval", action="store_true", help="evaluate into the folder above --output")

    evaluate = verb("eval", "Evaluate a checkpoint on tasks; fills only cells that are missing.")
    evaluate.add_argument("--checkpoint", required=True, help="checkpoint folder, or 'base' for the bare model")
    evaluate.add_argument("--config", help="with --checkpoint base: the method's name, zero_shot")
    evaluate.add_argument("--benchmark", required=True)
    evaluate.add_argument("--data", type=Path)
    evaluate.add_argument("--model", help="with --checkpoint base: the model")
    evaluate.add_argument("--order", default="norm", help="the whole sequence, as given to train")
    evaluate.add_argument("--tasks", type=_paths, help="default: the tasks the checkpoint has learned")
    evaluate.add_argument("--output", type=Path, required=True, help="run folder for predictions and tables")
    evaluate.add_argument("--scoring", choices=("fixed", "official"), default="fixed")
    evaluate.add_argument("--router", choices=("located", "oracle", "last", "random"), default="located")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="evaluation.* and options.* only")

    report = verb("report", "Tables and pictures from one or several run folders.")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--format", type=_paths, default=["md", "csv"], help="md, csv, tex; separated by commas")
    report.add_argument("--output", type=Path, help="default: RUN/report of the first run")
    report.add_argument("--json", action="store_true", help="print the metrics as JSON instead of tables")

    metrics = verb("metrics", "Continual-learning metrics of any accuracy matrix.")
    metrics.add_argument("matrix", type=Path, metavar="MATRIX.csv")
    metrics.add_argument("--immediate", type=Path, metavar="ROW.csv", help="scores right after training, router known")
    metrics.add_argument("--json", action="store_true")

    plan = verb("plan", "What a method would train on a model; loads no weights.")
    method_arguments(plan)
    plan.add_argument(
        "--extended-blocks", type=float, metavar="X", help="blocks that a later task extends by one expert, on average"
    )
    form = plan.add_mutually_exclusive_group()
    form.add_argument(
        "--steps", action="store_true", help="only the runs, one line each: number, task, parent's task or -"
    )
    form.add_argument("--json", action="store_true", help="print the figures as JSON")

    data = verb("data", "Build or verify a benchmark's files.")
    data.add_argument("action", choices=("prepare", "check"))
    data.add_argument("benchmark")
    data.add_argument("--data", type=Path)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Errors that a user can mend are one line on stderr and exit code 2."""
    options = _parser().parse_args(arguments)
    # transformers warns about its own deprecated property whenever an adapter is attached
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    from clmoe import commands

    try:
        result = getattr(commands, f"run_{options.verb}")(options)
    except ClmoeError as error:
        print(f"clmoe {options.verb}: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    _show(result, getattr(options, "json", False))


def _show(result: Any, as_json: bool) -> None:
    if result is None:
        return
    print(json.dumps(result, indent=1) if as_json else result)


if __name__ == "__main__":
    main()
