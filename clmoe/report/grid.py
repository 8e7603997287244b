"""Grids: runs that belong together, described in ``configs/grids.yaml``, and how each of them is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clmoe.benchmarks.base import load_benchmark
from clmoe.config import build, dump_config, load_config, read_yaml
from clmoe.errors import ClmoeError
from clmoe.utils.names import unknown
from clmoe.utils.paths import known_configs, repository_root


@dataclass(frozen=True)
class Row:
    """One variant, run once for each seed.

    Attributes:
        label: how tables name it, and the stem of its run folders.
        method: the method's script; the label where empty.
        config: file of ``configs/methods``, where it is not the method's.
        order: of the tasks, as for ``clmoe train``; empty: the environment's ORDER.
        set: overrides, ``key=value``.
        of: label of the row whose checkpoints are evaluated again; nothing is trained.
        router: with ``of``: how a question's task is chosen.
    """

    label: str
    method: str = ""
    config: str = ""
    order: str = ""
    set: list[str] = field(default_factory=list)
    of: str = ""
    router: str = ""

    @property
    def settings(self) -> tuple[object, ...]:
        """All but the label: rows with equal settings are the same run."""
        return (self.script, self.config or self.script, self.order, tuple(sorted(self.set)), self.of, self.router)

    @property
    def script(self) -> str:
        return "" if self.of else self.method or self.label

    def folder(self, out: Path, seed: int) -> Path:
        """Its run folder below ``out``."""
        return out / f"{self.label}-seed{seed}"


@dataclass(frozen=True)
class Grid:
    """Rows in sections, each section a table whose first row the others are compared with."""

    name: str
    title: str
    sections: dict[str, list[Row]]

    @property
    def rows(self) -> list[Row]:
        """Every row once, in the order of the sections."""
        return list({row.label: row for rows in self.sections.values() for row in rows}.values())


def default_file() -> Path:
    """The grids that come with the repository."""
    return repository_root() / "configs" / "grids.yaml"


def read_grids(path: Path) -> dict[str, Grid]:
    """All grids of a file, by name.

    Raises:
        ClmoeError: an unknown key or label, a row that is neither trained nor evaluated again, or two labels for the
            same settings.
    """
    values = read_yaml(path)
    rows = _rows(path, _mapping(path, "rows", values.get("rows")))
    grids = {}
    for name, grid in _mapping(path, "grids", values.get("grids")).items():
        where = f"{path}: grids.{name}"
        content = _mapping(path, f"grids.{name}", grid)
        sections = {}
        for title, labels in _mapping(path, f"grids.{name}.sections", content.get("sections")).items():
            for label in labels:
                if label not in rows:
                    raise ClmoeError(f"{where}.sections: {unknown('row', str(label), rows)}")
            sections[title] = [rows[label] for label in labels]
        grids[name] = Grid(name, str(content.get("title", name)), sections)
        listed = {row.label for row in grids[name].rows}
        for row in grids[name].rows:
            if row.of and row.of not in listed:
                raise ClmoeError(f"{where}: {row.label} evaluates the checkpoints of {row.of}: list that row too")
    return grids


def _mapping(path: Path, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ClmoeError(f"{path}: {key} must be a mapping, found {value!r}")
    return value


def _rows(path: Path, values: dict[str, Any]) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for label, fields in values.items():
        row = build(Row, {"label": label, **_mapping(path, f"rows.{label}", fields)}, f"{path}: rows.{label}")
        if row.of and (row.method or row.config or row.order):
            raise ClmoeError(f"{path}: rows.{label}: with 'of', method, config and order are those of {row.of}")
        if row.router and not row.of:
            raise ClmoeError(f"{path}: rows.{label}: 'router' needs 'of', the row whose checkpoints it evaluates")
        rows[label] = row
    seen: dict[tuple[object, ...], str] = {}
    for row in rows.values():
        if row.of and row.of not in rows:
            raise ClmoeError(f"{path}: rows.{row.label}.of: {unknown('row', row.of, rows)}")
        if row.of and rows[row.of].of:
            raise ClmoeError(
                f"{path}: rows.{row.label}: {row.of} has no checkpoints of its own; name {rows[row.of].of}"
            )
        if row.settings in seen:
            raise ClmoeError(f"{path}: rows.{row.label} and rows.{seen[row.settings]} are the same run; keep one label")
        seen[row.settings] = row.label
    return rows


def repeats(
    rows: Sequence[Row], benchmark: str, overrides: list[str], environment: Mapping[str, str]
) -> dict[str, str]:
    """Rows that would train once more what an earlier row trains: label -> that row's label.

    Settings that differ in the file may be equal on a benchmark, with these overrides and this ORDER. LLaVA-CMoE's
    scripts take the initial experts from warm-up data where WARMUP names some (the embedded benchmark has its own), and
    else from the first task. A row whose checkpoints another one evaluates is never left out.
    """
    recipe = load_benchmark(benchmark, check_files=False).recipe
    warm = environment.get("WARMUP", "its own" if _embedded(benchmark) else "")
    evaluated = {row.of for row in rows}
    first: dict[tuple[str, str], str] = {}
    again: dict[str, str] = {}
    for row in rows:
        if row.of:
            continue
        source = row.config or row.script
        choice = "initial_experts_from" in load_config(source, recipe, []).options
        given = ["options.initial_experts_from=warmup"] if choice and warm else []
        config = load_config(source, recipe, [*given, *row.set, *overrides, "label=any"])
        key = (row.order or environment.get("ORDER") or "norm", dump_config(config))
        if first.setdefault(key, row.label) != row.label and row.label not in evaluated:
            again[row.label] = first[key]
    return again


@dataclass(frozen=True)
class Start:
    """How a run is started: a script with arguments, and environment variables besides the caller's."""

    command: list[str]
    environment: dict[str, str]


def start(row: Row, rows: dict[str, Row], benchmark: str, seed: int, out: Path, overrides: list[str]) -> Start:
    """The script that trains and evaluates the row, or that evaluates another row's checkpoints again.

    Args:
        rows: the grid's rows by label.
        overrides: after the row's own, so that they win.
    """
    arguments = [f"label={row.label}", *row.set, *overrides]
    environment = {"OUT": str(row.folder(out, seed))}
    if row.of:
        source = rows[row.of]
        environment |= {"RUN": str(source.folder(out, seed)), **_order(source)}
        router = ["--router", row.router] if row.router else []
        evaluated = [a for a in arguments if a.startswith(("label=", "options.", "evaluation."))]
        return Start(["bash", "scripts/eval.sh", benchmark, *router, *evaluated], environment)
    environment |= {"SEED": str(seed), "BENCHMARK": benchmark, **_order(row)}
    if row.config:
        environment["METHOD"] = row.config
    return Start(["bash", *_script(row, benchmark), *arguments], environment)


def _order(row: Row) -> dict[str, str]:
    return {"ORDER": row.order} if row.order else {}


def _embedded(benchmark: str) -> bool:
    return benchmark.startswith("playground-")


def _script(row: Row, benchmark: str) -> list[str]:
    """The method's own script on the benchmark, else the one for any method and benchmark."""
    room = "playground" if _embedded(benchmark) else benchmark
    own = f"scripts/{room}/{row.script}.sh"
    if (repository_root() / own).is_file():
        return [own]
    name = row.config or row.script
    if name not in known_configs("methods"):
        raise ClmoeError(f"row {row.label}: {unknown('method', name, known_configs('methods'))}")
    return ["scripts/benchmark.sh", benchmark, name]
