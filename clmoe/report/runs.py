"""Read run folders, check them, and group the runs of one label over their seeds.

Only run.json and matrix.csv must be there. Every metric is computed from the matrix, so metrics.json is not read. An
unfinished run has rows for its first tasks only.
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

# The fields of run.json, with the types of `Run`.
_INFO = "method benchmark order seed label scoring trainable_parameters adapter_parameters projector_trained"
_INFO += " effective_scale steps_per_task limit"


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One finished or unfinished sequence. Scores and metrics are in percent, `minutes` is wall time.

    `limit` is the number of test questions per task in the rows before the last; None is all, or not recorded.
    A table whose file is absent is empty:

        parameters  task, trainable, stored
        expansion   task, block, added, probe, limit: the most active probe, and the limit that it had to exceed
        usage       task, block, expert, kind, share: kind is "expert" or "probe"
        located     after, decider, task, located, count
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
    def complete(self) -> bool:
        """The last task was evaluated after the last training."""
        return self.matrix.cell(len(self.order), len(self.order)) is not None

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
        ClmoeError: a file is missing or malformed (file, row and field are named), or the columns of the matrix are not
            the tasks of the run's order.
    """
    where, timing = folder / "run.json", folder / "timing.json"
    if not where.is_file():
        raise ClmoeError(f"{where} is missing: is {folder} the folder of a run?")
    info: Any = read_json(where)
    if isinstance(info, dict):
        info = {"limit": None, "scoring": "fixed"} | info  # older runs lack these two
    for field in _INFO.split():
        kind = Run.__annotations__[field]
        check_field(where, info, field, (list,) if field == "order" else get_args(kind) or (kind,))
    if not all(isinstance(task, str) for task in info["order"]):
        raise ClmoeError(f"{where}: field 'order' must be a list of task names")
    if info["scoring"] not in MODES:
        raise ClmoeError(f"{where}: field 'scoring' is {info['scoring']!r}; allowed: {', '.join(MODES)}")
    matrix, order = AccuracyMatrix.read_csv(folder / "matrix.csv"), tuple(info["order"])
    if matrix.tasks != order:
        raise ClmoeError(
            f"{folder / 'matrix.csv'}, header: columns {', '.join(matrix.tasks)} are not the order "
            f"in run.json ({', '.join(order)})"
        )
    known = folder / "immediate.csv"
    immediate = read_immediate_csv(known, order) if known.exists() else None
    times = read_json(timing) if timing.exists() else {"minutes": None}
    check_field(timing, times, "minutes", (int, float, type(None)))
    events = read_events(folder / "events.jsonl")
    parameters = _read_table(folder / "parameters.csv", {"task": order, "trainable": int, "stored": int})
    _check_order(folder / "parameters.csv", list(parameters["task"]), order)
    expansion, tried = _read_expansion(folder / "expansion.json", order)
    used = _read_usage(folder / "usage.csv", order)
    return Run(
        path=folder,
        matrix=matrix,
        immediate=immediate,
        metrics=metrics(matrix, immediate),
        peak_memory_mib=max((e.get("peak_cuda_mib", e.get("peak_rss_mib", 0)) for e in events), default=0) or None,
        parameters=parameters,
        expansion=expansion,
        usage=used if tried.empty else tried,
        located=_read_located(folder / "locator.csv", order),
        minutes=times["minutes"],
        **{field: info[field] for field in _INFO.split()} | {"order": order},
    )


