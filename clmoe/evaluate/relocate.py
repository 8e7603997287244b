"""A finished run under other locators: trains nothing, and asks again only questions assigned to another task.

The answers become cells of the run folder, as ``clmoe eval ... locator=NAME`` makes them. What each locator stores and
how long it takes is measured once and kept in ``locators.json``.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Self

from peft import PeftModel

from clmoe.bases.llava import LoadedBase
from clmoe.benchmarks.base import Benchmark
from clmoe.config import Config, LocatorConfig, reload_config
from clmoe.errors import ClmoeError
from clmoe.evaluate.answer import Answerer, fit_tasks, open_answerer
from clmoe.evaluate.matrix import AccuracyMatrix, metrics
from clmoe.evaluate.run import Cell, fill_cells
from clmoe.experts.model import detach_adapter
from clmoe.locators import LOCATORS, make_locator
from clmoe.locators.base import FILE as LOCATOR_FILE
from clmoe.locators.base import Asked, Locator
from clmoe.methods import method_class
from clmoe.train.checkpoint import CONFIG, Finished, checkpoint_folders, read_checkpoint
from clmoe.utils.files import read_json, read_json_lines, write_json
from clmoe.utils.processes import from_main

COSTS = "locators.json"
TIMED = 64  # questions of the newest task


@dataclass(frozen=True)
class Cost:
    """What a locator costs with all tasks of a run.

    Attributes:
        numbers, bytes: how much it stores.
        feature_ms, decision_ms: per question, for its feature (batched, nothing kept) and for the scores of all tasks.
    """

    numbers: int
    bytes: int
    feature_ms: float
    decision_ms: float


@dataclass(frozen=True)
class Found:
    """What a run reaches with one locator: ``metrics`` in percent, see ``clmoe.evaluate.matrix``.

    ``confusion``: at the end of the run, task -> task that a question was assigned to -> number of questions.
    """

    locator: str
    metrics: dict[str, float | None]
    confusion: dict[str, Counter[str]]
    cost: Cost

    @property
    def located(self) -> float:
        """Percent of all questions that were assigned to their own task."""
        right = sum(counts[task] for task, counts in self.confusion.items())
        return 100 * right / sum(counts.total() for counts in self.confusion.values())


def usable_locators(method: str) -> list[str]:
    """All locators except those that need what the method has not taught the model: letters, or prototypes."""
    taught = method_class(method)
    letters, prototypes = taught.letters, taught.prototypes_learned
    return [name for name, kind in LOCATORS.items() if (letters or not kind.asks) and (prototypes or not kind.learned)]


def finished_method(run: Path) -> str:
    """The method of a finished run. Raises ClmoeError for another folder, or a method that keeps no parts per task."""
    if not (run / "run.json").is_file():
        raise ClmoeError(f"{run} holds no run: `clmoe run METHOD BENCHMARK --output {run}` trains it")
    info = read_json(run / "run.json")
    method = str(info["method"])
    if not method_class(method).keeps_parts:
        raise ClmoeError(f"{run}: method {method} keeps no parts per task, so no locator makes a difference")
    if missing := [folder.name for folder in checkpoint_folders(run, info["order"]) if not folder.is_dir()]:
        raise ClmoeError(f"{run} is not finished, {missing[0]} is missing: repeat the command that started it")
    return method


def own_locator(run: Path) -> str:
    """The locator that a finished run was trained with."""
    last = checkpoint_folders(run, read_json(run / "run.json")["order"])[-1]
    return reload_config(last / CONFIG, []).locator.name


def relocate(
    run: Path, benchmark: Benchmark, names: Sequence[str], features: Path, owners: Mapping[str, Path]
) -> list[Found]:
    """What the run reaches with each of these locators; fills the cells that are missing.

    ``features`` is the folder for features, which runs on one base may share. ``owners``: locators and runs of the same
    seed that were trained with them; their settings apply, and their fits are reused if they know the same tasks.
    Raises ClmoeError for a run that is not finished, keeps no parts per task, or cannot use one of the locators.
    """
    order, dones = _checkpoints(run, benchmark)
    method = dones[-1].config.method
    for name in names:
        if name not in usable_locators(method):
            raise ClmoeError(f"{run}: method {method} cannot use locator={name}, only {usable_locators(method)}")
    others = {name for name in names if LOCATORS[name].looks and owners.get(name, run) != run}
    sealed = {name: _checkpoints(owners[name], benchmark)[1] for name in others}
    plans = [_Plan.of(name, dones, run, benchmark, sealed.get(name)) for name in names]
    costs = read_json(run / COSTS) if (run / COSTS).is_file() else {}
    base: LoadedBase | None = None
    for number, done in enumerate(dones):
        last = number == len(order) - 1
        todo = [plan for plan in plans if plan.missing(number) or (last and plan.name not in costs)]
        if not todo:
            continue
        answerer = open_answerer(done.config, done, base, features, benchmark)
        own = answerer.own
        for plan in todo:
            answerer.use(own)
            plan.prepare(answerer, benchmark, done)
            if cells := plan.missing(number):
                fill_cells(cells, benchmark, order, answerer)
            if last:
                costs[plan.name] = asdict(locating_cost(answerer, plan.cells[number][-1]))
        base = answerer.base
        if isinstance(answerer.model, PeftModel):
            detach_adapter(answerer.model)

    def results() -> list[Found]:
        write_json(run / COSTS, costs)
        return [plan.found(order, Cost(**costs[plan.name])) for plan in plans]

    return from_main(results)


def _checkpoints(run: Path, benchmark: Benchmark) -> tuple[list[str], list[Finished]]:
    """The order of a finished run's tasks, and its checkpoints."""
    finished_method(run)
    order: list[str] = read_json(run / "run.json")["order"]
    dones = [read_checkpoint(folder) for folder in checkpoint_folders(run, order)]
    if (trained_on := dones[-1].lineage.benchmark) != benchmark.name:
        raise ClmoeError(f"{run} was trained on benchmark {trained_on}, not {benchmark.name}")
    return order, dones


