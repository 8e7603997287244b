"""Writes docs/api.md from the code: ``python scripts/api_page.py``. A test compares the page with what this makes."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clmoe
from clmoe.cli import _parser
from clmoe.config import AdapterConfig, Config, EvaluationConfig, ModelConfig, TrainingConfig
from clmoe.evaluate.answer import Explanation, LoadedCheckpoint, RouterWeights
from clmoe.methods import method_class, methods

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
HEAD = """\
# API

Made by `python scripts/api_page.py` from the code; `tests/docs/test_api.py` fails when the two differ.

"""
SECTIONS = {
    "": Config,
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "training": TrainingConfig,
    "evaluation": EvaluationConfig,
}
ENVIRONMENT = {
    "CLMOE_CACHE": "folder for what can be made again: large training files as Arrow files (default `~/.cache/clmoe`)",
    "CLMOE_DATA_ROOT": "data folder of the benchmark, where `--data` does not name it",
    "CLMOE_FEATURES": "folder for the locators' features, which runs on one base may share",
    "CLMOE_KERNELS": "`torch`: experts without fused kernels; `triton`: insist on them (default: on CUDA if installed)",
    "CLMOE_PROGRESS": "`0` switches the progress bar off",
    "CLMOE_VISION": "folder that keeps the vision tower's output for every image, which runs on one base may share",
    "OMP_NUM_THREADS": "threads; equal bytes need an equal number (the scripts set 2)",
    "SEED": "scripts: of initial weights, sample order and dropout (0)",
    "ORDER": "scripts: of the tasks: `norm`, `rev`, `rand` or names with commas",
    "OUT": "scripts: the run folder; of `quickstart.sh` and `table1.sh` the folder above their runs'",
    "MODEL": "scripts: a name in configs/models, a model folder or a hub name",
    "DATA": "scripts: the benchmark's data folder",
    "METHOD": "scripts of a method: another of its configurations (configs/methods, or a YAML file)",
    "BENCHMARK": "`scripts/playground/*.sh`: the sequence (`playground-coin`)",
    "WARMUP": "of the `llava_cmoe.sh` scripts: folder with `train.json` and `images/` behind the initial experts",
    "GPUS": "scripts: processes on this machine, one per GPU; see [multi-gpu](multi-gpu.md)",
    "LAUNCHER": "scripts: `python`, `torchrun` or `deepspeed`",
    "DEEPSPEED": "scripts: `zero2`, `zero2_offload`, `zero3` or a JSON file",
    "CUDA_VISIBLE_DEVICES": "scripts: the GPUs that may be used, by number",
    "HOSTFILE": "scripts: DeepSpeed's list of machines",
    "MASTER_PORT": "scripts: DeepSpeed's port for the processes to meet (a free one)",
    "DS_ENV_FILE": "scripts: where variables for the other machines are written (beside HOSTFILE)",
    "HOSTS": "`scripts/cluster/multinode.sh`: the machines, where there is no HOSTFILE (under SLURM: the job's)",
    "SCRIPT": "`scripts/cluster/*.sh`: the script to run",
    "RUN": "`scripts/eval.sh`: the run folder whose checkpoints are evaluated again",
    "STEPS": "`scripts/quickstart.sh`: per task (150)",
    "LIMIT": "`scripts/quickstart.sh`: test questions per task in rows before the last (100)",
    "JOBS": "`scripts/quickstart.sh`, `table1.sh`: runs side by side (one per core)",
    "SEEDS, BENCHMARKS, GRID": "`scripts/playground/table1.sh`: what to run (`0 1 2`, both sequences, `table1`)",
    "PYTHON": "`scripts/quickstart.sh`, `test.sh`: the interpreter that makes `.venv`",
    "TORCH_INDEX_URL": "`scripts/quickstart.sh`, `test.sh`: an index to take torch from",
}
RUN_FILES = {
    "NN_task/": "a checkpoint; [its files](checkpoints.md)",
    "predictions/": "`<after>/<task>.jsonl`: one line per question; `<after>/<task>.json`: the score and what made it; "
    "`<task>.oracle`, `.last`, `.random`: under another router",
    "matrix.csv": "row: after training that task; column: score on that task; blank: not measured",
    "immediate.csv": "each task right after its training, with its identity known",
    "metrics.json": "what `clmoe metrics` computes from the two",
    "locator.csv": "how many questions of each task each decider took for which task",
    "parameters.csv": "parameters trained in each task and stored after it",
    "usage.csv": "CL-MoE: share of its router's weight that each expert got on each task's training data",
    "expansion.json": "growing methods: the probes' activations and what each task added",
    "run.json": "method, label, benchmark, order, seed, and what else the report needs",
    "features/": "the locators' features; may be deleted",
    "events.jsonl": "one line per event, with times",
    "timing.json": "minutes spent",
    "report/": "what `clmoe report` wrote",
}


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def first_paragraph(thing: Any) -> str:
    return plain((inspect.getdoc(thing) or "").split("\n\n")[0])


def plain(text: str) -> str:
    """A docstring's text on one line of Markdown."""
    return " ".join(text.split()).replace("``", "`")


