"""Read run folders (only run.json and matrix.csv must be there), and group the runs of one label over their seeds."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from clmoe.config import build, read_yaml
from clmoe.errors import ClmoeError
from clmoe.evaluate.matrix import (
    AccuracyMatrix,
    Scores,
    general_metrics,
    metrics,
    read_general_csv,
    read_immediate_csv,
)
from clmoe.evaluate.run import RunInfo
from clmoe.methods import method_class
from clmoe.utils.files import read_csv, read_json
from clmoe.utils.logging import read_events
from clmoe.utils.settings import flat

T = TypeVar("T")
_STEP = ["step", "name", "value"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Run(RunInfo):
    """A sequence, perhaps unfinished. Scores and metrics are in percent, `minutes` is wall time.

    A table is empty if its file is absent:

        parameters  task, trainable, stored
        expansion   task, block, added, probe, limit: the most active probe, and the limit that it had to exceed
        usage       task, block, expert, kind, share: kind is "expert" or "probe"
        located     after, locator, task, located, count
        general     after, set, value: of sets of general ability; ``after`` is "zero_shot" or a task
        losses      task, phase, step, loss: of training; phase "" has not ended
        measured    task, phase, step, name, value: what the method logged besides

    ``settings`` are those that decide the run's result, by dotted key; `commits` those of clmoe that worked on it.
    ``spent`` holds the figures of spent.json, ``tuned`` what `clmoe tune` wrote, if the run took its options from it.
    """

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
    general: pd.DataFrame
    losses: pd.DataFrame
    measured: pd.DataFrame
    settings: dict[str, Any]
    commits: list[str]
    spent: dict[str, int | None]
    tuned: dict[str, Any]

    @property
    def chain(self) -> str:
        """`Method.chain` of the run's method; if it is not "sequence", the method is a bound."""
        try:
            return method_class(self.method).chain
        except ClmoeError:  # a method of the user's own that is not here
            return "sequence"

    @property
    def staged(self) -> bool:
        """Whether some task was evaluated before the last training."""
        return any(task in self.matrix.rows for task in self.order[:-1])


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one label, ordered by seed."""

    label: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class _Entry:
    """An entry of expansion.json."""

    task: str
    blocks: dict[str, Any]


@dataclass(frozen=True)
class _Block:
    activations: list[float]
    probes: int
    threshold: float
    added: int


def read_run(folder: Path) -> Run:
    """Read one run folder. Raises ClmoeError if a file is missing or malformed, or two do not fit together."""
    where, timing, known = (folder / name for name in ("run.json", "timing.json", "immediate.csv"))
    if not where.is_file():
        raise ClmoeError(f"{where} is missing: is {folder} a run folder?")
    info = _build(RunInfo, read_json(where), str(where))
    matrix, order = AccuracyMatrix.read_csv(folder / "matrix.csv"), info.order
    if list(matrix.tasks) != order:
        found, wanted = ", ".join(matrix.tasks), ", ".join(order)
        raise ClmoeError(f"{folder / 'matrix.csv'}, header: columns {found} are not the order in run.json ({wanted})")
    immediate = read_immediate_csv(known, order) if known.exists() else None
    asked = folder / "general.csv"
    sets, general = read_general_csv(asked, order) if asked.exists() else ((), {})
    events = read_events(folder / "events.jsonl")
    expansion, tried = _read_expansion(folder / "expansion.json", order)
    used = _read_table(folder / "usage.csv", {"task": order, "block": str, "expert": int}, {"share": float})
    used["block"] = used["block"].map(block_names(used["block"]))
    used.insert(3, "kind", "expert")
    steps = _read_steps(events)
    is_loss = steps["name"] == "loss"
    located = {"after": order, "locator": str, "task": order, "located": order}
    return Run(
        path=folder,
        matrix=matrix,
        immediate=immediate,
        metrics=metrics(matrix, immediate) | (general_metrics(general, order[-1]) if sets else {}),
        peak_memory_mib=max((e.get("peak_cuda_mib", e.get("peak_rss_mib", 0)) for e in events), default=0) or None,
        parameters=_read_table(folder / "parameters.csv", {"task": order}, {"trainable": int, "stored": int}),
        expansion=expansion,
        usage=used if tried.empty else tried,
        located=_read_table(folder / "locator.csv", located, {"count": int}),
        minutes=read_json(timing)["minutes"] if timing.exists() else None,
        general=_long(sets, general),
        losses=steps[is_loss].drop(columns="name").rename(columns={"value": "loss"}),
        measured=steps[~is_loss],
        settings=_read_settings(folder),
        spent=_read_mapping(folder / "spent.json"),
        tuned=_read_mapping(folder / "tuned.json"),
        commits=list(dict.fromkeys(event["commit"] for event in events if event.get("commit"))),
        **vars(info),
    )


def group_runs(folders: Sequence[Path]) -> list[Group]:
    """Groups by label, in the order given. Raises ClmoeError for no folder, a repeated seed, or incomparable runs."""
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


def block_names(blocks: Iterable[str]) -> dict[str, str]:
    """Module names -> short names such as "layer 3 mlp", in the order of the layers."""
    parts = {name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)] for name in blocks}
    ordered = sorted(parts, key=parts.__getitem__)
    return {name: re.sub(r"^.*layers\.(\d+)\.?", r"layer \1 ", name).strip() for name in ordered}


def _long(sets: Sequence[str], rows: Mapping[str, Scores]) -> pd.DataFrame:
    found = [(after, name, score) for after, scores in rows.items() for name, score in zip(sets, scores, strict=True)]
    return pd.DataFrame(found, columns=["after", "set", "value"]).astype({"value": float})


def _read_steps(events: list[dict[str, Any]]) -> pd.DataFrame:
    """task, phase, step, name, value: the loss and what the method measured.

    If a step came twice because a command was interrupted, the later one counts.
    """
    found, running = dict[tuple[str, str, int, str], float](), dict[tuple[str, int, str], float]()
    for event in events:
        if event["event"] == "step" and "loss" in event:
            numbers = {"loss": event["loss"], **event.get("measured", {})}
            running |= {(event["task"], event["step"], name): value for name, value in numbers.items()}
        elif event["event"] == "trained":
            ended = [key for key in running if key[0] == event["task"]]
            found |= {(key[0], event["phase"], *key[1:]): running.pop(key) for key in ended}
    found |= {(task, "", *rest): value for (task, *rest), value in running.items()}  # type: ignore[misc]
    return pd.DataFrame([(*key, value) for key, value in found.items()], columns=["task", "phase", *_STEP])


def _read_mapping(path: Path) -> dict[str, Any]:
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise ClmoeError(f"{path}: expected a mapping, found {values!r}")
    return values


def _read_settings(folder: Path) -> dict[str, Any]:
    """What `clmoe run` recorded, or the first checkpoint's configuration; empty without either."""
    recorded, (config, *_) = folder / "sequence.json", [*sorted(folder.glob("*/config.yaml")), None]
    values = read_json(recorded) if recorded.is_file() else {} if config is None else read_yaml(config)
    found = {key: value for key, value in flat(values).items() if not isinstance(value, dict)}
    return {key: value for key, value in found.items() if found.get("locator.name") or not key.startswith("locator.")}


