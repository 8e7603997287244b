"""The figures of ``clmoe plan`` for a human, at most 100 columns wide except for the names of files."""

from __future__ import annotations

import textwrap

from clmoe.train.forecast import Disk, Forecast, Memory, TaskCount
from clmoe.train.order import BatchPlan

WIDTH = 100


def forecast_text(forecast: Forecast) -> str:
    """Steps, memory, disk, and what is missing."""
    lines = _tasks(forecast.tasks)
    if forecast.batches is not None:
        lines += ["", _batches(forecast.batches)]
    if forecast.memory is not None:
        lines += _memory(forecast.memory, forecast.recompute)
    if forecast.disk is not None:
        lines += _disk(forecast.disk)
    lines += ["", *(line for note in forecast.notes for line in _wrapped(note, ""))] if forecast.notes else []
    if forecast.missing:
        lines += ["", f"missing ({len(forecast.missing)})"]
        lines += [line for item in forecast.missing for line in _wrapped(item, "  ")]
    else:
        lines += ["", "nothing is missing"]
    return "\n".join(lines)


def _wrapped(text: str, indent: str) -> list[str]:
    """Names of files stay whole."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _tasks(tasks: list[TaskCount]) -> list[str]:
    lines = [f"{'task':<24}{'train records':>16}{'test records':>16}{'steps':>12}"]
    return lines + [f"{t.name:<24}{_number(t.train):>16}{_number(t.test):>16}{_number(t.steps):>12}" for t in tasks]


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _batches(batches: BatchPlan) -> str:
    gpus = f"{batches.processes} GPU{'s' if batches.processes > 1 else ''}"
    return (
        f"global batch {batches.batch_size} = {gpus} x micro-batch {batches.micro} x accumulation "
        f"{batches.accumulation}"
    )


def _memory(memory: Memory, recompute: bool) -> list[str]:
    """Both columns, whichever the configuration asks for."""
    state = memory.state
    lines = ["", "memory per GPU in the first task"]
    lines += [f"  {name:<48}{_size(size):>12}" for name, size in state.gpu.items() if size]
    if state.host:
        lines.append(f"  {'in the host, for each GPU':<48}{_size(state.host):>12}")
    lines += ["", f"  {'':<48}{'kept':>12}{'recomputed':>14}"]
    for tokens, (kept, recomputed) in memory.activations.items():
        lines.append(f"  {f'activations at {tokens:,} tokens':<48}{_size(kept):>12}{_size(recomputed):>14}")
        total = memory.totals(tokens)
        lines.append(f"  {f'  all together at {tokens:,} tokens':<48}{_size(total[0]):>12}{_size(total[1]):>14}")
    chosen = "recomputed" if recompute else "kept"
    lines.append(f"  training.gradient_checkpointing={str(recompute).lower()}: the column '{chosen}'")
    lines.append("  without CUDA's own memory and fragmentation; see docs/plan.md for what is counted")
    return lines


def _disk(disk: Disk) -> list[str]:
    rows = {
        "checkpoints of the sequence": disk.checkpoints,
        "besides, while a task is unfinished": disk.unfinished,
        "features of the locator": disk.features,
        "elsewhere, with CLMOE_VISION, at most": disk.vision,
    }
    sizes = [(name, "?" if size is None else _size(size)) for name, size in rows.items() if size != 0]
    return ["", "disk", *(f"  {name:<48}{size:>12}" for name, size in sizes)]


def _size(size: int) -> str:
    """GiB, or MiB below 0.1 GiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:,.2f} MiB"
