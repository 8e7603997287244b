"""For which task the test questions were taken at the end of the sequence, by each decider of `locator.csv`.

Each run's end is after its own last task, whatever the order of the other seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from clmoe.evaluate.matrix import Spread, mean_spread
from clmoe.report.records import DECIDERS
from clmoe.report.run import Group, Run
from clmoe.report.tables import Table, raw, show_spread
from clmoe.utils.files import csv_text

OVERALL = "overall"


def deciders(group: Group) -> list[str]:
    """The deciders that any run of the label has at the end of its sequence."""
    return [decider for decider in DECIDERS if any(_decided(run, decider) for run in group.runs)]


def confusion_percent(group: Group, decider: str, task: str, located: str) -> float | None:
    """Percent of the questions of `task` taken for `located`: mean over the seeds that have this decider.

    None unless all of them asked questions of `task`.
    """
    runs = [run for run in group.runs if _decided(run, decider)]
    cells = [_share(_counts(run, decider)[task], located) for run in runs]
    spread = mean_spread(cells)
    return spread.mean if spread.n == len(runs) else None


def runs_with(group: Group, decider: str) -> int:
    """Number of seeds that have this decider."""
    return sum(_decided(run, decider) for run in group.runs)


def decided_right(group: Group, decider: str, name: str) -> Spread:
    """Percent located right of one task's questions, or of all questions (`OVERALL`), over the seeds."""
    return mean_spread([_run_accuracy(_counts(run, decider), name) for run in group.runs])


def locator_table(groups: Sequence[Group]) -> Table:
    """One row per label and decider: percent of the questions located right, by task and overall."""
    tasks = groups[0].runs[0].order
    rows = [
        (
            group.label,
            DECIDERS[decider],
            *(show_spread(decided_right(group, decider, name), len(group.runs)) for name in (*tasks, OVERALL)),
        )
        for group in groups
        for decider in deciders(group)
    ]
    title = "Task locator: questions taken for their task (%)"
    return Table(title, ("label", "decider", *tasks, OVERALL), tuple(rows), keys=2)


def locator_csv(groups: Sequence[Group]) -> str:
    """Raw accuracies in percent, one line per label, decider and task: mean, deviation and count over seeds."""
    rows = [["label", "decider", "task", "mean", "std", "n"]]
    for group in groups:
        for decider in deciders(group):
            for name in (*groups[0].runs[0].order, OVERALL):
                spread = decided_right(group, decider, name)
                if spread.n:
                    rows.append([group.label, decider, name, raw(spread.mean), raw(spread.std), str(spread.n)])
    return csv_text(rows)


def _decided(run: Run, decider: str) -> bool:
    return any(row.decider == decider and row.after == run.order[-1] for row in run.located)


def _counts(run: Run, decider: str) -> dict[str, Counter[str]]:
    """Questions at the end of the run: true task -> task taken -> count."""
    counts: dict[str, Counter[str]] = {task: Counter() for task in run.order}
    for row in run.located:
        if row.decider == decider and row.after == run.order[-1]:
            counts[row.task][row.located] += row.count
    return counts


def _run_accuracy(counts: dict[str, Counter[str]], name: str) -> float | None:
    if name != OVERALL:
        return _share(counts[name], name)
    if not all(taken.total() for taken in counts.values()):
        return None  # a share of fewer tasks would not compare
    right = sum(taken[task] for task, taken in counts.items())
    return 100 * right / sum(taken.total() for taken in counts.values())


def _share(taken: Counter[str], task: str) -> float | None:
    return 100 * taken[task] / taken.total() if taken.total() else None
