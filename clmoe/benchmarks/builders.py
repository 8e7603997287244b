"""What `clmoe data prepare` runs, by the name in a benchmark's field `prepare`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from clmoe.benchmarks.cl4vqa import prepare_cl4vqa
from clmoe.benchmarks.coin import prepare_grounding
from clmoe.errors import ClmoeError
from clmoe.utils.names import unknown

if TYPE_CHECKING:
    from clmoe.benchmarks.base import Benchmark


def prepare_playground(benchmark: Benchmark) -> list[str]:
    """Draw the embedded benchmark."""
    from clmoe.benchmarks.playground.build import prepare

    prepare(benchmark.name, benchmark.root)
    return []


BUILDERS: Mapping[str, Callable[[Benchmark], list[str]]] = MappingProxyType(
    {"playground": prepare_playground, "coin": prepare_grounding, "cl4vqa": prepare_cl4vqa}
)


def prepare_benchmark(benchmark: Benchmark) -> str:
    """Build what can be built from downloads that are there.

    Returns what was done, and the files that are still missing with where they come from.

    Raises:
        ClmoeError: nothing is built for this benchmark by anyone and files are missing, or what the builder raises.
    """
    lines = []
    if benchmark.prepare is not None:
        if benchmark.prepare not in BUILDERS:
            raise ClmoeError(f"benchmark {benchmark.name}: {unknown('builder', benchmark.prepare, BUILDERS)}")
        lines = BUILDERS[benchmark.prepare](benchmark)
    missing = benchmark.missing_files()
    if missing:
        lines += [f"{len(missing)} file(s) are missing below {benchmark.root}:"]
        for task, field, path in missing:
            source = benchmark.source(path)
            lines.append(f"  {task} {field}: {path}" + (f"\n    from {source}" if source else ""))
        raise ClmoeError("\n".join(lines))
    return "\n".join(lines)
