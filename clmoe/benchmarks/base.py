"""What a benchmark is: a YAML file that lists tasks, their files and how they are scored.

::

    name: my-benchmark            # built-in files: the same as the file's name
    root: playground/data/mine    # see below
    prepare: playground           # optional: the builder that `clmoe data prepare` runs for this benchmark
    recipe: {epochs: 1}           # optional: training defaults, checked by the configuration, not here
    tasks:                        # in the order "norm"
      - name: digits
        train: digits/train.json  # relative to root, as are test and images
        test: digits/test.json
        images: images
        scorer: exact
        max_new_tokens: 16
        note: what should be known about this task    # optional

The data folder is, in this order: the argument ``data_root``, the environment variable ``CLMOE_DATA_ROOT``,
the YAML's ``root``. A relative ``root`` counts from the repository's folder for the files in
``configs/benchmarks/``, and from the YAML's own folder for every other file. This module must stay free of
torch: fast verbs import it.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clmoe.errors import ClmoeError

ROOT_VARIABLE = "CLMOE_DATA_ROOT"
ORDERS = ("norm", "rev", "rand")

_RESERVED = frozenset({*ORDERS, "all", "after"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_BENCHMARK_KEYS = frozenset({"name", "root", "prepare", "recipe", "tasks"})
_TASK_KEYS = frozenset({"name", "train", "test", "images", "scorer", "max_new_tokens", "note"})


@dataclass(frozen=True)
class Task:
    """One task; the paths are absolute. max_new_tokens limits an answer's length in tokens."""

    name: str
    train: Path
    test: Path
    image_root: Path
    scorer: str
    max_new_tokens: int
    note: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A sequence of tasks in the order ``norm``. ``prepare`` names the builder of its data, None if users
    bring them."""

    name: str
    tasks: tuple[Task, ...]
    root: Path
    recipe: dict[str, Any]
    prepare: str | None = None

    def task(self, name: str) -> Task:
        """The task of that name. Raises ClmoeError naming the nearest one."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise ClmoeError(
            f"benchmark {self.name}: {unknown('task', name, [task.name for task in self.tasks])}"
        )

    def order(self, spec: str, seed: int) -> list[str]:
        """Task names in training order.

        Args:
            spec: ``norm``, ``rev``, ``rand``, or task names separated by commas (a part of the tasks is
            allowed).
            seed: decides ``rand``: tasks are sorted by the SHA-256 of seed and name, so the order is the same
            on
                every platform and Python version.
        """
        names = [task.name for task in self.tasks]
        if spec == "norm":
            return names
        if spec == "rev":
            return names[::-1]
        if spec == "rand":
            return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
        chosen = [self.task(part.strip()).name for part in spec.split(",")]
        repeated = sorted({name for name in chosen if chosen.count(name) > 1})
        if repeated:
            raise ClmoeError(f"order {spec!r}: task {repeated[0]!r} is listed more than once")
        return chosen

    def missing_files(self) -> list[tuple[str, str, Path]]:
        """(task, field, path) of every training and test file that does not exist."""
        files = [
            (t.name, field, path)
            for t in self.tasks
            for field, path in (("train", t.train), ("test", t.test))
        ]
        return [entry for entry in files if not entry[2].is_file()]


def repository_root() -> Path:
    """The folder that holds ``configs/benchmarks``: the checkout that this package lies in, else the current
    folder."""
    checkouts = _checkouts()
    if checkouts:
        return checkouts[0]
    raise ClmoeError(
        "no folder configs/benchmarks found; run from the clmoe checkout, or give the path of a YAML file"
    )


def known_benchmarks() -> list[str]:
    """Names of the benchmarks in ``configs/benchmarks``, sorted."""
    return sorted(path.stem for path in (repository_root() / "configs" / "benchmarks").glob("*.yaml"))


