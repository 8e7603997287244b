"""Read run folders, check them, and group the runs of one label over their seeds.

Only run.json and matrix.csv must be there; the metrics are computed from the matrix.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from clmoe.errors import ClmoeError
from clmoe.evaluate.matrix import AccuracyMatrix, Scores, metrics, read_immediate_csv
from clmoe.evaluate.rules.base import MODES
from clmoe.methods import method_class
from clmoe.utils.files import read_csv, read_json
from clmoe.utils.logging import read_events

# Fields of run.json, with the types of `Run`; and of a block in expansion.json.
_INFO = "method benchmark order seed label scoring trainable_parameters adapter_parameters projector_trained"
_INFO += " effective_scale steps_per_task limit"
_BLOCK = {"activations": (list,), "probes": (int,), "threshold": (int, float), "added": (int,)}


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A sequence, perhaps unfinished. Scores and metrics are in percent, `minutes` is wall time.

    `limit` is the number of test questions per task in the rows before the last; None is all, or not recorded. A table
    is empty if its file is absent:

        parameters  task, trainable, stored
        expansion   task, block, added, probe, limit: the most active probe, and the limit that it had to exceed
        usage       task, block, expert, kind, share: kind is "expert" or "probe"
        located     after, locator, task, located, count
    """

    method: str
    benchmark: str
    order: tuple[str, ...]
    seed: int
    label: str
    scoring: str
    trainable_parameters: int
    adapter_parameters: int
    projector_trained: bool
    effective_scale: int | float | None
    steps_per_task: int
    limit: int | None
    path: Path
    matrix: AccuracyMatrix
    immediate: Scores | None
    metrics: dict[str, float | None]
    minutes: float | None
    peak_memory_mib: float | None
    parameters: pd.DataFrame
    expansion: pd.DataFrame
    usage: pd.DataFrame
    located: pd.DataFrame

    @property
    def chain(self) -> str:
        """`Method.chain` of the run's method: "sequence", or else the method is a bound."""
        try:
            return method_class(self.method).chain
        except ClmoeError:  # a method of the user's own that is not here
            return "sequence"

    @property
    def staged(self) -> bool:
        """Some task was evaluated before the last training."""
        return any(task in self.matrix.rows for task in self.order[:-1])


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The runs of one label, ordered by seed."""

    label: str
    runs: tuple[Run, ...]


def read_run(folder: Path) -> Run:
    """Read one run folder.

    Raises:
        ClmoeError: a file is missing or malformed, or the columns of the matrix are not the tasks in the run's order.
    """
    where, timing, known = (folder / name for name in ("run.json", "timing.json", "immediate.csv"))
    if not where.is_file():
        raise ClmoeError(f"{where} is missing: is {folder} the folder of a run?")
    info: Any = read_json(where)
    if isinstance(info, dict):
        info = {"limit": None, "scoring": "fixed"} | info  # older runs lack them
    for field in _INFO.split():
        kind = Run.__annotations__[field]
        check_field(where, info, field, (list,) if field == "order" else get_args(kind) or (kind,))
    if not all(isinstance(task, str) for task in info["order"]):
        raise ClmoeError(f"{where}: field 'order' must be a list of task names")
    if info["scoring"] not in MODES:
        raise ClmoeError(f"{where}: field 'scoring' is {info['scoring']!r}; allowed: {', '.join(MODES)}")
    matrix, order = AccuracyMatrix.read_csv(folder / "matrix.csv"), tuple(info["order"])
    if matrix.tasks != order:
        found, wanted = ", ".join(matrix.tasks), ", ".join(order)
        raise ClmoeError(f"{folder / 'matrix.csv'}, header: columns {found} are not the order in run.json ({wanted})")
    immediate = read_immediate_csv(known, order) if known.exists() else None
    times = read_json(timing) if timing.exists() else {"minutes": None}
    check_field(timing, times, "minutes", (int, float, type(None)))
    events = read_events(folder / "events.jsonl")
    expansion, tried = _read_expansion(folder / "expansion.json", order)
    used = _read_table(folder / "usage.csv", {"task": order, "block": str, "expert": int}, {"share": float})
    used["block"] = used["block"].map(block_names(used["block"]))
    used.insert(3, "kind", "expert")
    located = {"after": order, "locator": str, "task": order, "located": order}
    return Run(
        path=folder,
        matrix=matrix,
        immediate=immediate,
        metrics=metrics(matrix, immediate),
        peak_memory_mib=max((e.get("peak_cuda_mib", e.get("peak_rss_mib", 0)) for e in events), default=0) or None,
        parameters=_read_table(folder / "parameters.csv", {"task": order}, {"trainable": int, "stored": int}),
        expansion=expansion,
        usage=used if tried.empty else tried,
        located=_read_table(folder / "locator.csv", located, {"count": int}),
        minutes=times["minutes"],
        **{field: info[field] for field in _INFO.split()} | {"order": order},
    )


def group_runs(folders: Sequence[Path]) -> list[Group]:
    """Read run folders and group them by label, labels in the order given and runs by seed.

    Raises:
        ClmoeError: no folder, a label with the same seed twice, or another benchmark, scoring mode or set of tasks.
    """
    if not folders:
        raise ClmoeError("no run folder given")
    runs = [read_run(folder) for folder in folders]
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        kinds = [(r.benchmark, r.scoring, ", ".join(sorted(r.order))) for r in (runs[0], run)]
        for what, ours, theirs in zip(("benchmark", "scoring", "tasks"), *kinds, strict=True):
            if ours != theirs:
                raise ClmoeError(f"{run.path} and {runs[0].path} differ in {what}: {theirs} / {ours}")
        seeds = groups.setdefault(run.label, {})
        if run.seed in seeds:
            both = f"{run.path} and {seeds[run.seed].path} both hold {run.label}, seed {run.seed}"
            raise ClmoeError(f"{both}; give each variant its own 'label' in run.json, or leave one out")
        seeds[run.seed] = run
    return [Group(label, tuple(seeds[seed] for seed in sorted(seeds))) for label, seeds in groups.items()]


def check_field(where: Path | str, info: Any, field: str, types: tuple[type, ...]) -> None:
    """Refuse a missing field, one of another type, and numbers that are not finite."""
    if not isinstance(info, dict) or field not in info:
        raise ClmoeError(f"{where}: field {field!r} is missing")
    value = info[field]
    wrong_bool = isinstance(value, bool) and bool not in types  # bool is an int in Python
    if not isinstance(value, types) or wrong_bool or (isinstance(value, float) and not math.isfinite(value)):
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
        raise ClmoeError(f"{where}: field {field!r} is {value!r}; expected {wanted}")


def block_names(blocks: Iterable[str]) -> dict[str, str]:
    """Module names -> short names such as "layer 3 mlp", in the order of the layers; unchanged if of several towers."""
    parts = {name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)] for name in blocks}
    several = len({name.rpartition("layers.")[0] for name in parts}) > 1
    short = {name: name if several else re.sub(r"^.*layers\.(\d+)\.?", r"layer \1 ", name).strip() for name in parts}
    return {name: short[name] for name in sorted(parts, key=parts.__getitem__)}


def _read_table(path: Path, keys: dict[str, Any], values: dict[str, Any]) -> pd.DataFrame:
    """A CSV file with these columns, of which the keys together name a row; no rows if there is no file.

    A column holds whole numbers (int), shares (float), any text (str), or one of some names.
    """
    columns, rows = keys | values, {}
    if not path.exists():
        return pd.DataFrame(columns=list(columns))
    header, *lines = read_csv(path) or [(1, [])]
    if header[1] != list(columns):
        raise ClmoeError(f"{path}, header: expected {','.join(columns)}, found {','.join(header[1]) or 'nothing'}")
    for line, cells in lines:
        where, key = f"{path}, row {line}", tuple(cells[: len(keys)])
        if len(cells) != len(columns):
            raise ClmoeError(f"{where}: {len(cells)} cells for the columns {','.join(columns)}")
        if key in rows:
            raise ClmoeError(f"{where}: second row for {','.join(key)}; remove one")
        kinds = zip(columns.items(), cells, strict=True)
        rows[key] = [_cell(f"{where}, column {name!r}", text, kind) for (name, kind), text in kinds]
    return pd.DataFrame(list(rows.values()), columns=list(columns))


def _cell(where: str, text: str, kind: Any) -> Any:
    if kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= (math.inf if kind is int else 1):
            raise ClmoeError(f"{where}: {text!r} is not a {'whole number' if kind is int else 'number from 0 to 1'}")
        return value
    if kind is not str and text not in kind:
        raise ClmoeError(f"{where}: {text!r} is none of {', '.join(kind)}")
    return text


def _read_expansion(path: Path, order: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`expansion.json` as the tables `Run.expansion` and, where the activations are shares of tokens, `Run.usage`."""
    plans, decisions, shares = read_json(path) if path.exists() else [], [], []
    check_field(path, {"tasks": plans}, "tasks", (list,))
    for number, plan in enumerate(plans, start=1):
        check_field(f"{path}, entry {number}", plan, "task", (str,))
        check_field(f"{path}, entry {number}", plan, "blocks", (dict,))
    tasks, names = [plan["task"] for plan in plans], block_names(name for plan in plans for name in plan["blocks"])
    if tasks != [task for task in order if task in tasks]:
        found, wanted = ", ".join(tasks), ", ".join(order)
        raise ClmoeError(f"{path}, field 'task': found {found}; list tasks of {wanted}, each once and in this order")
    for plan, name in [(plan, name) for plan in plans for name in names if name in plan["blocks"]]:
        where, block = f"{path}, task {plan['task']!r}, block {name!r}", plan["blocks"][name]
        for field, types in _BLOCK.items():
            check_field(where, block, field, types)
        key, values = (plan["task"], names[name]), block["activations"]
        for value in values:
            check_field(where, {"activations": value}, "activations", (int, float))
        experts = len(values) - block["probes"]
        # the rule itself raises a negative threshold to 0
        decisions.append((*key, block["added"], max(values[experts:]), max(block["threshold"], 0.0)))
        if min(values) >= 0 and sum(values) > 0:  # mean logits may be negative
            kinds = ["expert"] * experts + ["probe"] * block["probes"]
            shares += [(*key, e, kinds[e], value / sum(values)) for e, value in enumerate(values)]
    return (
        pd.DataFrame(decisions, columns=["task", "block", "added", "probe", "limit"]),
        pd.DataFrame(shares, columns=["task", "block", "expert", "kind", "share"]),
    )
