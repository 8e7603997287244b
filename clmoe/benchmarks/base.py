"""What a benchmark is: a YAML file that lists tasks, their files and how they are scored.

docs/benchmarks.md describes the file. The data folder is the argument ``data_root``, else the environment variable
``CLMOE_DATA_ROOT``, else the file's ``root``. Relative paths are relative to the current folder, with one exception:
the ``root`` of a user's own YAML file is relative to that file's folder.
"""

import hashlib
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import Any, Literal

from clmoe.benchmarks.gold import READERS, Gold, read_gold
from clmoe.config import build, check_recipe, read_yaml
from clmoe.data.batches import epoch_permutation
from clmoe.data.formats import COLUMNS, TABLES, Kind, Raw, placeholders
from clmoe.data.records import IMAGE_MARK, Failed, Fits, OnBad, Question, TrainRecord, load_questions, load_train
from clmoe.data.rows import END, Seen, ranges
from clmoe.errors import ClmoeError
from clmoe.utils.names import unknown
from clmoe.utils.paths import find_config, shipped_root

COMPARABLE: dict[str, Any] = {"adapter": {"rank": 64, "scale": 2.0, "train_projector": False}}
"""What the shipped methods share on a benchmark: updates of equal size, on parts that every method can train.

On a published benchmark, methods keep the adapters of their papers, which differ in all three.
"""
ROOT_VARIABLE = "CLMOE_DATA_ROOT"
ORDERS = ("norm", "rev", "rand")
MADE = ("train.json", "test.json")  # made from raw files, in prepared/<task> below the root

_RESERVED = (*ORDERS, "all", "after", "zero_shot")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


PAIRED = ("mme",)
"""Scorers that need all questions about an image: a sample of the questions would give a different score."""


@dataclass(frozen=True)
class Task:
    """One task, with absolute paths. ``suffix`` ends its questions; ``passes`` over its records make an epoch.

    ``text_rows``: rows without an image are intended, even if most rows have one. ``raw``: files in other formats from
    which ``train`` and ``test`` are made. ``general``: a set of general ability, which is asked but never trained on;
    it has no training file.
    """

    name: str
    train: Path
    test: Path
    image_root: Path
    scorer: str
    max_new_tokens: int
    suffix: str = ""
    passes: int = 1
    gold: Gold | None = None
    text_rows: bool = False
    raw: Raw | None = None
    general: bool = False

    @property
    def made(self) -> tuple[tuple[Kind, Path], ...]:
        """The training and test files, which raw files are made into; a set of general ability has only the latter."""
        test: tuple[Kind, Path] = ("test", self.test)
        return (test,) if self.general else (("train", self.train), test)

    @property
    def files(self) -> list[tuple[str, Path]]:
        """Field and path of every file that is read, except images; raw files only until they have been prepared."""
        gold, found = self.gold.files if self.gold else (), list[tuple[str, Path]]()
        for kind, path in self.made:
            raw = () if self.raw is None or path.is_file() else self.raw.files(kind)
            found += [(f"raw.{kind}", file) for file in raw] or [(kind, path)]
        return found + [("gold", path) for path in gold]

    def sample(self, limit: int | None) -> int | None:
        """How many of its questions are asked under a ``limit``; None: all."""
        return None if self.scorer in PAIRED else limit

    @property
    def half_there(self) -> str:
        """Why a builder leaves the task alone: one of its files exists, and a new one would not match it."""
        there, lacking = sorted((self.train, self.test), key=lambda path: not path.is_file())
        if lacking.is_file() or not there.is_file():
            return ""
        return f"{self.name}: not built, {there} exists without {lacking.name}: delete it, or provide both"


