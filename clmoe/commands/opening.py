"""What several verbs begin with: the benchmark with its data, the resolved configuration."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from clmoe.benchmarks.base import Benchmark, load_benchmark
from clmoe.config import Config, load_config


def open_benchmark(name: str, data: Path | None) -> Benchmark:
    """The benchmark with its data in place; the playground's is rendered on first use.

    Raises:
        ClmoeError: unknown benchmark or missing files.
    """
    benchmark = load_benchmark(name, data)
    if benchmark.built_on_first_use:
        from clmoe.benchmarks.builders import prepare_playground

        prepare_playground(benchmark)
    return benchmark


def method_config(options: Namespace, benchmark: Benchmark) -> Config:
    """The method's configuration on the benchmark, its rank fitted to a budget where one is given."""
    config = load_config(options.config, benchmark.recipe, options.overrides, options.model)
    if config.adapter.budget is None:
        return config
    from clmoe.methods.budget import within_budget

    return within_budget(config)