def group_runs(folders: Sequence[Path]) -> list[Group]:
    """Read run folders and group them by label, labels in the order given and runs by seed.

    Raises:
        ClmoeError: no folder, a label with the same seed twice, or runs that one table cannot hold because benchmark,
            scoring mode or set of tasks differ.
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
            raise ClmoeError(
                f"{run.path} and {seeds[run.seed].path} both hold {run.label}, seed {run.seed}; give each variant its "
                "own 'label' in run.json, or leave one out"
            )
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


def _read_table(path: Path, columns: dict[str, Any]) -> pd.DataFrame:
    """A CSV file with exactly these columns: whole numbers (int), shares (float), any text (str), or one of some names.

    The index is the line number. An absent file gives no rows.
    """
    lines = read_csv(path) if path.exists() else [(1, list(columns))]
    if not lines or lines[0][1] != list(columns):
        found = ",".join(lines[0][1]) if lines else "an empty file"
        raise ClmoeError(f"{path}, header: expected {','.join(columns)!r}, found {found!r}")
    rows = {}
    for line, cells in lines[1:]:
        if len(cells) != len(columns):
            raise ClmoeError(f"{path}, row {line}: {len(cells)} cells for the columns {','.join(columns)}")
        kinds = zip(columns.items(), cells, strict=True)
        rows[line] = [_cell(f"{path}, row {line}, column {name!r}", text, kind) for (name, kind), text in kinds]
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(columns))


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


def _check_order(path: Path, tasks: Sequence[str], order: Sequence[str]) -> None:
    """Refuse a task that is unknown, listed twice, or listed after a later one."""
    if list(tasks) != [task for task in order if task in tasks]:
        found, wanted = ", ".join(tasks), ", ".join(order)
        raise ClmoeError(f"{path}, field 'task': found {found}; list tasks of {wanted}, each once and in this order")


def _read_usage(path: Path, order: Sequence[str]) -> pd.DataFrame:
    """`usage.csv`; the experts of a block stand in order, counted from 0."""
    table = _read_table(path, {"task": order, "block": str, "expert": int, "share": float})
    expected = table.groupby(["task", "block"]).cumcount()
    for line in table.index[table["expert"] != expected][:1]:
        found = f"expected {expected[line]}, found {table['expert'][line]}"
        raise ClmoeError(f"{path}, row {line}, column 'expert': {found}")
    table["block"] = table["block"].map(block_names(table["block"]))
    table.insert(3, "kind", "expert")
    return table


def _read_located(path: Path, order: Sequence[str]) -> pd.DataFrame:
    """`locator.csv`; a pair of tasks that is not listed was never confused."""
    table = _read_table(path, {"after": order, "decider": str, "task": order, "located": order, "count": int})
    for line in table.index[table.duplicated(["after", "decider", "task", "located"])][:1]:
        raise ClmoeError(f"{path}, row {line}: second row for {','.join(table.loc[line][:4])}; remove one")
    return table


def _read_expansion(path: Path, order: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`expansion.json` as the tables `Run.expansion` and, where the activations are shares of tokens, `Run.usage`."""
    plans = read_json(path) if path.exists() else []
    check_field(path, {"tasks": plans}, "tasks", (list,))
    for number, plan in enumerate(plans, start=1):
        check_field(f"{path}, entry {number}", plan, "task", (str,))
        check_field(f"{path}, entry {number}", plan, "blocks", (dict,))
    _check_order(path, [plan["task"] for plan in plans], order)
    decisions: list[tuple[Any, ...]] = []
    shares: list[tuple[Any, ...]] = []
    names = block_names(name for plan in plans for name in plan["blocks"])
    for plan, name in [(plan, name) for plan in plans for name in names if name in plan["blocks"]]:
        block = plan["blocks"][name]
        _check_block(f"{path}, task {plan['task']!r}, block {name!r}", block)
        key, values = (plan["task"], names[name]), block["activations"]
        experts = len(values) - block["probes"]
        # The rule itself raises a negative threshold to 0.
        decisions.append((*key, block["added"], max(values[experts:]), max(block["threshold"], 0.0)))
        if min(values) >= 0 and sum(values) > 0:  # mean logits may be negative
            kinds = ["expert"] * experts + ["probe"] * block["probes"]
            shares += [(*key, e, kinds[e], value / sum(values)) for e, value in enumerate(values)]
    return (
        pd.DataFrame(decisions, columns=["task", "block", "added", "probe", "limit"]),
        pd.DataFrame(shares, columns=["task", "block", "expert", "kind", "share"]),
    )


def _check_block(where: str, block: Any) -> None:
    for field, kind in (("activations", list), ("probes", int), ("threshold", float), ("added", int)):
        check_field(where, block, field, (int, float) if kind is float else (kind,))
    for value in block["activations"]:
        check_field(where, {"activations": value}, "activations", (int, float))
    if not 1 <= block["probes"] <= len(block["activations"]):
        raise ClmoeError(f"{where}: field 'probes' is {block['probes']}; expected 1 to {len(block['activations'])}")
    if block["added"] < 0:
        raise ClmoeError(f"{where}: field 'added' is {block['added']}; expected at least 0")
