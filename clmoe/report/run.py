"""Reading run folders, and grouping the runs of one variant over its seeds.

A run folder holds `run.json` (what was run), `matrix.csv` (scores), and optionally `immediate.csv` (scores
right after each task with the router known), `timing.json` ({"minutes": float}), and the files described in
`clmoe.report.records`. Metrics are always computed from the matrix, so that a report cannot show a stale
figure; `metrics.json` is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clmoe.errors import ClmoeError
from clmoe.evaluate.matrix import AccuracyMatrix, Scores, Spread, mean_spread, metrics, read_immediate_csv
from clmoe.evaluate.rules.base import MODES
from clmoe.methods import method_class
from clmoe.report.reading import check_field, read_json
from clmoe.report.records import (
    BlockUsage,
    Located,
    TaskExpansion,
    TaskParameters,
    read_expansion,
    read_located,
    read_parameters,
    read_usage,
)

# Field of run.json -> types allowed.
_FIELDS: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "benchmark": (str,),
    "order": (list,),
    "seed": (int,),
    "label": (str,),
    "trainable_parameters": (int,),
    "adapter_parameters": (int,),
    "projector_trained": (bool,),
    "effective_scale": (int, float, type(None)),
    "steps_per_task": (int,),
    "limit": (int, type(None)),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One finished or unfinished sequence. Scores and metrics are in percent, `minutes` is wall time.

    `limit` is the number of test questions per task in rows before the last; None is all of them, or an older run that
    did not record it.
    `parameters`, `expansion`, `usage` and `located` are empty where the run folder lacks their file.
    """

    path: Path
    label: str
    method: str
    benchmark: str
    scoring: str
    limit: int | None
    order: tuple[str, ...]
    seed: int
    trainable_parameters: int
    adapter_parameters: int
    projector_trained: bool
    effective_scale: float | None
    steps_per_task: int
    matrix: AccuracyMatrix
    immediate: Scores | None
    metrics: dict[str, float | None]
    minutes: float | None
    parameters: tuple[TaskParameters, ...]
    expansion: tuple[TaskExpansion, ...]
    usage: tuple[BlockUsage, ...]
    located: tuple[Located, ...]

    @property
    def name(self) -> str:
        return f"{self.label}, seed {self.seed}"

    @property
    def chain(self) -> str:
        """`clmoe.methods.base.Method.chain` of the run's method: `sequence`, or else it is a bound."""
        try:
            return method_class(self.method).chain
        except ClmoeError:  # a run of another version, or of a method that is not here
            return "sequence"

    @property
    def complete(self) -> bool:
        """The last task was evaluated after the last training."""
        return self.matrix.cell(len(self.order), len(self.order)) is not None

    def scores(self, row: str) -> dict[str, float | None]:
        """Scores by task of one kind of row: a row label of the matrix, `immediate` or `immediate_known`."""
        n = len(self.order)
        if row == "immediate":
            values: Scores = tuple(self.matrix.cell(i, i) for i in range(1, n + 1))
        elif row == "immediate_known":
            values = self.immediate or (None,) * n
        else:
            values = self.matrix.row(self.order[-1] if row == "last" else row)
        return dict(zip(self.order, values, strict=True))


@dataclass(frozen=True, slots=True)
class Group:
    """The runs of one label, ordered by seed."""

    label: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    def metric(self, name: str) -> Spread:
        """Mean and spread of one metric over the seeds."""
        return mean_spread([run.metrics[name] for run in self.runs])

    def task_score(self, row: str, task: str) -> Spread:
        """Mean and spread over the seeds of one task's score in that kind of row (see `Run.scores`)."""
        return mean_spread([run.scores(row)[task] for run in self.runs])

    def field(self, name: str) -> Spread:
        """Mean and spread over the seeds of a number stored with the run, e.g. `trainable_parameters`."""
        return mean_spread([getattr(run, name) for run in self.runs])


def read_run(folder: Path) -> Run:
    """Read one run folder.

    Raises:
        ClmoeError: a file is missing or malformed (file and field are named), or the columns of the matrix
            are not the tasks of the run's order.
    """
    info = {"limit": None} | read_json(folder / "run.json", dict)  # older runs do not say
    for field, types in _FIELDS.items():
        check_field(folder / "run.json", info, field, types)
    if not all(isinstance(task, str) for task in info["order"]):
        raise ClmoeError(f"{folder / 'run.json'}: field 'order' must be a list of task names")
    scoring = info.get("scoring", "fixed")
    if scoring not in MODES:
        raise ClmoeError(f"{folder / 'run.json'}: field 'scoring' is {scoring!r}; allowed: {', '.join(MODES)}")
    matrix = AccuracyMatrix.read_csv(folder / "matrix.csv")
    order = tuple(info["order"])
    if matrix.tasks != order:
        raise ClmoeError(
            f"{folder / 'matrix.csv'}, header: columns {', '.join(matrix.tasks)} are not the order "
            f"in run.json ({', '.join(order)})"
        )
    known = folder / "immediate.csv"
    immediate = read_immediate_csv(known, order) if known.exists() else None
    return Run(
        path=folder,
        scoring=scoring,
        order=order,
        matrix=matrix,
        immediate=immediate,
        metrics=metrics(matrix, immediate),
        minutes=_read_minutes(folder / "timing.json"),
        parameters=read_parameters(folder / "parameters.csv", order),
        expansion=read_expansion(folder / "expansion.json", order),
        usage=read_usage(folder / "usage.csv", order),
        located=read_located(folder / "locator.csv", order),
        **{field: info[field] for field in _FIELDS if field != "order"},
    )


def group_runs(folders: Sequence[Path]) -> list[Group]:
    """Read run folders and group them by label, labels in the order given and runs by seed.

    Raises:
        ClmoeError: no folder, a label with the same seed twice, or runs that cannot stand in one table
            because benchmark, scoring mode or set of tasks differ.
    """
    if not folders:
        raise ClmoeError("no run folder given")
    runs = [read_run(folder) for folder in folders]
    first = runs[0]
    for run in runs[1:]:
        for what, ours, theirs in (
            ("benchmark", first.benchmark, run.benchmark),
            ("scoring", first.scoring, run.scoring),
            ("tasks", sorted(first.order), sorted(run.order)),
        ):
            if ours != theirs:
                raise ClmoeError(
                    f"{run.path} and {first.path} differ in {what} ({theirs} / {ours}); "
                    "one report compares like with like"
                )
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        seeds = groups.setdefault(run.label, {})
        if run.seed in seeds:
            raise ClmoeError(
                f"{run.path} and {seeds[run.seed].path} both hold {run.name}; give each variant its own "
                "'label' in run.json, or leave one out"
            )
        seeds[run.seed] = run
    return [Group(label, tuple(seeds[seed] for seed in sorted(seeds))) for label, seeds in groups.items()]


def _read_minutes(path: Path) -> float | None:
    if not path.exists():
        return None
    info = read_json(path, dict)
    check_field(path, info, "minutes", (int, float))
    return float(info["minutes"])
