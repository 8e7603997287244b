"""What a benchmark is: a YAML file that lists tasks, their files and how they are scored.

::

    name: my-benchmark            # built-in files: the same as the file's name
    root: playground/data/mine    # see below
    prepare: playground           # optional: the builder that `clmoe data prepare` runs for this benchmark
    sources:                      # optional: where files come from, said when one is missing (a file or its folder)
      digits: https://example.org/digits.zip
    recipe:                       # optional: defaults for every method, checked by the configuration, not here
      training: {epochs: 1}
    tasks:                        # in the order "norm"
      - name: digits
        train: digits/train.json  # relative to root, as are test and images
        test: digits/test.json
        images: images
        scorer: short_answer
        max_new_tokens: 16
        note: what should be known about this task    # optional
        suffix: " Answer yes or no."                  # optional: added to every test question
        passes: 3                                     # optional: times training.epochs, 1 by default
        gold: {reader: textvqa, files: [gold.json]}   # optional: expected answers that lie in other files

The data folder is, in this order: the argument ``data_root``, the environment variable ``CLMOE_DATA_ROOT``,
the YAML's ``root``. A relative ``root`` counts from the repository's folder for the files in
``configs/benchmarks/``, and from the YAML's own folder for every other file. This module must stay free of
torch: fast verbs import it.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clmoe.benchmarks.gold import READERS, Gold
from clmoe.config import read_yaml
from clmoe.errors import ClmoeError
from clmoe.utils.names import unknown
from clmoe.utils.paths import checkouts, find_config

ROOT_VARIABLE = "CLMOE_DATA_ROOT"
ORDERS = ("norm", "rev", "rand")

_RESERVED = frozenset({*ORDERS, "all", "after"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_BENCHMARK_KEYS = frozenset({"name", "root", "prepare", "recipe", "tasks", "sources"})
_TASK_KEYS = frozenset(
    {"name", "train", "test", "images", "scorer", "max_new_tokens", "note", "suffix", "passes", "gold"}
)
_DRAWN_BY_CODE = "playground"


@dataclass(frozen=True)
class Task:
    """One task; the paths are absolute.

    Attributes:
        max_new_tokens: limits an answer's length in tokens.
        suffix: added to the text of every test question.
        passes: over the training records, for each of ``training.epochs``.
        gold: files with the expected answers, None where the test file holds them.
    """

    name: str
    train: Path
    test: Path
    image_root: Path
    scorer: str
    max_new_tokens: int
    note: str = ""
    suffix: str = ""
    passes: int = 1
    gold: Gold | None = None

    def half_there(self) -> tuple[Path, Path] | None:
        """The one of training and test file that is there and the one that is not; None with both or neither.

        A builder leaves such a task alone: with its own other half, the task would mix two selections of the data.
        """
        there, lacking = sorted((self.train, self.test), key=lambda path: not path.is_file())
        return (there, lacking) if there.is_file() and not lacking.is_file() else None


@dataclass(frozen=True)
class Benchmark:
    """A sequence of tasks in the order ``norm``.

    Attributes:
        prepare: names the builder of its data, None if users bring them.
        sources: where files come from, by file or folder relative to the root.
    """

    name: str
    tasks: tuple[Task, ...]
    root: Path
    recipe: dict[str, Any]
    prepare: str | None = None
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def built_on_first_use(self) -> bool:
        """Its builder needs no downloads, so that its data need not be there."""
        return self.prepare == _DRAWN_BY_CODE

    def task(self, name: str) -> Task:
        """The task of that name. Raises ClmoeError naming the nearest one."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise ClmoeError(f"benchmark {self.name}: {unknown('task', name, [task.name for task in self.tasks])}")

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
        """(task, field, path) of every training, test and gold file that does not exist."""
        files = [(t.name, field, path) for t in self.tasks for field, path in (("train", t.train), ("test", t.test))]
        files += [(t.name, "gold", path) for t in self.tasks if t.gold is not None for path in t.gold.files]
        return [entry for entry in files if not entry[2].is_file()]

    def source(self, path: Path) -> str | None:
        """Where a file below the root comes from, by the longest entry of ``sources`` that it lies in."""
        below = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else ""
        fitting = [place for place in self.sources if below == place or below.startswith(f"{place}/")]
        return self.sources[max(fitting, key=len)] if fitting else None


