"""Seconds and peak memory of a run by task and kind of work, from its `events.jsonl`."""

from __future__ import annotations

from dataclasses import dataclass

from clmoe.report.run import Run
from clmoe.utils.logging import read_events

WORK = ("probes and warm-up", "training", "end of task", "evaluation")
PEAKS = ("peak_rss_mib", "peak_cuda_mib")


@dataclass(slots=True)
class Cost:
    """Seconds of one kind of work on one task, and the process's peak memory until then in MiB (None: not logged)."""

    task: str
    work: str
    seconds: float = 0.0
    peak_rss_mib: int | None = None
    peak_cuda_mib: int | None = None


def read_costs(run: Run) -> list[Cost]:
    """Costs in the order of the events; an evaluation belongs to the task trained before it."""
    costs: dict[tuple[str, str], Cost] = {}
    for event in read_events(run.path / "events.jsonl"):
        work = _work(event["event"], event.get("phase"))
        if work is None:
            continue
        task = event["after" if work == "evaluation" else "task"]
        cost = costs.setdefault((task, work), Cost(task, work))
        cost.seconds += event["seconds"]
        for peak in PEAKS:
            seen = [value for value in (getattr(cost, peak), event.get(peak)) if value is not None]
            setattr(cost, peak, max(seen, default=None))
    return list(costs.values())


def _work(event: str, phase: str | None) -> str | None:
    if event == "trained":
        return "training" if phase == "trained" else "probes and warm-up"
    return {"ended": "end of task", "evaluated": "evaluation"}.get(event)
