"""Kill `clmoe run` with -9 at random moments, run the same line again, and compare with an uninterrupted run.

    python scripts/bench/crash.py OUT [--methods clmoe llava_cmoe] [--kills 20] [--seed 0] [key=value ...]

For each method, a sequence of three tasks of the embedded benchmark (a few steps each) runs once uninterrupted, and
once while being killed. There are `--kills` kills in all, with the methods taking turns. Every file except those that
hold times must then have the same bytes.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
UNCOMPARED = ("events.jsonl", "timing.json")
SHORT = ("training.steps=8", "training.save_steps=2", "evaluation.limit=24", "evaluation.batch_size=8")
OPTIONS = {
    "clmoe": ("options.samples=64", "locator.samples=64"),
    "llava_cmoe": (
        "options.probe_min_steps=8", "locator.samples=64",
        *(f"locator.options.{value}" for value in ("steps=30", "hidden=16", "latent=4", "draws=2")),
    ),
}  # fmt: skip


def start(method: str, run: Path, more: list[str]) -> subprocess.Popen[bytes]:
    """The sequence in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CLMOE_PROGRESS": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    line = ["run", method, "playground-coin", "--order", "sqa,text,imnet", "--output", str(run)]
    command = [sys.executable, "-m", "clmoe.cli", *line, *SHORT, *OPTIONS.get(method, ()), *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def finish(method: str, run: Path, more: list[str]) -> float:
    """Run to the end; return the seconds that it took."""
    begun = time.monotonic()
    if start(method, run, more).wait():
        sys.exit(f"FAILED: {method} in {run} does not end")
    return time.monotonic() - begun


def contents(run: Path) -> dict[str, bytes]:
    """Every file except those that hold times."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name not in UNCOMPARED)
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(files)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(OPTIONS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options, settings = parser.parse_known_args()
    settings += options.settings
    rng = random.Random(options.seed)
    lasted = {method: finish(method, options.out / f"{method}-unbroken", settings) for method in options.methods}
    kills = dict.fromkeys(options.methods, 0)
    while sum(kills.values()) < options.kills:
        method = options.methods[sum(kills.values()) % len(options.methods)]
        process = start(method, options.out / f"{method}-killed", settings)
        time.sleep(rng.uniform(2, max(3.0, 0.5 * lasted[method])))  # rarely a whole run, so that it takes many
        process.kill()
        if process.wait() == -signal.SIGKILL:
            kills[method] += 1
        elif sum(kills.values()) and process.returncode:
            sys.exit(f"FAILED: {method} stopped by itself with {process.returncode}")
        else:  # it had ended before; start over in a new folder
            (options.out / f"{method}-killed").rename(options.out / f"{method}-killed-{kills[method]}")
    for method in options.methods:
        finish(method, options.out / f"{method}-killed", settings)
        expected = contents(options.out / f"{method}-unbroken")
        for folder in sorted(options.out.glob(f"{method}-killed*")):
            found = contents(folder)
            odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            if odd:
                sys.exit(f"FAILED: {folder}: {odd[:5]} differ from the uninterrupted run")
        print(f"{method}: {kills[method]} kills survived, {len(expected)} files of equal bytes")


if __name__ == "__main__":
    main()