@dataclass
class _Plan:
    """A locator, and the cells that it needs: the newest task of each checkpoint, and all tasks of the last one."""

    locator: Locator
    config: Config
    cells: list[list[Cell]]
    sealed: dict[tuple[str, ...], Path]  # fits of other runs, by the tasks that they have learned
    fitted: int = 0  # tasks

    @classmethod
    def of(
        cls, name: str, dones: list[Finished], run: Path, benchmark: Benchmark, owner: list[Finished] | None
    ) -> Self:
        """Locator ``name`` for a run's checkpoints ``dones``, set and fitted as in ``owner``, a run trained with it."""
        config = dones[-1].config
        own, now = name == dones[-1].locator.name, config.locator
        chosen = owner[-1].locator if owner else LocatorConfig(name, now.feature, now.samples)
        if LOCATORS[name].looks and not own:
            config = replace(config, locator=chosen)
        same = [d for d in owner or () if (d.lineage.base, d.config.seed) == (dones[-1].lineage.base, config.seed)]
        sealed = {tuple(done.lineage.tasks): done.folder / LOCATOR_FILE for done in same}
        plan = cls(make_locator(now if own else chosen, config.seed), config, [], sealed)
        for done in dones:
            learned, last = done.lineage.tasks, done is dones[-1]
            limit, by = None if last else config.evaluation.limit, "" if own else name
            asked = map(benchmark.task, learned if last else learned[-1:])
            plan.cells.append([Cell(run, task, by, "fixed", limit, config, done.identity, learned) for task in asked])
        return plan

    @property
    def name(self) -> str:
        return self.locator.config.name

    def missing(self, number: int) -> list[Cell]:
        return from_main(lambda: [cell for cell in self.cells[number] if not cell.settled()])

    def prepare(self, answerer: Answerer, benchmark: Benchmark, done: Finished) -> None:
        """Let the answerer find tasks with this locator; fit it on those that it does not know yet."""
        if not self.cells[0][0].locator or not self.locator.looks:
            return
        answerer.use(self.locator)
        if not self.locator.fits:
            return
        tasks = done.lineage.tasks
        if sealed := self.sealed.get(tuple(tasks)):
            self.locator.load(sealed)
        else:
            fit_tasks(answerer, self.config, [benchmark.task(task) for task in tasks[self.fitted :]])
        self.fitted = len(tasks)

    def found(self, order: list[str], cost: Cost) -> Found:
        scores = [[read_json(cell.path)["score"] for cell in cells] for cells in self.cells]
        rows = {task: (*[None] * k, *scores[k], *[None] * (len(order) - 1 - k)) for k, task in enumerate(order[:-1])}
        rows[order[-1]] = tuple(scores[-1])
        confusion = {
            cell.task.name: Counter(row["task"] for row in read_json_lines(cell.path.with_suffix(".jsonl")))
            for cell in self.cells[-1]
        }
        return Found(self.name, metrics(AccuracyMatrix(tuple(order), rows)), confusion, cost)


def locating_cost(answerer: Answerer, cell: Cell) -> Cost:
    """The cost of finding the task, measured on the first questions of this cell."""
    questions = cell.questions(images=True)[:TIMED]
    fresh = replace(answerer.store, folder=None)
    finder = answerer.locator(cell.locator)
    assert finder is not None
    asked = Asked([question.question_id for question in questions], answerer.learned, task=answerer.learned - 1)
    start = perf_counter()
    if finder.looks:
        features = fresh.features(answerer.model, questions, cell.task.image_root)
        asked = replace(asked, features=features, prototypes=answerer.prototypes())
    elif finder.asks:
        asked = replace(asked, features=answerer.letters(questions, cell.task.image_root))
    between = perf_counter()
    finder.scores(asked)
    each = 1000 / len(questions)
    return Cost(*finder.size(), (between - start) * each, (perf_counter() - between) * each)