@dataclass(frozen=True)
class Benchmark:
    """Tasks in the order ``norm``. ``sources``: where files come from, by file or folder relative to the root.

    ``general``: sets that are asked before training and after each task, if ``evaluation.general`` is set.
    """

    name: str
    tasks: tuple[Task, ...]
    root: Path
    recipe: dict[str, Any]
    prepare: str | None = None
    sources: dict[str, str] = field(default_factory=dict)
    general: tuple[Task, ...] = ()

    @property
    def built_on_first_use(self) -> bool:
        """Its builder needs no downloads, so its data need not exist yet."""
        return self.prepare == "playground"

    @property
    def inputs(self) -> list[Path]:
        """What no command may write to: all files, and the image folders, each given by a file in it."""
        tasks = [*self.tasks, *self.general]
        files = [path for task in tasks for _, path in task.files]
        files += [path for task in tasks if task.raw is not None for path in (*task.raw.train, *task.raw.test)]
        return files + [task.image_root / "image" for task in tasks]

    def task(self, name: str) -> Task:
        """The task of that name. Raises ClmoeError, naming the nearest one, if there is none."""
        by_name = {task.name: task for task in self.tasks}
        if name not in by_name:
            raise ClmoeError(f"benchmark {self.name}: {unknown('task', name, by_name)}")
        return by_name[name]

    def sets(self, names: Collection[str] | None = None) -> list[Task]:
        """The tasks and sets of general ability with these names; None: all tasks, and the sets if the recipe asks.

        Raises ClmoeError for an unknown name.
        """
        if names is None:
            names = self.asked([task.name for task in self.tasks], self.recipe.get("evaluation", {}).get("general"))
        known = {task.name: task for task in self.general}
        wanted = {(known.get(name) or self.task(name)).name for name in names}
        return [task for task in (*self.tasks, *self.general) if task.name in wanted]

    def asked(self, order: Sequence[str], general: bool | None) -> list[str]:
        """The names of these tasks and, with ``general``, of the sets of general ability."""
        return [*order, *(task.name for task in self.general if general)]

    def order(self, spec: str, seed: int) -> list[str]:
        """Task names: ``norm``, ``rev``, ``rand`` (by the SHA-256 of seed and name), or some, separated by commas."""
        names = [task.name for task in self.tasks]
        if spec in ("norm", "rev"):
            return names if spec == "norm" else names[::-1]
        if spec == "rand":
            return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
        return self.named([part.strip() for part in spec.split(",")], f"order {spec!r}")

    def named(self, names: Sequence[str], where: str) -> list[str]:
        """These task names. Raises ClmoeError, naming ``where``, unless all are known and none is repeated."""
        for name in names:
            if names.count(self.task(name).name) > 1:
                raise ClmoeError(f"{where}: task {name!r} is listed more than once")
        return list(names)

    def missing_files(self, tasks: Collection[str] | None = None) -> list[str]:
        """A line for every file of these ``sets`` that does not exist: task, field, path and source."""
        lines = []
        for task in self.sets(tasks):
            for kind, path in task.files:
                if not (path.is_file() or (kind.startswith("raw.") and path.is_dir())):
                    source = f", from {self.source(path)}" if self.source(path) else ""
                    lines.append(f"task {task.name!r}, field '{kind}': no file {path}{source}")
        return lines

    def require_files(self, tasks: Collection[str] | None = None) -> None:
        """Raise ClmoeError naming the first missing file of these ``sets``, its task, field and source."""
        missing = self.missing_files(tasks)
        if missing:
            more = f" ({len(missing) - 1} more are missing)" if len(missing) > 1 else ""
            fix = f"run `clmoe data prepare {self.name}`" if self.prepare else "put the data there"
            folder = f"name the data folder with --data or {ROOT_VARIABLE}"
            raise ClmoeError(f"benchmark {self.name}: {missing[0]}{more}; {fix}, or {folder}")

    def source(self, path: Path) -> str | None:
        """Where a file below the root comes from: the longest entry of ``sources`` that it lies in."""
        below = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else ""
        fitting = [place for place in self.sources if below == place or below.startswith(f"{place}/")]
        return self.sources[max(fitting, key=len)] if fitting else None


# ---- the YAML file ----


@dataclass(frozen=True)
class _GoldEntry:
    reader: str = ""
    files: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _RawEntry:
    train: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    image: str = ""
    instruction: str = ""


@dataclass(frozen=True)
class _TaskEntry:
    name: str = ""
    train: str = ""
    test: str = ""
    images: str = ""
    scorer: str = ""
    max_new_tokens: int = 0
    note: str = ""  # for readers of the file
    suffix: str = ""
    passes: int = 1
    gold: _GoldEntry | None = None
    text_rows: bool = False
    raw: _RawEntry | None = None


@dataclass(frozen=True)
class _BenchmarkEntry:
    name: str = ""
    root: str = ""
    prepare: Literal["playground", "coin", "cl4vqa"] | None = None
    adapters: Literal["comparable", "published"] = "comparable"
    recipe: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    tasks: list[_TaskEntry] = field(default_factory=list)
    general: list[_TaskEntry] = field(default_factory=list)


