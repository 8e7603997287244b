"""``clmoe data``: build or verify a benchmark's files."""

from __future__ import annotations

from argparse import Namespace

from clmoe.benchmarks.base import load_benchmark
from clmoe.errors import ClmoeError

BAD_SHOWN = 50
"""So many bad rows are printed."""


def run(options: Namespace) -> str:
    """``clmoe data prepare|check``: build what can be built, or read every row and image of a benchmark and count.

    Raises:
        ClmoeError: files are missing (each is named with its source), or rows are bad (they are listed).
    """
    benchmark = load_benchmark(options.benchmark, options.data, check_files=False)
    title = f"{benchmark.name} at {benchmark.root}"
    if options.action == "prepare":
        from clmoe.benchmarks.builders import prepare_benchmark

        return "\n".join(filter(None, [title, prepare_benchmark(benchmark)]))
    from clmoe.benchmarks.check import check_benchmark
    from clmoe.evaluate.scoring import gold_problem

    checked = check_benchmark(benchmark, gold_problem)
    lines = [title, *checked.lines, *(f"note: {note}" for note in checked.notes)]
    if not checked.bad:
        return "\n".join(lines)
    bad = checked.bad
    if options.bad is not None:
        from clmoe.utils.files import write_text

        write_text(options.bad, "".join(f"{line}\n" for line in bad))
    shown = [f"bad: {line}" for line in bad[:BAD_SHOWN]]
    rest = len(bad) - len(shown)
    shown += [f"bad: and {rest} more; --bad FILE writes all of them"] if rest else []
    raise ClmoeError("\n".join([f"{len(bad)} bad", *lines, *shown]))