def load_benchmark(name_or_yaml: str, data_root: Path | None = None, *, check_files: bool = True) -> Benchmark:
    """Read a benchmark by its name or by the path of a YAML file (a path ends in .yaml/.yml or holds a
    slash).

    With check_files, training and test files must exist. They are not looked for if the data folder does not
    exist and the benchmark is one that is built on first use (the playground): the caller then runs its builder.
    Nothing is built here.

    Raises:
        ClmoeError: unknown name (lists the known ones), broken YAML, unknown key (names the nearest), wrong
        type,
            repeated task, missing file.
    """
    path, base = _find(str(name_or_yaml))
    data = read_yaml(path)
    _check_keys(data, _BENCHMARK_KEYS, str(path))
    name = _text(data, "name", str(path))
    if base != path.parent and name != path.stem:
        raise ClmoeError(f"{path}: field 'name': expected {path.stem!r}, as the file is called, found {name!r}")
    recipe = data.get("recipe") or {}
    if not isinstance(recipe, dict):
        raise ClmoeError(f"{path}: field 'recipe': expected a mapping, found {recipe!r}")
    prepare = _text(data, "prepare", str(path)) if "prepare" in data else None
    root = _data_root(_text(data, "root", str(path)), base, data_root)
    sources = data.get("sources") or {}
    if not isinstance(sources, dict) or not all(isinstance(part, str) for pair in sources.items() for part in pair):
        raise ClmoeError(f"{path}: field 'sources': expected a mapping from files to text, found {sources!r}")
    benchmark = Benchmark(name, _tasks(data.get("tasks"), root, path), root, recipe, prepare, sources)
    if check_files and (root.exists() or not benchmark.built_on_first_use):
        _require_files(benchmark, path)
    return benchmark


def _find(name_or_yaml: str) -> tuple[Path, Path]:
    """The YAML file and the folder from which its relative root counts."""
    if "/" in name_or_yaml and not name_or_yaml.endswith((".yaml", ".yml")):
        raise ClmoeError(f"{name_or_yaml}: a benchmark file's name ends in .yaml")
    path = find_config("benchmarks", name_or_yaml).resolve()
    # A built-in file means the same whether it is named or given by its path.
    homes = [folder for folder in checkouts() if path.parent == folder / "configs" / "benchmarks"]
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
            raise ClmoeError(f"{where}: expected a mapping with {', '.join(sorted(_TASK_KEYS))}, found {entry!r}")
        _check_keys(entry, _TASK_KEYS, where)
        name = _text(entry, "name", where)
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise ClmoeError(f"{where}: field 'name': {name!r} is reserved or not made of letters, digits and . _ -")
        if any(task.name == name for task in tasks):
            raise ClmoeError(f"{where}: field 'name': {name!r} is used twice")
        files = {field: root / _text(entry, field, where) for field in ("train", "test", "images")}
        tasks.append(
            Task(
                name,
                files["train"],
                files["test"],
                files["images"],
                _text(entry, "scorer", where),
                _count(entry, "max_new_tokens", where),
                _text(entry, "note", where) if "note" in entry else "",
                _text(entry, "suffix", where) if "suffix" in entry else "",
                _count(entry, "passes", where) if "passes" in entry else 1,
                _gold(entry["gold"], root, where) if "gold" in entry else None,
            )
        )
    return tuple(tasks)


def _gold(value: Any, root: Path, where: str) -> Gold:
    where = f"{where}: field 'gold'"
    if not isinstance(value, dict):
        raise ClmoeError(f"{where}: expected a mapping with reader and files, found {value!r}")
    _check_keys(value, frozenset({"reader", "files"}), where)
    reader = _text(value, "reader", where)
    if reader not in READERS:
        raise ClmoeError(f"{where}: {unknown('reader', reader, READERS)}")
    files, wanted = value.get("files"), READERS[reader].files
    if not isinstance(files, list) or len(files) != len(wanted) or not all(isinstance(name, str) for name in files):
        raise ClmoeError(f"{where}: reader {reader!r} takes a list of files ({', '.join(wanted)}), found {files!r}")
    return Gold(reader, tuple(root / name for name in files))


def _count(data: dict[str, Any], field: str, where: str) -> int:
    value = data.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ClmoeError(f"{where}: field '{field}': expected a whole number >= 1, found {value!r}")
    return value


def _require_files(benchmark: Benchmark, path: Path) -> None:
    missing = benchmark.missing_files()
    if not missing:
        return
    task, field, file = missing[0]
    more = f" ({len(missing) - 1} more are missing)" if len(missing) > 1 else ""
    fix = f"run `clmoe data prepare {benchmark.name}`" if benchmark.prepare else "put the data there"
    source = benchmark.source(file)
    raise ClmoeError(
        f"{path}: task {task!r}, field '{field}': no file {file}{more}; "
        f"{fix}, or name the data folder in {ROOT_VARIABLE}" + (f". It comes from {source}" if source else "")
    )


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
