"""What LLaVA-CMoE's growth does in finished runs: docs/llava_cmoe.md prints these tables.

    python scripts/playground/added_experts.py depth RUN ...
    python scripts/playground/added_experts.py alpha RUN ... [--values 0,0.4,0.8,1.2,1.6,2]
    python scripts/playground/added_experts.py experts RUN ...
    python scripts/playground/added_experts.py probe RUN OUT [--vary options.probe_seed=0,1,2] [--benchmark B]

RUN is a run folder of `llava_cmoe`. `depth` counts the experts added to each block, `experts` compares them with older
ones. `alpha` decides again from the activations that the run recorded, under other thresholds. `probe` probes each task
except the first again from the checkpoint before it, with all but one of the run's settings, into OUT: after the
decision, one step of training and of fitting the locator is enough. Means are over the runs and, in `experts`, over the
blocks.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from clmoe.methods.probes import decide
from clmoe.utils.files import read_json

ONE_STEP = ("training.steps=1", "locator.options.steps=1")
Decisions = dict[str, int]  # block -> experts that the probes asked for


def table(columns: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, its first column to the left."""
    print(f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def checkpoints(run: Path) -> list[Path]:
    """Those of tasks that were probed or trained first, in training order."""
    return sorted(path.parent for path in run.glob("[0-9]*_*/expansion.json"))


def growth(run: Path) -> list[dict[str, Any]]:
    """By task, as recorded: its name and its blocks' decisions."""
    recorded: list[dict[str, Any]] = read_json(checkpoints(run)[-1] / "expansion.json")
    return recorded


def spread(values: list[float]) -> str:
    """Mean, and the range where values differ."""
    same = min(values) == max(values)
    return f"{mean(values):.2f}" if same else f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


# ---- Where experts are added


def depth(runs: list[Path]) -> None:
    """Experts that a later task added to each block, on average; the first task's initial experts do not count."""
    tasks = [task["blocks"] for run in runs for task in growth(run) if task["blocks"]]
    names = list(tasks[0])
    rows = [[str(number), spread([float(task[name]["added"]) for task in tasks])] for number, name in enumerate(names)]
    table(["block", "experts added by a task"], rows)


def alpha(runs: list[Path], values: list[float]) -> None:
    """Experts that a task would have asked for under other thresholds, with everything before it unchanged."""
    tasks = [list(task["blocks"].values()) for run in runs for task in growth(run) if task["blocks"]]

    def asked(blocks: list[dict[str, Any]], value: float) -> int:
        return sum(decide(torch.tensor(b["activations"]).double(), b["probes"], value).probed for b in blocks)

    rows = [[f"{value:g}", spread([asked(blocks, value) / len(blocks) for blocks in tasks])] for value in values]
    table(["alpha", "share of the blocks extended"], rows)


# ---- How experts differ


def products(checkpoint: Path, rank: int) -> Iterator[tuple[str, list[tuple[Tensor, Tensor]]]]:
    """Each adapted linear and its experts ``A [r, din]``, ``B [dout, r]`` in float64, oldest first."""
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    for name in sorted({key.rpartition(".")[0] for key in tensors if ".clmoe_experts." in key}):
        parts = [part for part in ("frozen_", "") if f"{name}.{part}A" in tensors]
        A = torch.cat([tensors[f"{name}.{part}A"] for part in parts]).double()
        B = torch.cat([tensors[f"{name}.{part}B"] for part in parts], dim=1).double()
        yield name, list(zip(A.split(rank), B.split(rank, 1), strict=True))


def cosine(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Cosine of two updates ``B A``, as vectors, without making them."""

    def inner(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
        return float(((a[0] @ b[0].t()) * (a[1].t() @ b[1])).sum())

    return inner(one, other) / (inner(one, one) * inner(other, other)) ** 0.5


def experts(runs: list[Path]) -> None:
    """What added experts began as, and how similar they are at the end to the older ones of their linear."""
    copied, nearest, initial, others = [], [], [], []
    for run in runs:
        last = checkpoints(run)[-1]
        config, recorded = read_json(last / "adapter_config.json"), growth(run)
        decisions = {block: task["blocks"][block] for task in recorded for block in task["blocks"]}
        for task in recorded:
            for block in decisions:
                if task["blocks"] and task["blocks"][block]["added"]:
                    found = task["blocks"][block]
                    activations = found["activations"]
                    copied.append(activations.index(max(activations)) >= len(activations) - found["probes"])
        for name, all_experts in products(last, config["rank"]):
            owners = config["layout"][name.split(".layers.")[1].split(".")[0]]
            first = owners.count(owners[0])
            initial += [cosine(a, b) for a, b in combinations(all_experts[:first], 2)]
            for place in range(first, len(all_experts)):
                alike = [cosine(all_experts[place], older) for older in all_experts[:place]]
                nearest.append(max(alike))
                others.append(mean(alike))
    table(
        ["figure", "mean (range)"],
        [
            ["added experts that began as the trained probe, not as an older expert", f"{100 * mean(copied):.0f} %"],
            ["cosine of two initial experts", spread(initial)],
            ["cosine of an added expert and an older one", spread(others)],
            ["the same, the older one that is most alike", spread(nearest)],
        ],
    )


# ---- Probing again


def probe(previous: Path, checkpoint: Path, output: Path, setting: str, where: list[str]) -> Decisions:
    """Probe the task of `checkpoint` again and return the decisions."""
    if not (output / "expansion.json").is_file():
        task = read_json(checkpoint / "continual.json")["tasks"][-1]
        command = ["clmoe", "train", "--config", str(checkpoint / "config.yaml"), *where, "--task", task]
        command += ["--previous", str(previous), "--output", str(output), setting, *ONE_STEP]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return {block: row["probed"] for block, row in read_json(output / "expansion.json")[-1]["blocks"].items()}


def agreement(all_decisions: list[Decisions]) -> float:
    """Share of blocks with the same number in all decisions."""
    return mean(len({decisions[block] for decisions in all_decisions}) == 1 for block in all_decisions[0])


def agreement_of_pairs(all_decisions: list[Decisions]) -> float:
    """Mean over pairs of the share of blocks with the same number."""
    return mean(agreement([a, b]) for a, b in combinations(all_decisions, 2))


def chance(all_decisions: list[Decisions]) -> float:
    """Mean over pairs of the expected share of equal blocks if each one's numbers were shuffled over the blocks."""

    def share(decisions: Decisions, number: int) -> float:
        return mean(value == number for value in decisions.values())

    return mean(sum(share(a, n) * share(b, n) for n in set(a.values())) for a, b in combinations(all_decisions, 2))


def probe_all(run: Path, output: Path, vary: str, benchmark: str) -> None:
    """The experts asked for in each block under each value; the share of blocks on which all values agree, on which two
    agree on average, and on which two would agree if their numbers were shuffled over the blocks.
    """
    key, _, values = vary.partition("=")
    where = ["--benchmark", benchmark, "--order", ",".join(read_json(run / "run.json")["order"])]
    rows, shares = [], []
    for previous, checkpoint in pairwise(checkpoints(run)):
        outputs = [(value, output / f"{key}={value}" / checkpoint.name) for value in values.split(",")]
        found = [probe(previous, checkpoint, folder, f"{key}={value}", where) for value, folder in outputs]
        shares.append((agreement(found), agreement_of_pairs(found), chance(found)))
        numbers = [" ".join(map(str, decisions.values())) for decisions in found]
        rows.append([checkpoint.name, *numbers, *(f"{100 * x:.0f} %" for x in shares[-1])])
    means = [f"{100 * mean(column):.0f} %" for column in zip(*shares, strict=True)]
    rows.append(["mean", *("" for _ in values.split(",")), *means])
    table(["task", *(f"{key}={value}" for value in values.split(",")), "all agree", "pairs agree", "by chance"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("depth", "alpha", "experts"):
        verbs.add_parser(verb).add_argument("runs", type=Path, nargs="+")
    floats = {"type": lambda text: list(map(float, text.split(","))), "default": [0.0, 0.4, 0.8, 1.2, 1.6, 2.0]}
    verbs.choices["alpha"].add_argument("--values", **floats)  # type: ignore[arg-type]
    again = verbs.add_parser("probe")
    again.add_argument("run", type=Path)
    again.add_argument("output", type=Path)
    again.add_argument("--vary", default="options.probe_seed=0,1,2")
    again.add_argument("--benchmark", default="playground-coin")
    args = vars(parser.parse_args())
    tables: dict[str, Callable[..., None]] = {"depth": depth, "alpha": alpha, "experts": experts, "probe": probe_all}
    tables[args.pop("verb")](**args)


if __name__ == "__main__":
    main()