def load_benchmark(name_or_yaml: str, data_root: Path | None = None, *, check_files: bool = True) -> Benchmark:
    """Read a benchmark by its name or by the path of a YAML file (which ends in .yaml or .yml).

    Raises ClmoeError for an unknown name or key (naming the nearest), broken YAML, a wrong type, a repeated task and,
    with ``check_files``, a missing file, unless ``open_benchmark`` builds them all.
    """
    path = find_config("benchmarks", name_or_yaml).resolve()
    built_in = path.parent == (shipped_root() / "configs" / "benchmarks").resolve()
    where = f"{path}: benchmark"
    entry = build(_BenchmarkEntry, read_yaml(path), where)
    _require(entry, ("name", "root", "tasks"), where)
    check_recipe(entry.recipe, f"{where}.recipe")
    given = data_root or os.environ.get(ROOT_VARIABLE)
    folder = Path.cwd() if given or built_in else path.parent
    root = Path(os.path.abspath(folder / Path(given or entry.root).expanduser()))  # noqa: PTH100 (keeps users' links)
    listed = tuple(_task(task, root, f"{where}.tasks[{index}]") for index, task in enumerate(entry.tasks))
    general = tuple(
        _task(task, root, f"{where}.general[{index}]", general=True) for index, task in enumerate(entry.general)
    )
    places = [f"{kind}[{index}]" for kind in ("tasks", "general") for index in range(len(getattr(entry, kind)))]
    names = [task.name for task in (*listed, *general)]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ClmoeError(f"{where}.{places[index]}.name: {name!r} is used twice")
    asks = {"evaluation": {"general": True} | entry.recipe.get("evaluation", {})} if general else {}
    recipe = entry.recipe | asks | ({"comparable": COMPARABLE} if entry.adapters == "comparable" else {})
    benchmark = Benchmark(entry.name, listed, root, recipe, entry.prepare, entry.sources, general)
    if check_files and (root.exists() or not benchmark.built_on_first_use):
        benchmark.require_files()
    return benchmark


def _task(entry: _TaskEntry, root: Path, where: str, *, general: bool = False) -> Task:
    files = () if entry.raw else ("test",) if general else ("train", "test")
    _require(entry, ("name", *files, "images", "scorer", "max_new_tokens"), where)
    if general and (entry.train or (entry.raw and entry.raw.train) or entry.passes > 1):
        raise ClmoeError(f"{where}: a set of general ability is never trained on: remove 'train' and 'passes'")
    if not _NAME.fullmatch(entry.name) or entry.name in _RESERVED:
        raise ClmoeError(f"{where}.name: {entry.name!r} is reserved, or has characters other than A-Z a-z 0-9 . _ -")
    for field_name in ("max_new_tokens", "passes"):
        if (value := getattr(entry, field_name)) < 1:
            raise ClmoeError(f"{where}.{field_name}: {value} is out of range, it must be at least 1")
    for kind, name in (("train", entry.train), ("test", entry.test)):
        if name.endswith(TABLES):
            raise ClmoeError(f"{where}.{kind}: {name!r} is not LLaVA's JSON; write it as {where}.raw.{kind}: [{name}]")
    made = root / "prepared" / entry.name
    train, test = (
        root / name if name else made / file for name, file in zip((entry.train, entry.test), MADE, strict=True)
    )
    gold, images = None, root / entry.images
    if entry.gold is not None:
        name, given = entry.gold.reader, entry.gold.files
        if name not in READERS:
            raise ClmoeError(f"{where}.gold: {unknown('reader', name, READERS)}")
        if len(given) != len(READERS[name].files):
            takes = ", ".join(READERS[name].files)
            raise ClmoeError(f"{where}.gold.files: reader {name!r} takes {takes}, found {given!r}")
        gold = Gold(name, tuple(root / file for file in given))
    if END in entry.suffix or IMAGE_MARK in entry.suffix:
        raise ClmoeError(f"{where}.suffix: {entry.suffix!r} holds {END} or {IMAGE_MARK}; remove it")
    texts = (entry.scorer, entry.max_new_tokens, entry.suffix, entry.passes)
    raw = None if entry.raw is None else _raw(entry.raw, root, f"{where}.raw", general=general)
    if raw is not None and {train, test} & {*raw.train, *raw.test}:
        raise ClmoeError(f"{where}: 'train' and 'test' are made from the raw files; give them different names")
    return Task(entry.name, train, test, images, *texts, gold, entry.text_rows, raw, general)


