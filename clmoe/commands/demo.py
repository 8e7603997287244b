"""``clmoe demo``: ask a checkpoint in the browser."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from clmoe.commands.opening import open_benchmark
from clmoe.errors import ClmoeError

if TYPE_CHECKING:
    from clmoe.demo.examples import Example
    from clmoe.train.lineage import Finished


def run(options: Namespace) -> None:
    """``clmoe demo``: serve the page until it is interrupted."""
    from clmoe.train.lineage import read_checkpoint

    done = read_checkpoint(options.checkpoint)
    from clmoe.demo.page import build_page, launch
    from clmoe.evaluate.answer import load

    examples = _examples(options, done)
    title = f"{done.config.name} on {done.lineage.benchmark}, after {done.lineage.tasks[-1]}"
    page = build_page(load(options.checkpoint, options.model), title, examples)
    print(f"{title}: {launch(page, options.port)} (stop with Ctrl-C)", flush=True)
    page.block_thread()


def _examples(options: Namespace, done: Finished) -> list[Example]:
    """Test questions of the benchmark; a checkpoint whose benchmark is not at hand is shown without, and says so."""
    from clmoe.demo.examples import read_examples

    try:
        benchmark = open_benchmark(options.benchmark or done.lineage.benchmark, options.data)
        return read_examples(benchmark, done.lineage.tasks)
    except ClmoeError as error:
        if options.benchmark or options.data:
            raise
        print(f"clmoe demo: no examples (--benchmark and --data say where they are): {error}", file=sys.stderr)
        return []
