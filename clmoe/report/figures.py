"""The numbers behind each figure of the page: one long table per figure, which the page draws and offers as CSV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clmoe.evaluate.matrix import METRICS, ZERO_SHOT, Spread, mean_spread
from clmoe.report.costs import PEAKS, read_costs
from clmoe.report.location import OVERALL, confusion_percent, decided_right, deciders, runs_with
from clmoe.report.names import block_names
from clmoe.report.panels import Panel, mean_panels
from clmoe.report.predictions import OUTCOMES
from clmoe.report.records import DECIDERS
from clmoe.report.run import Group, Run
from clmoe.report.samples import Pairs, count_outcomes

Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Data:
    """Raw numbers, percent where scores; None is blank."""

    columns: tuple[str, ...]
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        return {"columns": self.columns, "rows": [[_shortened(cell) for cell in row] for row in self.rows]}


def figures(groups: Sequence[Group], answers: Sequence[tuple[Run, Pairs]]) -> dict[str, Data]:
    """All figures by their name in the page; one without rows is not drawn.

    Args:
        answers: as `clmoe.report.samples.read_answers` returns them.
    """
    return {
        "comparison": comparison(groups),
        "scores": scores(groups),
        "matrices": matrices(groups),
        "curves": curves(groups),
        "outcomes": outcomes(groups, answers),
        "locator": locator(groups),
        "located": located(groups),
        "expansion": expansion(groups),
        "parameters": parameters(groups),
        "usage": usage(groups),
        "costs": costs(groups),
    }


def comparison(groups: Sequence[Group]) -> Data:
    """Every metric of every label, and parameters and minutes."""
    rows = []
    for group in groups:
        spreads = [(name, group.metric(name)) for name in METRICS]
        spreads += [(name, group.field(name)) for name in ("trainable_parameters", "adapter_parameters", "minutes")]
        rows += [(group.label, name, *_spread(spread)) for name, spread in spreads if spread.n]
    return Data(("label", "quantity", "mean", "std", "n"), rows)


def scores(groups: Sequence[Group]) -> Data:
    """Mean over tasks right after their training and at the end, with each seed's value."""
    rows = []
    for group in groups:
        for name in ("immediate", "immediate_known", "last"):
            spread = group.metric(name)
            seeds = " ".join(f"{run.metrics[name]:.10g}" for run in group.runs if run.metrics[name] is not None)
            if spread.n:
                rows.append((group.label, name, *_spread(spread), seeds))
    return Data(("label", "quantity", "mean", "std", "n", "seeds"), rows)


def matrices(groups: Sequence[Group]) -> Data:
    """Cells of the accuracy matrices: the means over seeds, and each run's own where there are several."""
    rows = []
    for group in groups:
        panels = mean_panels(group)
        meant = [seed for panel in panels if len(panel.seeds) > 1 for seed in panel.seeds]
        single = [Panel(run.name, (run.seed,), run.matrix) for run in group.runs if run.seed in meant]
        for kind, shown in (("mean", panels), ("seed", single)):
            rows += [(group.label, kind, " ".join(map(str, p.seeds)), *cell) for p in shown for cell in _cells(p)]
    return Data(("label", "kind", "seeds", "after", "task", "score"), rows)


def curves(groups: Sequence[Group]) -> Data:
    """Score of a task after each stage, of the seeds that follow the first run's order."""
    order = groups[0].runs[0].order
    rows = []
    for group in groups:
        runs = [run for run in group.runs if run.order == order]
        for position, task in enumerate(order, start=1):
            for stage, after in enumerate((ZERO_SHOT, *order)):
                spread = mean_spread([run.matrix.cell(stage, position) for run in runs])
                if spread.n:
                    rows.append((group.label, task, stage, after, *_spread(spread)))
    return Data(("label", "task", "stage", "after", "mean", "std", "n"), rows)


def outcomes(groups: Sequence[Group], answers: Sequence[tuple[Run, Pairs]]) -> Data:
    """Questions asked right after their task and again at the end, by what became of the answer.

    Without the last task: its two answers are one.
    """
    rows = []
    for group in groups:
        for task in groups[0].runs[0].order:
            runs = [(run, pairs) for run, pairs in answers if run.label == group.label and run.order[-1] != task]
            counts = count_outcomes(runs, group.label, task)
            if counts:
                rows.append((group.label, task, *(counts[name] for name in OUTCOMES)))
    return Data(("label", "task", *OUTCOMES), rows)


