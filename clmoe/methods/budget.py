"""The same number of trainable parameters for every method: the rank that comes nearest to ``adapter.budget``."""

from __future__ import annotations

from dataclasses import replace

from clmoe.config import Config
from clmoe.errors import ClmoeError
from clmoe.methods import method_class
from clmoe.methods.plan import Plan, make_plan


def within_budget(config: Config) -> Config:
    """``config`` with the rank whose parameters, trained when the first task starts, come nearest to its budget.

    Parameters are counted as ``clmoe plan`` does, on the meta device. They grow by the same number with every step of
    the rank: by one, or by the number of experts that share a total rank. ``alpha`` changes with the rank, so that the
    scale stays as configured.

    Raises:
        ClmoeError: the budget is less than the smallest rank takes, or the model's shapes are not known.
    """
    budget = config.adapter.budget
    if budget is None or method_class(config.method).chain == "none":
        return config
    smallest = _plan(config, config.adapter.experts)
    shared = config.adapter.rank_is == "total" and any(linear.experts > 1 for linear in smallest.linears)
    step = config.adapter.experts if shared else 1
    one, two = _plan(config, step).trainable, _plan(config, 2 * step).trainable
    if budget < one:
        raise ClmoeError(
            f"adapter.budget {budget}: {config.name} trains {one} parameters at the smallest rank, {step}; raise the "
            "budget or adapt fewer linears (adapter.targets, adapter.experts)"
        )
    return _with_rank(config, step * (1 + round((budget - one) / (two - one))))


def _with_rank(config: Config, rank: int) -> Config:
    adapter = config.adapter
    return replace(config, adapter=replace(adapter, rank=rank, alpha=adapter.alpha / adapter.rank * rank))


def _plan(config: Config, rank: int) -> Plan:
    config = _with_rank(config, rank)
    return make_plan(method_class(config.method)(config))