def _build(kind: type[T], values: Any, where: str) -> T:
    """`build` without the fields that only other versions of clmoe know."""
    if isinstance(values, dict):
        values = {name: values[name] for name in kind.__dataclass_fields__ if name in values}  # type: ignore[attr-defined]
    return build(kind, values, where)


def _read_table(path: Path, keys: dict[str, Any], values: dict[str, Any]) -> pd.DataFrame:
    """A CSV file (or none) of whole numbers, shares (float), text or given names; the keys identify a row."""
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
        raise ClmoeError(f"{where}: {text!r} is not one of {', '.join(kind)}")
    return text


def _read_expansion(path: Path, order: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`expansion.json` as the tables `Run.expansion` and, where the activations are shares of tokens, `Run.usage`."""
    read = read_json(path) if path.exists() else []
    if not isinstance(read, list):
        raise ClmoeError(f"{path}: expected a list of tasks")
    entries = [_build(_Entry, entry, f"{path}, entry {number}") for number, entry in enumerate(read, start=1)]
    tasks, names = [entry.task for entry in entries], block_names(name for entry in entries for name in entry.blocks)
    if tasks != [task for task in order if task in tasks]:
        found, wanted = ", ".join(tasks), ", ".join(order)
        raise ClmoeError(f"{path}, field 'task': found {found}; list tasks of {wanted}, each once and in this order")
    decisions, shares = [], []
    for entry, name in [(entry, name) for entry in entries for name in names if name in entry.blocks]:
        block = _build(_Block, entry.blocks[name], f"{path}, task {entry.task!r}, block {name!r}")
        key, values = (entry.task, names[name]), block.activations
        experts = len(values) - block.probes
        # the rule itself raises a negative threshold to 0
        decisions.append((*key, block.added, max(values[experts:]), max(block.threshold, 0.0)))
        if min(values) >= 0 and sum(values) > 0:  # mean logits may be negative
            kinds = ["expert"] * experts + ["probe"] * block.probes
            shares += [(*key, e, kinds[e], value / sum(values)) for e, value in enumerate(values)]
    return (
        pd.DataFrame(decisions, columns=["task", "block", "added", "probe", "limit"]),
        pd.DataFrame(shares, columns=["task", "block", "expert", "kind", "share"]),
    )
