"""How an adapter grew over the tasks: parameters trained and stored, blocks extended, experts added.

The numbers at the end of the sequence are of finished runs; an unfinished run has only its parameters by task.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from clmoe.evaluate.matrix import Spread, mean_spread
from clmoe.report.records import TaskExpansion, TaskParameters
from clmoe.report.run import Group, Run
from clmoe.report.tables import Table, raw, show_count, show_number, show_spread
from clmoe.utils.files import csv_text


def trained_in(group: Group, task: str) -> Spread:
    """Parameters trained in one task, mean and spread over the seeds."""
    return mean_spread([{row.task: row.trainable for row in run.parameters}.get(task) for run in group.runs])


def stored_at_end(run: Run) -> int | None:
    """Adapter parameters stored after the last task."""
    return run.parameters[-1].stored if _finished(run, run.parameters) else None


def experts_added(run: Run) -> int | None:
    """Experts added over all tasks and blocks."""
    added = _added(run)
    return None if added is None else sum(added)


def share_extended(run: Run) -> float | None:
    """Percent of the decisions, one per probed task and block, that added an expert."""
    added = _added(run)
    return 100 * sum(count > 0 for count in added) / len(added) if added else None


def experts_in_use(run: Run) -> float | None:
    """Percent of a block's experts and probes in use when its probes were measured, mean over all decisions."""
    balances = [block.balance for task in run.expansion for block in task.blocks.values()]
    known = [balance for balance in balances if balance is not None]
    return 100 * mean(known) if known and _finished(run, run.expansion) else None


def growing(groups: Sequence[Group]) -> list[Group]:
    """The labels to show: those with recorded growth, where any label's adapter grew; nothing to tell otherwise."""
    if not any(run.expansion for group in groups for run in group.runs):
        return []
    return [group for group in groups if any(run.parameters or run.expansion for run in group.runs)]


def growth_table(groups: Sequence[Group]) -> Table:
    """One row per label: parameters trained in each task, stored at the end, blocks extended, experts added and used.

    "experts in use" shows the routers' balance: 100 % when all experts and probes of a block are equally active.
    """
    tasks = groups[0].runs[0].order
    rows = []
    for group in growing(groups):
        seeds = len(group.runs)
        stored, extended, added, used = _ends(group)
        rows.append(
            (
                group.label,
                *(show_spread(trained_in(group, task), seeds, show_count) for task in tasks),
                show_spread(stored, seeds, show_count),
                show_spread(extended, seeds, show_number),
                show_spread(added, seeds, lambda value: f"{value:.1f}".removesuffix(".0")),
                show_spread(used, seeds, show_number),
            )
        )
    header = ("label", *tasks, "stored at end", "blocks extended (%)", "experts added", "experts in use (%)")
    return Table("Growth: parameters trained in each task", header, tuple(rows))


def growth_csv(groups: Sequence[Group]) -> str:
    """Raw numbers: mean, deviation and count over seeds; the task is empty for a quantity of the whole sequence."""
    rows = [["label", "quantity", "task", "mean", "std", "n"]]
    for group in growing(groups):
        quantities = [("trainable_parameters", task, trained_in(group, task)) for task in groups[0].runs[0].order]
        names = ("stored_parameters", "blocks_extended_percent", "experts_added", "experts_in_use_percent")
        quantities += [(name, "", spread) for name, spread in zip(names, _ends(group), strict=True)]
        for name, task, spread in quantities:
            if spread.n:
                rows.append([group.label, name, task, raw(spread.mean), raw(spread.std), str(spread.n)])
    return csv_text(rows)


def _ends(group: Group) -> tuple[Spread, Spread, Spread, Spread]:
    """Parameters stored, share of blocks extended, experts added and in use, at the end and over the seeds."""
    return (
        mean_spread([stored_at_end(run) for run in group.runs]),
        mean_spread([share_extended(run) for run in group.runs]),
        mean_spread([experts_added(run) for run in group.runs]),
        mean_spread([experts_in_use(run) for run in group.runs]),
    )


def _added(run: Run) -> list[int] | None:
    """Experts added by each decision of a finished run."""
    if not _finished(run, run.expansion):
        return None
    return [block.added for task in run.expansion for block in task.blocks.values()]


def _finished(run: Run, rows: Sequence[TaskParameters] | Sequence[TaskExpansion]) -> bool:
    return bool(rows) and rows[-1].task == run.order[-1]
