"""The command line: parsing only. Every verb answers without importing torch when there is nothing to do."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from socket import gethostname
from typing import Any, NoReturn

from clmoe.errors import ClmoeError, Interrupted
from clmoe.utils.processes import EXIT_CODE, count, is_main, leave, rank, stop, stopping_on_sigterm

USER_ERROR = 2
OTHERS_SPEAK_AFTER = 3.0  # seconds; launchers look after their processes at least once in one


def _paths(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _method_arguments(sub: argparse.ArgumentParser) -> None:
    """What a method's configuration is resolved from."""
    sub.add_argument("--config", required=True, help="method: a name in configs/methods or a YAML file")
    sub.add_argument("--benchmark", required=True, help="a name in configs/benchmarks or a YAML file")
    sub.add_argument("--data", type=Path, help="the benchmark's data folder (default: the YAML's root)")
    sub.add_argument("--model", help="a name in configs/models, a model folder or a hub name")
    sub.add_argument("--order", default="norm", help="norm, rev, rand or task names separated by commas")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="for instance training.steps=20")


def _train(sub: argparse.ArgumentParser) -> None:
    _method_arguments(sub)
    sub.add_argument("--task", required=True, help="task to train; 'all' for methods that train on the union")
    sub.add_argument("--previous", type=Path, help="checkpoint of the task before")
    sub.add_argument("--output", type=Path, required=True, help="folder that becomes the checkpoint")
    sub.add_argument("--then-eval", action="store_true", help="evaluate into the folder above --output")
    sub.add_argument("--deepspeed", metavar="ZERO", help="zero2, zero2_offload, zero3 or a JSON file")


def _evaluate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--checkpoint", required=True, help="checkpoint folder, or 'base' for the bare model")
    sub.add_argument("--config", help="with --checkpoint base: the method's name, zero_shot")
    sub.add_argument("--benchmark", required=True, help="a name in configs/benchmarks or a YAML file")
    sub.add_argument("--data", type=Path, help="the benchmark's data folder (default: the YAML's root)")
    sub.add_argument("--model", help="with --checkpoint base: the model")
    sub.add_argument("--order", default="norm", help="the whole sequence, as given to train")
    sub.add_argument("--tasks", type=_paths, help="default: the tasks the checkpoint has learned")
    sub.add_argument("--output", type=Path, required=True, help="run folder for predictions and tables")
    sub.add_argument(
        "--scoring",
        choices=("fixed", "official"),
        default="fixed",
        help="what a metric means, or what the benchmark's published scripts print",
    )
    sub.add_argument(
        "--router",
        choices=("located", "oracle", "last", "random"),
        default="located",
        help="how a question's task is chosen: found from the question, known, the newest, or drawn",
    )
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="evaluation.* and options.* only")


