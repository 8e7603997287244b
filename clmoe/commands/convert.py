"""``clmoe convert``: another project's model or adapter -> ours."""

from __future__ import annotations

from argparse import Namespace

from clmoe.benchmarks.base import load_benchmark
from clmoe.errors import ClmoeError


def run(options: Namespace) -> str:
    """``clmoe convert``: tells from the files what SRC is; returns what was found and written."""
    from clmoe.convert.detect import check_options, detect

    source, target = options.source, options.target
    kind = detect(source)
    check_options(kind, source, options)
    if target.exists():
        raise ClmoeError(f"{target} exists: choose another folder or delete it")
    if kind == "liuhaotian":
        from clmoe.convert.liuhaotian import convert_liuhaotian

        found = convert_liuhaotian(source, target, options.vision)
    elif kind == "llama":
        from clmoe.convert.vicuna import convert_vicuna

        found = convert_vicuna(source, target, options.vision, options.projector)
    else:
        from clmoe.convert.legacy_adapters import convert_adapter

        benchmark = load_benchmark(options.benchmark, None, check_files=False)
        found = convert_adapter(source, target, options.model, benchmark, options.tasks)
    return f"{found}\nwritten and read back: {target}"