def load_benchmark(
    name_or_yaml: str, data_root: Path | None = None, *, check_files: bool = True
) -> Benchmark:
    """Read a benchmark by its name or by the path of a YAML file (a path ends in .yaml/.yml or holds a
    slash).

    With check_files, training and test files must exist. They are not looked for if the data folder does not
    exist and the benchmark has a builder (``prepare``): the caller then runs the builder. Nothing is built
    here.

    Raises:
        ClmoeError: unknown name (lists the known ones), broken YAML, unknown key (names the nearest), wrong
        type,
            repeated task, missing file.
    """
    path, base = _find(str(name_or_yaml))
    data = _read_yaml(path)
    _check_keys(data, _BENCHMARK_KEYS, str(path))
    name = _text(data, "name", str(path))
    if base != path.parent and name != path.stem:
        raise ClmoeError(
            f"{path}: field 'name': expected {path.stem!r}, as the file is called, found {name!r}"
        )
    recipe = data.get("recipe") or {}
    if not isinstance(recipe, dict):
        raise ClmoeError(f"{path}: field 'recipe': expected a mapping, found {recipe!r}")
    prepare = _text(data, "prepare", str(path)) if "prepare" in data else None
    root = _data_root(_text(data, "root", str(path)), base, data_root)
    benchmark = Benchmark(name, _tasks(data.get("tasks"), root, path), root, recipe, prepare)
    if check_files and (root.exists() or prepare is None):
        _require_files(benchmark, path)
    return benchmark


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """An error text for a name that does not exist: the nearest known one, and all of them."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{guess} Known: {', '.join(options) or 'none'}"


def _checkouts() -> list[Path]:
    folders = (Path(__file__).resolve().parents[2], Path.cwd().resolve())
    return [folder for folder in folders if (folder / "configs" / "benchmarks").is_dir()]


def _find(name_or_yaml: str) -> tuple[Path, Path]:
    """The YAML file and the folder from which its relative root counts."""
    is_path = name_or_yaml.endswith((".yaml", ".yml")) or "/" in name_or_yaml or os.sep in name_or_yaml
    if not is_path:
        root = repository_root()
        path = root / "configs" / "benchmarks" / f"{name_or_yaml}.yaml"
        if not path.is_file():
            raise ClmoeError(
                unknown("benchmark", name_or_yaml, known_benchmarks()) + ", or the path of a YAML file"
            )
        return path, root
    path = Path(name_or_yaml).expanduser().resolve()
    if not path.is_file():
        raise ClmoeError(f"{path}: no such benchmark file")
    # A built-in file means the same whether it is named or given by its path.
    homes = [folder for folder in _checkouts() if path.parent == folder / "configs" / "benchmarks"]
    return path, homes[0] if homes else path.parent


def _data_root(root: str, base: Path, argument: Path | None) -> Path:
    """The argument or the environment variable (relative ones count from the current folder), else the YAML's
    root."""
    override = argument or os.environ.get(ROOT_VARIABLE)
    folder = Path(override).expanduser() if override else base / Path(root).expanduser()
    return Path(os.path.abspath(folder))  # noqa: PTH100 (resolve() would replace users' links to data disks)


def _tasks(entries: Any, root: Path, path: Path) -> tuple[Task, ...]:
    if not isinstance(entries, list) or not entries:
        raise ClmoeError(f"{path}: field 'tasks': expected a list of tasks, found {entries!r}")
    tasks: list[Task] = []
    for index, entry in enumerate(entries):
        where = f"{path}: tasks[{index}]"
        if not isinstance(entry, dict):
            raise ClmoeError(
                f"{where}: expected a mapping with {', '.join(sorted(_TASK_KEYS))}, found {entry!r}"
            )
        _check_keys(entry, _TASK_KEYS, where)
        name = _text(entry, "name", where)
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise ClmoeError(
                f"{where}: field 'name': {name!r} is reserved or not made of letters, digits and . _ -"
            )
        if any(task.name == name for task in tasks):
            raise ClmoeError(f"{where}: field 'name': {name!r} is used twice")
        files = {field: root / _text(entry, field, where) for field in ("train", "test", "images")}
        limit = entry.get("max_new_tokens")
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ClmoeError(
                f"{where}: field 'max_new_tokens': expected a whole number >= 1, found {limit!r}"
            )
        note = _text(entry, "note", where) if "note" in entry else ""
        scorer = _text(entry, "scorer", where)
        tasks.append(Task(name, files["train"], files["test"], files["images"], scorer, limit, note))
    return tuple(tasks)


def _require_files(benchmark: Benchmark, path: Path) -> None:
    missing = benchmark.missing_files()
    if not missing:
        return
    task, field, file = missing[0]
    more = f" ({len(missing) - 1} more are missing)" if len(missing) > 1 else ""
    fix = f"run `clmoe data prepare {benchmark.name}`" if benchmark.prepare else "put the data there"
    raise ClmoeError(
        f"{path}: task {task!r}, field '{field}': no file {file}{more}; "
        f"{fix}, or name the data folder in {ROOT_VARIABLE}"
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ClmoeError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ClmoeError(
            f"{path}: expected a mapping with {', '.join(sorted(_BENCHMARK_KEYS))}, found {data!r}"
        )
    return data


def _check_keys(data: dict[Any, Any], allowed: frozenset[str], where: str) -> None:
    for key in data:
        if key not in allowed:
            raise ClmoeError(f"{where}: {unknown('key', str(key), allowed)}")


def _text(data: dict[str, Any], field: str, where: str) -> str:
    value = data.get(field)
    if not isinstance(value, str) or not value.strip():
        found = f"found {value!r}" if field in data else "the field is missing"
        raise ClmoeError(f"{where}: field '{field}': expected some text, {found}")
    return value