def _report(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders; equal labels are averaged")
    sub.add_argument("--format", type=_paths, default=["md", "csv"], help="of md, csv, tex, pdf, html")
    sub.add_argument("--output", type=Path, help="default: RUN/report of the first run")
    sub.add_argument("--data", type=Path, help="html: the benchmark's data folder, if it moved since the runs")
    sub.add_argument("--json", action="store_true", help="print the metrics as JSON instead of tables")


def _metrics(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("matrix", type=Path, metavar="MATRIX.csv", help="rows: after training that task; columns: tasks")
    sub.add_argument("--immediate", type=Path, metavar="ROW.csv", help="scores right after training, router known")
    sub.add_argument("--json", action="store_true", help="print the metrics as JSON")


def _plan(sub: argparse.ArgumentParser) -> None:
    _method_arguments(sub)
    sub.add_argument("--gpus", type=_at_least_one, default=1, metavar="N", help="processes, one per GPU")
    sub.add_argument("--deepspeed", metavar="ZERO", help="zero2, zero2_offload, zero3 or a JSON file")
    sub.add_argument(
        "--tokens", type=_at_least_one, metavar="T", help="of a sample (default: the image's and 64 of text)"
    )
    sub.add_argument(
        "--answer-tokens", type=_at_least_one, default=16, metavar="A", help="of a sample: those with logits"
    )
    sub.add_argument(
        "--extended-blocks", type=float, metavar="X", help="blocks that a later task extends by one expert, on average"
    )
    form = sub.add_mutually_exclusive_group()
    form.add_argument(
        "--steps", action="store_true", help="only the runs, one line each: number, task, parent's task or -"
    )
    form.add_argument("--json", action="store_true", help="print the figures as JSON")


def _data(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "action", choices=("prepare", "check"), help="build what can be built, or read every row and decode every image"
    )
    sub.add_argument("benchmark", metavar="BENCHMARK", help="a name in configs/benchmarks or a YAML file")
    sub.add_argument("--data", type=Path, help="the benchmark's data folder (default: the YAML's root)")
    sub.add_argument("--bad", type=Path, metavar="FILE", help="check: write the list of all that is bad here")


def _doctor(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="print the findings as JSON")


def _convert(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", type=Path, metavar="SRC", help="folder of the LLaVA, LLaMA or adapter")
    sub.add_argument("target", type=Path, metavar="DST", help="folder to write; must not exist")
    sub.add_argument("--vision", type=Path, metavar="CLIP", help="folder of the CLIP model with the vision tower")
    sub.add_argument("--projector", type=Path, metavar="BIN", help="with a LLaMA: the first stage's mm_projector.bin")
    sub.add_argument("--model", help="with an adapter: the model it was trained on, as for train")
    sub.add_argument("--benchmark", help="with an adapter: a name in configs/benchmarks or a YAML file")
    sub.add_argument("--tasks", type=_paths, help="with an adapter: what it has learned, oldest first")


def _card(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint folder")
    sub.add_argument("--run", type=Path, help="run folder with its scores (default: the folder above the checkpoint)")
    sub.add_argument("--output", type=Path, help="file to write (default: README.md in the checkpoint)")


def _demo(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint folder")
    sub.add_argument("--port", type=int, help="default: the first free one from 7860")
    sub.add_argument("--benchmark", help="whose test questions are the examples (default: the checkpoint's)")
    sub.add_argument("--data", type=Path, help="the benchmark's data folder (default: the YAML's root)")
    sub.add_argument("--model", help="folder or hub name of the base, where it is not the training's")


VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "train": ("Train one task; does nothing when the output is finished.", _train),
    "eval": ("Evaluate a checkpoint on tasks; fills only cells that are missing.", _evaluate),
    "report": ("Tables and pictures from one or several run folders.", _report),
    "metrics": ("Continual-learning metrics of any accuracy matrix.", _metrics),
    "plan": ("What a method trains on a model, and takes; loads no weights. Exit code 1: files are missing.", _plan),
    "data": ("Build or verify a benchmark's files.", _data),
    "doctor": ("Versions, devices, and what is usable here. Exit code 1: something required is broken.", _doctor),
    "convert": ("Another project's LLaVA or adapter -> a model folder or a checkpoint of ours.", _convert),
    "card": ("Write a checkpoint's model card with the scores that were measured on it.", _card),
    "demo": ("Ask a checkpoint about an image in the browser; shows the located task and the experts.", _demo),
}
"""Verb -> what it does, and what adds its arguments; the module of its name in ``commands`` carries it out."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clmoe",
        description="Continual instruction tuning of LLaVA-1.5 with LoRA-expert mixture-of-experts.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (text, add_arguments) in VERBS.items():
        add_arguments(verbs.add_parser(name, help=text, description=text))
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Errors that a user can mend are one line on stderr and exit code 2."""
    options = _parser().parse_args(arguments)
    _silence_libraries()
    try:
        with stopping_on_sigterm():
            result = import_module(f"clmoe.commands.{options.verb}").run(options)
    except (ClmoeError, OSError) as error:  # the latter: a full disk, a lost mount; what was finished before is whole
        _leave(f"clmoe {options.verb}: {error}", USER_ERROR)
    except Interrupted as error:
        _leave(f"clmoe {options.verb}: {error}; the same command goes on from there", EXIT_CODE)
    stop()
    if is_main():
        _show(result, getattr(options, "json", False))
    code = getattr(options, "exit_code", 0)
    if code or count() > 1:
        leave(code)


def _silence_libraries() -> None:
    """Remarks that users can do nothing about."""
    # transformers on its own deprecated property, accelerate on DDP's, DeepSpeed on torch's
    for message in (
        "`is_gradient_checkpointing` is deprecated",
        "`broadcast_buffers` is deprecated",
        "`torch.distributed",
    ):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    # installed and on a machine without a GPU, DeepSpeed says so in every command, used or not
    logging.getLogger("DeepSpeed").addFilter(lambda record: "accelerator to CPU" not in record.getMessage())


def _leave(message: str, code: int) -> NoReturn:
    """Stop with this code and say why.

    What stops all processes is the main one's to tell. After an error the launcher ends the others as soon as one has
    left; who is still there after a moment is the only one that knows.
    """
    if not is_main():
        if code != USER_ERROR:
            leave(code)
        time.sleep(OTHERS_SPEAK_AFTER)
        message = f"{message} (process {rank()}, on {gethostname()})"
    print(message, file=sys.stderr)
    leave(code)


def _show(result: Any, as_json: bool) -> None:
    if result is None:
        return
    print(json.dumps(result, indent=1) if as_json else result)


if __name__ == "__main__":
    main()
