"""What grows with the number of tasks: a row for each task of a finished run that keeps parts per task.

    OMP_NUM_THREADS=1 python scripts/bench/growth.py RUN [--benchmark YAML] [--data FOLDER] [--json]

It shows parameters trained in the task and kept after it, bytes of its checkpoint, minutes of its training (probes and
locator included, evaluation not), and milliseconds that finding a question's task takes by then: its feature on the
frozen base, which does not grow, and the scores of all tasks.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
from peft import PeftModel

from clmoe.benchmarks.prepare import open_benchmark
from clmoe.evaluate.answer import open_answerer
from clmoe.evaluate.relocate import finished_method, locating_cost
from clmoe.evaluate.run import Cell
from clmoe.experts.model import detach_adapter
from clmoe.train.checkpoint import MANIFEST, checkpoint_folders, read_checkpoint
from clmoe.utils.files import read_json
from clmoe.utils.logging import read_events


def grown(run: Path, benchmark_name: str = "", data: Path | None = None) -> list[dict[str, Any]]:
    """A row for each task. Raises ClmoeError for a run that is not finished or keeps no parts per task."""
    finished_method(run)
    info, events = read_json(run / "run.json"), read_events(run / "events.jsonl")
    benchmark, base, rows = open_benchmark(benchmark_name or info["benchmark"], data, info["order"]), None, []
    for number, folder in enumerate(checkpoint_folders(run, info["order"]), 1):
        done = read_checkpoint(folder)
        task = done.lineage.tasks[-1]
        seconds = [event["seconds"] for event in events
                   if event.get("task") == task and "seconds" in event and "after" not in event]  # fmt: skip
        answerer = open_answerer(done.config, done, base, None, benchmark)
        identity, learned = done.identity, done.lineage.tasks
        cost = locating_cost(
            answerer, Cell(run, benchmark.task(task), "", "fixed", None, done.config, identity, learned)
        )
        base = answerer.base
        if isinstance(answerer.model, PeftModel):
            detach_adapter(answerer.model)
        rows.append(
            {
                "tasks": number,
                "task": task,
                "trained": done.lineage.trainable_parameters,
                "kept": done.lineage.adapter_parameters,
                "bytes": sum(file["bytes"] for file in read_json(folder / MANIFEST)["files"].values()),
                "minutes": sum(seconds) / 60,
                "feature_ms": cost.feature_ms,
                "decision_ms": cost.decision_ms,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--benchmark", default="", help="YAML file, if the run's benchmark is not a shipped one")
    parser.add_argument("--data", type=Path, help="the benchmark's data folder")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = grown(args.run, args.benchmark, args.data)
    print(json.dumps(rows) if args.json else pd.DataFrame(rows).to_string(index=False, float_format="%.2f"))


if __name__ == "__main__":
    main()
