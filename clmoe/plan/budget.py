"""``budget``: the rank, memory and steps that keep a method within what all methods of a comparison may use."""

from collections.abc import Collection
from dataclasses import replace

from clmoe.config import BudgetConfig, Config
from clmoe.errors import ClmoeError
from clmoe.methods import method_class
from clmoe.plan import FirstTask, by_task, first_task

TOLERANCE = 0.02  # of budget.parameters


def within_budget(config: Config, tasks: int, given: Collection[str] = ()) -> Config:
    """The configuration of a sequence of this many tasks, with ``config.budget`` applied.

    ``given``: keys that the user has set beside the budget. Parameters are what ``clmoe plan`` calls "kept in the end".
    A method that grows gets the nearest rank: what it ends with depends on the data.

    Raises ClmoeError if a key is ``given`` that the budget replaces, the method has no rank or none comes within 2 % of
    the parameters, the samples do not divide among the tasks, ``extended_blocks`` is missing, or the base's shapes are
    unknown.
    """
    budget, method = config.budget, method_class(config.method)(config)
    if budget == BudgetConfig() or method.chain == "none":
        return config
    replaced = {
        "parameters": ("adapter.rank",),
        "stored_samples": (f"options.{method.memory}",),
        "steps": ("training.steps", "training.epochs"),
    }
    for name, keys in replaced.items():
        vain = [key for key in keys if key in given]
        if vain and getattr(budget, name) is not None:
            raise ClmoeError(f"{vain[0]} has no effect beside budget.{name}: leave one of them out")
    if budget.steps is not None:
        config = replace(config, training=replace(config.training, steps=budget.steps))
    if budget.stored_samples is not None and method.memory:
        each, rest = divmod(budget.stored_samples, tasks)
        if rest:
            raise ClmoeError(f"budget.stored_samples {budget.stored_samples} is not a multiple of the {tasks} tasks")
        config = replace(config, options=config.options | {method.memory: each})
    return config if budget.parameters is None else _ranked(config, tasks, budget.parameters)


def _ranked(config: Config, tasks: int, wanted: int) -> Config:
    """The configuration with the nearest rank. Parameters are linear in it, so two ranks tell where that is."""
    method, X = method_class(config.method)(config), config.budget.extended_blocks
    if method.grows and X is None:
        raise ClmoeError(
            f"budget.extended_blocks: {config.name} adds experts where the data asks for it: say how many blocks a "
            "later task is assumed to extend, on average, as clmoe plan --extended-blocks does"
        )

    def kept(rank: int) -> int:
        count = by_task(_first(method.ranked(rank)), tasks, X if method.grows else None)[1]
        assert count is not None
        return count

    unit = _unit(_first(config))
    one, two = kept(unit), kept(2 * unit)
    if one == two:
        raise ClmoeError(f"budget.parameters: {config.name} has no rank that could change its number of parameters")
    below = max(1, 1 + (wanted - one) // (two - one))
    found = {rank: kept(rank) for rank in (below * unit, (below + 1) * unit)}
    best = min(found, key=lambda rank: abs(found[rank] - wanted))
    if abs(found[best] - wanted) > TOLERANCE * wanted and not method.grows:
        near = " and ".join(f"{count:,} with adapter.rank={rank}" for rank, count in found.items())
        raise ClmoeError(
            f"budget.parameters {wanted:,}: no rank of {config.name} keeps that many on {tasks} tasks, within "
            f"{TOLERANCE:.0%}; the nearest are {near}"
        )
    return method.ranked(best)


def _first(config: Config) -> FirstTask:
    return first_task(method_class(config.method)(config))


def _unit(first: FirstTask) -> int:
    """The step between total ranks that experts can share."""
    adapter = first.method.config.adapter
    shared = first.experts is not None and first.experts.router_owners and adapter.rank_is == "total"
    return adapter.experts if shared else 1
