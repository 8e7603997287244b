"""Putting a benchmark's data in place: the builders by the name in the field `prepare`."""

from collections.abc import Callable, Collection
from pathlib import Path

from clmoe.benchmarks.base import Benchmark, load_benchmark
from clmoe.benchmarks.cl4vqa import prepare_cl4vqa
from clmoe.benchmarks.coin import prepare_grounding
from clmoe.embedded import build
from clmoe.errors import ClmoeError


def _draw(benchmark: Benchmark) -> list[str]:
    build.prepare(benchmark.name, benchmark.root)
    return []


BUILDERS: dict[str, Callable[[Benchmark], list[str]]] = {
    "playground": _draw,
    "coin": prepare_grounding,
    "cl4vqa": prepare_cl4vqa,
}


def open_benchmark(name: str, data: Path | None = None, tasks: Collection[str] | None = None) -> Benchmark:
    """The benchmark with its data in place; the embedded ones are drawn on first use.

    Arguments and errors are those of ``load_benchmark``; with ``tasks`` only their files are required.
    """
    benchmark = load_benchmark(name, data, check_files=False)
    if benchmark.built_on_first_use:
        _draw(benchmark)
    benchmark.require_files(tasks)
    return benchmark


def prepare_benchmark(benchmark: Benchmark) -> str:
    """Build what can be built from the downloads that are there; returns what was done, one line each.

    Raises ClmoeError if files are still missing: what was done, and each file with its source.
    """
    lines = [] if benchmark.prepare is None else BUILDERS[benchmark.prepare](benchmark)
    missing = benchmark.missing_files()
    if missing:
        raise ClmoeError("\n".join([*lines, f"{len(missing)} file(s) are missing below {benchmark.root}:", *missing]))
    return "\n".join(lines)
