"""How stable is LLaVA-CMoE's extension plan? Probe every task of a finished run again under other probe seeds.

    python scripts/playground/plan_stability.py RUN OUT [--seeds 0 1 2] [--benchmark playground-coin]

RUN is a run folder of `llava_cmoe`. Each task but the first is probed from the checkpoint before it, with the run's own
settings but one step of training and of fitting the locator after the decision, into OUT. Prints a Markdown table:
experts asked for in each block under each probe seed, the share of block decisions on which all seeds agree, on which
two seeds agree on average, and on which two would agree if the same numbers lay in random blocks.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path
from statistics import mean

import yaml

from clmoe.utils.files import read_json

Plan = dict[str, int]  # block -> experts that the probes asked for


def probe(previous: Path, checkpoint: Path, output: Path, seed: int, benchmark: str, order: str) -> Plan:
    """Probe the task of `checkpoint` again; returns its plan."""
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    config["options"]["probe_seed"] = seed
    config["training"]["steps"] = config["options"]["locator"]["steps"] = 1  # neither bears on the plan
    settings = output.parent / f"{output.name}.yaml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(yaml.safe_dump(config))
    task = read_json(checkpoint / "continual.json")["tasks"][-1]
    command = ["clmoe", "train", "--config", str(settings), "--benchmark", benchmark, "--order", order, "--task", task]
    command += ["--output", str(output), "--previous", str(previous)]
    # the benchmark's recipe goes over the file, so what it sets is repeated here
    subprocess.run([*command, "training.steps=1"], check=True, stdout=sys.stderr)
    return {block: row["probed"] for block, row in read_json(output / "plan.json")[-1]["blocks"].items()}


def agreement(plans: list[Plan]) -> float:
    """Share of blocks with the same number in all plans."""
    return mean(len({plan[block] for plan in plans}) == 1 for block in plans[0])


def chance(plans: list[Plan]) -> float:
    """Mean over pairs of plans of the expected share of equal blocks if each plan's numbers were shuffled."""
    pairs = []
    for a, b in combinations(plans, 2):
        numbers = set(a.values()) | set(b.values())
        shares = [mean(n == number for n in plan.values()) for number in numbers for plan in (a, b)]
        pairs.append(sum(x * y for x, y in zip(shares[::2], shares[1::2], strict=True)))
    return mean(pairs)


def agreement_of_pairs(plans: list[Plan]) -> float:
    """Mean over pairs of plans of the share of equal blocks."""
    return mean(agreement([a, b]) for a, b in combinations(plans, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--benchmark", default="playground-coin")
    args = parser.parse_args()
    order = ",".join(read_json(args.run / "run.json")["order"])
    checkpoints = sorted(folder for folder in args.run.iterdir() if (folder / "plan.json").is_file())
    print("| task | experts asked for, by probe seed | all agree | pairs agree | by chance |\n|---|---|---:|---:|---:|")
    every: list[tuple[float, float, float]] = []
    for previous, checkpoint in pairwise(checkpoints):
        plans = [
            probe(previous, checkpoint, args.output / f"probe{seed}" / checkpoint.name, seed, args.benchmark, order)
            for seed in args.seeds
        ]
        every.append((agreement(plans), agreement_of_pairs(plans), chance(plans)))
        counts = "; ".join(" ".join(str(n) for n in plan.values()) for plan in plans)
        print(f"| {checkpoint.name} | {counts} | {' | '.join(f'{100 * x:.0f} %' for x in every[-1])} |", flush=True)
    print(f"| mean | | {' | '.join(f'{100 * mean(column):.0f} %' for column in zip(*every, strict=True))} |")


if __name__ == "__main__":
    main()