def _raw(entry: _RawEntry, root: Path, where: str, *, general: bool) -> Raw:
    """Files in other formats; a name with ``*`` stands for all files that it matches, sorted by name."""
    _require(entry, ("test",) if general else ("train", "test"), where)
    for name, column in entry.columns.items():
        if name not in COLUMNS or not isinstance(column, str):
            raise ClmoeError(
                f"{where}.columns: {unknown('column', str(name), COLUMNS)}; give each the name that the files use"
            )
    try:
        placeholders(entry.image)
    except ValueError as error:
        raise ClmoeError(f"{where}.image: {entry.image!r}: {error}; write it as in {{image_id}}.png") from error
    if END in entry.instruction or IMAGE_MARK in entry.instruction:
        raise ClmoeError(f"{where}.instruction: {entry.instruction!r} holds {END} or {IMAGE_MARK}; remove it")

    def files(names: list[str]) -> tuple[Path, ...]:
        fitting = [sorted(glob(str(root / name))) if "*" in name else [] for name in names]  # noqa: PTH207
        return tuple(root / path for name, found in zip(names, fitting, strict=True) for path in found or [name])

    return Raw(files(entry.train), files(entry.test), entry.columns, entry.image, entry.instruction)


_EXAMPLES = {
    "name": "pets",
    "root": "data/pets",
    "tasks": "[{name: pets, ...}]",
    "train": "pets/train.json",
    "test": "pets/test.json",
    "images": "pets/images",
    "scorer": "short_answer",
    "max_new_tokens": "16",
}


def _require(entry: _BenchmarkEntry | _TaskEntry | _RawEntry, fields: Sequence[str], where: str) -> None:
    for name in fields:
        if not getattr(entry, name):
            example = f"[{_EXAMPLES[name]}]" if isinstance(entry, _RawEntry) else _EXAMPLES[name]
            raise ClmoeError(f"{where}.{name}: missing or empty; write it as in `{name}: {example}`")


# ---- the rows ----


def training_record(row: dict[str, Any], answer: str) -> dict[str, Any]:
    """The training row that asks what a test row asks."""
    turns = [{"from": "human", "value": f"<image>\n{row['text']}"}, {"from": "gpt", "value": answer}]
    return {"id": str(row["question_id"]), "image": row["image"], "conversations": turns}


def train_records(
    task: Task, on_bad: OnBad = "error", fits: Fits | None = None, seen: Seen | None = None
) -> Sequence[TrainRecord]:
    """The task's training records. Raises ClmoeError as ``load_train`` does, and for ``images_missing``."""
    seen = Seen() if seen is None else seen
    records = load_train(task.train, task.image_root, on_bad, fits, seen)
    if problem := images_missing(task, task.train, seen):
        raise ClmoeError(problem)
    return records


def task_questions(task: Task, *, images: bool = True, seen: Seen | None = None) -> list[Question]:
    """The questions of the task's test and gold files. Raises ClmoeError naming file and row, or gold file and id."""
    seen = Seen() if seen is None else seen
    answered = task.gold is None
    questions = load_questions(task.test, task.image_root, answered=answered, images=images, seen=seen)
    if problem := images_missing(task, task.test, seen):
        raise ClmoeError(problem)
    return complete(task, questions)


def images_missing(task: Task, file: Path, seen: Seen) -> str | None:
    """Why the file's rows without an image are an error: most have one, and nothing says that these need none."""
    without = seen.without_image
    if task.text_rows or not 0 < len(without) < seen.rows / 2:
        return None
    rows = f"{len(without)} of {seen.rows} rows ({ranges(without)}), field 'image': missing, where most rows have one"
    fix = f"add the images or, if these rows need none, write `text_rows: true` at task {task.name!r} in the YAML file"
    return f"{file}: {rows}; {fix}"


def complete(task: Task, questions: Sequence[Question], failed: Failed | None = None) -> list[Question]:
    """Questions of a test file with the gold files' answers and the suffix; ``failed`` as in ``read_gold``."""
    if task.gold is not None:
        questions = read_gold(task.gold, questions, failed)
    return [replace(question, text=question.text + task.suffix) for question in questions]


def sampled(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """``limit`` of the questions (None: all), in their order, from the whole file, which may be sorted by difficulty.

    The choice depends only on how many there are: every stage of every run asks the same ones, and a smaller sample is
    part of a larger one.
    """
    return [questions[row] for row in sorted(epoch_permutation(0, 0, len(questions))[:limit].tolist())]
