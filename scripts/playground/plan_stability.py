"""How stable are LLaVA-CMoE's decisions where to add experts? Probe the tasks of a run again under other probe seeds.

    python scripts/playground/plan_stability.py RUN OUT [--seeds 0,1,2] [--benchmark playground-coin]

RUN is a run folder of `llava_cmoe`. Each task but the first is probed again from the checkpoint before it, with
the run's own settings, into OUT; after the decision one step of training and of fitting the locator is enough. Prints a
Markdown table: the experts asked for in each block under each probe seed, the share of blocks on which all seeds agree,
on which two seeds agree on average, and on which two would agree if their numbers were shuffled over the blocks.
"""

import argparse
import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path
from statistics import mean

from clmoe.utils.files import read_json

ONE_STEP = ("training.steps=1", "locator.options.steps=1")
Decisions = dict[str, int]  # block -> experts that the probes asked for


def probe(previous: Path, checkpoint: Path, output: Path, seed: int, where: list[str]) -> Decisions:
    """Probe the task of `checkpoint` again and return the decisions."""
    task = read_json(checkpoint / "continual.json")["tasks"][-1]
    command = ["clmoe", "train", "--config", str(checkpoint / "config.yaml"), *where, "--task", task]
    command += ["--previous", str(previous), "--output", str(output), f"options.probe_seed={seed}", *ONE_STEP]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=lambda text: list(map(int, text.split(","))), default=[0, 1, 2])
    parser.add_argument("--benchmark", default="playground-coin")
    args = parser.parse_args()
    where = ["--benchmark", args.benchmark, "--order", ",".join(read_json(args.run / "run.json")["order"])]
    checkpoints = sorted(folder for folder in args.run.iterdir() if (folder / "expansion.json").is_file())
    print("| task | experts asked for, by probe seed | all agree | pairs agree | by chance |\n|---|---|---:|---:|---:|")
    shares = []
    for previous, checkpoint in pairwise(checkpoints):
        outputs = [(seed, args.output / f"probe{seed}" / checkpoint.name) for seed in args.seeds]
        found = [probe(previous, checkpoint, output, seed, where) for seed, output in outputs]
        shares.append((agreement(found), agreement_of_pairs(found), chance(found)))
        numbers = "; ".join(" ".join(map(str, decisions.values())) for decisions in found)
        print(f"| {checkpoint.name} | {numbers} | {' | '.join(f'{100 * x:.0f} %' for x in shares[-1])} |", flush=True)
    print(f"| mean | | {' | '.join(f'{100 * mean(column):.0f} %' for column in zip(*shares, strict=True))} |")


if __name__ == "__main__":
    main()