def locator(groups: Sequence[Group]) -> Data:
    """Percent of the questions of `task` taken for `located`, at the end, mean over seeds."""
    tasks = groups[0].runs[0].order
    rows = [
        (group.label, DECIDERS[decider], task, name, confusion_percent(group, decider, task, name), seeds)
        for group in groups
        for decider in deciders(group)
        for seeds in [runs_with(group, decider)]
        for task in tasks
        for name in tasks
    ]
    return Data(("label", "decider", "task", "located", "percent", "n"), rows)


def located(groups: Sequence[Group]) -> Data:
    """Percent of all questions located right, by label and decider."""
    rows = [
        (group.label, DECIDERS[decider], *_spread(decided_right(group, decider, OVERALL)))
        for group in groups
        for decider in deciders(group)
    ]
    return Data(("label", "decider", "mean", "std", "n"), rows)


def expansion(groups: Sequence[Group]) -> Data:
    """Every decision of the probes."""
    rows = [
        (*run_keys, task, block, decision.added, decision.probe, decision.limit)
        for run_keys, run in _runs(groups)
        for task, block, decision in _decisions(run)
    ]
    return Data(("label", "seed", "task", "block", "added", "probe", "limit"), rows)


def parameters(groups: Sequence[Group]) -> Data:
    """Parameters trained in each task and stored after it; the mean over seeds, of the tasks that all seeds reached."""
    rows = []
    for group in groups:
        for task in groups[0].runs[0].order:
            known = [row for run in group.runs for row in run.parameters if row.task == task]
            if known:
                trained = mean_spread([row.trainable for row in known])
                stored = mean_spread([row.stored for row in known])
                rows.append((group.label, task, trained.mean, trained.std, stored.mean, stored.std, trained.n))
    return Data(("label", "task", "trained", "trained_std", "stored", "stored_std", "n"), rows)


def usage(groups: Sequence[Group]) -> Data:
    """Share of each expert in a block's routing on a task's training data; probes are the newest experts tried."""
    rows = []
    for keys, run in _runs(groups):
        for task, block, shares, probes in _shares(run):
            kinds = ["expert"] * (len(shares) - probes) + ["probe"] * probes
            rows += [(*keys, task, block, e, kind, s) for e, (kind, s) in enumerate(zip(kinds, shares, strict=True))]
    return Data(("label", "seed", "task", "block", "expert", "kind", "share"), rows)


def costs(groups: Sequence[Group]) -> Data:
    """Seconds and peak memory of each run by task and kind of work."""
    rows = [
        (*keys, cost.task, cost.work, cost.seconds, *(getattr(cost, peak) for peak in PEAKS))
        for keys, run in _runs(groups)
        for cost in read_costs(run)
    ]
    return Data(("label", "seed", "task", "work", "seconds", *PEAKS), rows)


def _runs(groups: Sequence[Group]) -> Iterator[tuple[tuple[str, int], Run]]:
    return (((run.label, run.seed), run) for group in groups for run in group.runs)


def _cells(panel: Panel) -> Iterator[Row]:
    for after in panel.matrix.stages:
        if after in panel.matrix.rows:
            for task, score in zip(panel.matrix.tasks, panel.matrix.row(after), strict=True):
                yield (after, task, score)


def _decisions(run: Run) -> Iterator[tuple[str, str, Any]]:
    """Task, short name of the block, and decision, the blocks in their order."""
    names = block_names([name for plan in run.expansion for name in plan.blocks])
    for plan in run.expansion:
        for name, short in names.items():
            if name in plan.blocks:
                yield plan.task, short, plan.blocks[name]


def _shares(run: Run) -> Iterator[tuple[str, str, Sequence[float], int]]:
    """Task, short name of the block, shares that sum to 1, and how many of the last ones are probes."""
    names = block_names([entry.block for entry in run.usage])
    for entry in run.usage:
        yield entry.task, names[entry.block], entry.shares, 0
    for task, block, decision in _decisions(run):
        total = sum(decision.activations)
        if decision.balance is not None:  # else they are no shares
            yield task, block, [value / total for value in decision.activations], decision.probes


def _spread(spread: Spread) -> tuple[float | None, float | None, int]:
    return spread.mean, spread.std, spread.n


def _shortened(cell: Any) -> Any:
    """Ten digits, as in the CSV files."""
    return float(f"{cell:.10g}") if isinstance(cell, float) else cell
