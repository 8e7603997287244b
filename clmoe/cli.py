"""The command line: parsing only. Every verb answers without importing torch when there is nothing to do."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

from clmoe.errors import ClmoeError, Interrupted
from clmoe.system.interrupt import EXIT_CODE, stopping_on_sigterm
from clmoe.system.processes import count, is_main, leave, stop

USER_ERROR = 2


def _paths(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


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
    train.add_argument("--deepspeed", metavar="ZERO", help="zero2, zero2_offload, zero3 or a JSON file")

    evaluate = verb("eval", "Evaluate a checkpoint on tasks; fills only cells that are missing.")
    evaluate.add_argument("--checkpoint", required=True, help="checkpoint folder, or 'base' for the bare model")
    evaluate.add_argument("--config", help="with --checkpoint base: the method's name, zero_shot")
    evaluate.add_argument("--benchmark", required=True, help="a name in configs/benchmarks or a YAML file")
    evaluate.add_argument("--data", type=Path, help="the benchmark's data folder (default: the YAML's root)")
    evaluate.add_argument("--model", help="with --checkpoint base: the model")
    evaluate.add_argument("--order", default="norm", help="the whole sequence, as given to train")
    evaluate.add_argument("--tasks", type=_paths, help="default: the tasks the checkpoint has learned")
    evaluate.add_argument("--output", type=Path, required=True, help="run folder for predictions and tables")
    evaluate.add_argument(
        "--scoring",
        choices=("fixed", "official"),
        default="fixed",
        help="what a metric means, or what CoIN's scripts print",
    )
    evaluate.add_argument(
        "--router",
        choices=("located", "oracle", "last", "random"),
        default="located",
        help="how a question's task is chosen: found from the question, known, the newest, or drawn",
    )
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="evaluation.* and options.* only")

    report = verb("report", "Tables and pictures from one or several run folders.")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders; equal labels are averaged")
    report.add_argument("--format", type=_paths, default=["md", "csv"], help="of md, csv, tex, pdf, html")
    report.add_argument("--output", type=Path, help="default: RUN/report of the first run")
    report.add_argument("--data", type=Path, help="html: the benchmark's data folder, if it moved since the runs")
    report.add_argument("--json", action="store_true", help="print the metrics as JSON instead of tables")

    metrics = verb("metrics", "Continual-learning metrics of any accuracy matrix.")
    metrics.add_argument(
        "matrix", type=Path, metavar="MATRIX.csv", help="rows: after training that task; columns: tasks"
    )
    metrics.add_argument("--immediate", type=Path, metavar="ROW.csv", help="scores right after training, router known")
    metrics.add_argument("--json", action="store_true", help="print the metrics as JSON")

    plan = verb("plan", "What a method trains on a model, and takes; loads no weights. Exit code 1: files are missing.")
    method_arguments(plan)
    plan.add_argument("--gpus", type=_at_least_one, default=1, metavar="N", help="processes, one per GPU")
    plan.add_argument("--deepspeed", metavar="ZERO", help="zero2, zero2_offload, zero3 or a JSON file")
    plan.add_argument(
        "--tokens", type=_at_least_one, metavar="T", help="of a sample (default: the image's and 64 of text)"
    )
    plan.add_argument(
        "--answer-tokens", type=_at_least_one, default=16, metavar="A", help="of a sample: those with logits"
    )
    plan.add_argument(
        "--extended-blocks", type=float, metavar="X", help="blocks that a later task extends by one expert, on average"
    )
    form = plan.add_mutually_exclusive_group()
    form.add_argument(
        "--steps", action="store_true", help="only the runs, one line each: number, task, parent's task or -"
    )
    form.add_argument("--json", action="store_true", help="print the figures as JSON")

    data = verb("data", "Build or verify a benchmark's files.")
    data.add_argument(
        "action", choices=("prepare", "check"), help="build what can be built, or read every row and decode every image"
    )
    data.add_argument("benchmark", metavar="BENCHMARK", help="a name in configs/benchmarks or a YAML file")
    data.add_argument("--data", type=Path, help="the benchmark's data folder (default: the YAML's root)")
    data.add_argument("--bad", type=Path, metavar="FILE", help="check: write the list of all that is bad here")

    doctor = verb("doctor", "Versions, devices, and what is usable here. Exit code 1: something required is broken.")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")

    convert = verb("convert", "Another project's LLaVA or adapter -> a model folder or a checkpoint of ours.")
    convert.add_argument("source", type=Path, metavar="SRC", help="folder of the LLaVA, LLaMA or adapter")
    convert.add_argument("target", type=Path, metavar="DST", help="folder to write; must not exist")
    convert.add_argument("--vision", type=Path, metavar="CLIP", help="folder of the CLIP model with the vision tower")
    convert.add_argument(
        "--projector", type=Path, metavar="BIN", help="with a LLaMA: the first stage's mm_projector.bin"
    )
    convert.add_argument("--model", help="with an adapter: the model it was trained on, as for train")
    convert.add_argument("--benchmark", help="with an adapter: a name in configs/benchmarks or a YAML file")
    convert.add_argument("--tasks", type=_paths, help="with an adapter: what it has learned, oldest first")

    card = verb("card", "Write a checkpoint's model card with the scores that were measured on it.")
    card.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint folder")
    card.add_argument("--run", type=Path, help="run folder with its scores (default: the folder above the checkpoint)")
    card.add_argument("--output", type=Path, help="file to write (default: README.md in the checkpoint)")

    demo = verb("demo", "Ask a checkpoint about an image in the browser; shows the located task and the experts.")
    demo.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint folder")
    demo.add_argument("--port", type=int, help="default: the first free one from 7860")
    demo.add_argument("--benchmark", help="whose test questions are the examples (default: the checkpoint's)")
    demo.add_argument("--data", type=Path, help="the benchmark's data folder (default: the YAML's root)")
    demo.add_argument("--model", help="folder or hub name of the base, where it is not the training's")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Errors that a user can mend are one line on stderr and exit code 2."""
    options = _parser().parse_args(arguments)
    _silence_libraries()
    from clmoe import commands

    try:
        with stopping_on_sigterm():
            result = getattr(commands, f"run_{options.verb}")(options)
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
    """All processes stop with the same code; one of them says why."""
    if is_main():
        print(message, file=sys.stderr)
    leave(code)


def _show(result: Any, as_json: bool) -> None:
    if result is None:
        return
    print(json.dumps(result, indent=1) if as_json else result)


if __name__ == "__main__":
    main()