def meanings(kind: type) -> dict[str, str]:
    """What the section "Attributes:" of a docstring says of each field; ``a, b: text`` speaks of both."""
    text = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].split("\n\n")[0]
    entries = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8,}.*)*)", text, re.MULTILINE)
    return {name: plain(meaning) for names, meaning in entries for name in names.split(", ")}


def type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(annotation))
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return " | ".join("null" if a is type(None) else type_name(a) for a in typing.get_args(annotation))
    if typing.get_origin(annotation) is dict:
        return "mapping"
    return annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)


def keys(kind: type, prefix: str) -> Iterator[tuple[str, ...]]:
    """(key, type, default, meaning) of every field, those of nested dataclasses included."""
    hints, said = typing.get_type_hints(kind), {}
    for ancestor in reversed(kind.__mro__):
        said |= meanings(ancestor) if dataclasses.is_dataclass(ancestor) else {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            if kind is not Config:
                yield from keys(hints[field.name], f"{prefix}{field.name}.")
            continue
        made = None if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = made if field.default is dataclasses.MISSING else field.default
        required = field.default is field.default_factory is dataclasses.MISSING
        shown = "required" if required else f"`{json.dumps(default)}`"
        yield f"`{prefix}{field.name}`", type_name(hints[field.name]), shown, said[field.name]


def config_section() -> str:
    text = (
        "## Configuration keys\n\nIn a method's YAML, a benchmark's `recipe`, or as `key=value` on the command line.\n"
    )
    for section, kind in SECTIONS.items():
        title = section or "Top level"
        rows = list(keys(kind, f"{section}." if section else ""))
        text += f"\n### {title}\n\n{table(('key', 'type', 'default', 'meaning'), rows)}"
    for name in methods():
        rows = list(keys(method_class(name).Options, "options."))
        if rows:
            text += f"\n### options of `{name}`\n\n{table(('key', 'type', 'default', 'meaning'), rows)}"
    return text


def verb_section() -> str:
    (verbs,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    text = (
        "## Verbs\n\nErrors that you can mend are one line on stderr and exit code 2. Code 75: stopped by SIGTERM, the "
    )
    text += "same command goes on from there.\n"
    for name, parser in verbs.choices.items():
        rows = [option_row(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
        text += f"\n### clmoe {name}\n\n{parser.description}\n\n{table(('argument', 'default', 'meaning'), rows)}"
    return text


def option_row(action: argparse.Action) -> tuple[str, ...]:
    assert action.help, f"{action.dest} has no help"
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    if action.choices:
        value = "|".join(action.choices)
    name = " ".join(part for part in (*action.option_strings[-1:], value) if part)
    default = "required" if action.required and action.nargs != "*" else ""
    if action.default not in (None, False, []):
        default = f"`{','.join(action.default) if isinstance(action.default, list) else action.default}`"
    return f"`{name}`", default, action.help


def python_section() -> str:
    text = "## Python\n\n`import clmoe` makes the adapter known to peft. Public names:\n\n"
    rows = [(f"`clmoe.{name}`", first_paragraph(thing)) for name, thing in public().items()]
    text += table(("name", "what it is"), rows)
    text += "\n### What `clmoe.load` returns\n\n"
    text += f"`clmoe.load{signature(clmoe.load)}`\n\n" + table(
        ("member", "what it does"), list(members(LoadedCheckpoint))
    )
    for kind in (Explanation, RouterWeights, clmoe.ExpertConfig, clmoe.RouteSelection):
        text += f"\n### {kind.__name__}\n\n{first_paragraph(kind)}\n\n"
        said = [(f"`{name}`", meaning) for name, meaning in meanings(kind).items()]
        text += table(("field", "meaning"), said)
    return text


def public() -> dict[str, Any]:
    return {name: getattr(importlib.import_module(module), name) for name, module in clmoe.PUBLIC.items()}


def signature(function: Any) -> str:
    """Names and defaults without types."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "watch")]
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    return f"({', '.join(shown)})"


def members(kind: type) -> Iterator[tuple[str, ...]]:
    for name, meaning in meanings(kind).items():
        yield f"`.{name}`", meaning
    for name, thing in vars(kind).items():
        if not name.startswith("_"):
            call = "" if isinstance(thing, property) else signature(thing)
            yield f"`.{name}{call}`", first_paragraph(thing)


def api_page() -> str:
    """The whole page."""
    files = table(("in a run folder", "content"), [(f"`{name}`", text) for name, text in RUN_FILES.items()])
    variables = table(("variable", "meaning"), [(f"`{name}`", text) for name, text in ENVIRONMENT.items()])
    parts = [
        python_section(),
        verb_section(),
        f"## Run folders\n\n{files}",
        config_section(),
        f"## Environment\n\n{variables}",
    ]
    return HEAD + "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(api_page(), encoding="utf-8")
    print(f"written: {PAGE}")
