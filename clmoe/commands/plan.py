"""``clmoe plan``: what a sequence trains and takes, before it is run."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from clmoe.benchmarks.base import load_benchmark
from clmoe.commands.opening import method_config
from clmoe.errors import ClmoeError
from clmoe.methods.base import method_class


def run(options: Namespace) -> Any:
    """``clmoe plan``: what the method would train and take, or the steps of the sequence."""
    benchmark = load_benchmark(options.benchmark, options.data, check_files=False)
    config = method_config(options, benchmark)
    order = benchmark.order(options.order, config.seed)
    if options.steps:
        if options.extended_blocks is not None:
            raise ClmoeError("--extended-blocks belongs to the parameters, which --steps does not print: leave one out")
        return _sequence(method_class(config.method).chain, order)
    from clmoe.methods.plan import make_plan, plan_text
    from clmoe.train.forecast import Ask, make_forecast
    from clmoe.train.forecast_text import forecast_text
    from clmoe.train.zero import planned_sharding

    ask = Ask(planned_sharding(options.deepspeed, options.gpus), options.tokens, options.answer_tokens)
    method = method_class(config.method)(config)
    plan = make_plan(method, options.extended_blocks)
    forecast = make_forecast(method, benchmark, order, plan, ask)
    options.exit_code = int(bool(forecast.missing))
    if options.json:
        return {**plan.as_json(), **forecast.as_json()}
    return f"{plan_text(plan)}\n\n{forecast_text(forecast)}"


def _sequence(chain: str, order: list[str]) -> str:
    """One line per ``clmoe train``: number, task, the task it continues or -."""
    if chain == "none":
        return ""
    if chain == "union":
        return "01 all -"
    parents = ["-"] * len(order) if chain == "separate" else ["-", *order[:-1]]
    return "\n".join(f"{i:02} {task} {parent}" for i, (task, parent) in enumerate(zip(order, parents, strict=True), 1))
