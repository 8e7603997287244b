"""``run.json``: what the report needs to know of a whole run."""

from __future__ import annotations

from pathlib import Path

from clmoe.benchmarks.base import Benchmark
from clmoe.config import Config
from clmoe.errors import ClmoeError
from clmoe.methods.base import method_class
from clmoe.train.lineage import Finished
from clmoe.utils.files import read_json, write_json

RUN = "run.json"


def write_run_info(
    run: Path, benchmark: Benchmark, config: Config, order: list[str], scoring: str, done: Finished | None
) -> None:
    """Write the file; ``done`` is the newest checkpoint, None for the bare model.

    The bare model's row in the folder of a training run leaves that run's file as it is.
    """
    path = run / RUN
    if done is None and path.is_file() and method_class(read_json(path)["method"]).chain != "none":
        return
    lineage = None if done is None else done.lineage
    trained_at_once = len(order) if method_class(config.method).chain == "union" else 1
    write_json(
        path,
        {
            "method": config.method,
            "label": config.name,
            "benchmark": benchmark.name,
            "order": order,
            "seed": config.seed,
            "scoring": scoring,
            "limit": None if done is None else config.evaluation.limit,
            "trainable_parameters": 0 if lineage is None else lineage.trainable_parameters,
            "adapter_parameters": 0 if lineage is None else lineage.adapter_parameters,
            "projector_trained": lineage is not None and config.adapter.train_projector,
            "effective_scale": None if lineage is None else lineage.effective_scale,
            "steps_per_task": 0 if lineage is None else lineage.steps // trained_at_once,
        },
    )


def check_run_order(run: Path, order: list[str]) -> None:
    """The run folder's order and this one agree: one begins with the other, as a sequence may be made longer.

    Raises:
        ClmoeError: they do not; rows and columns of two orders would be mixed in one matrix.
    """
    path = run / RUN
    recorded = read_json(path)["order"] if path.is_file() else []
    if any(ours != theirs for ours, theirs in zip(order, recorded, strict=False)):
        raise ClmoeError(
            f"{run} holds a run in the order {', '.join(recorded)}, but --order here is {', '.join(order)}: "
            "give the same --order or choose another --output"
        )
