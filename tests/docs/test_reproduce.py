"""docs/reproduce.md: every command on it exists and runs in its dry form, and its hours are the computed ones."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from clmoe import cli
from tests.docs.test_walkthroughs import DOCS, ROOT, SHELL_BLOCK
from tests.launch import environment
from tests.trees import TREES

PAGE = (DOCS / "reproduce.md").read_text()
LINES = [line for block in SHELL_BLOCK.findall(PAGE) for line in block.splitlines()]
OTHERS = ("git clone", "cd clmoe", "python3.12 -m venv", "source .venv", "pip install", "hf download")
"""Commands of other programs, which need a network connection."""
LONG = ("clmoe doctor", "bash scripts/gpu_kit.sh", "python scripts/bench/hours.py", "clmoe data prepare")
"""Commands that have tests of their own."""
LINES_THAT_TRAIN = sum(bool(re.match(r"(OUT=|SCRIPT=)", line)) for line in LINES)


def test_every_verb_of_clmoe_takes_these_arguments() -> None:
    """The arguments are only parsed; nothing is read or written."""
    lines = [line for line in LINES if line.startswith("clmoe ")]
    assert {line.split()[1] for line in lines} == {"convert", "data", "doctor", "eval", "plan", "report"}
    for line in lines:
        cli._parse(shlex.split(line)[1:])


def test_every_script_and_file_exists() -> None:
    names = set(re.findall(r"scripts/[\w/]+\.(?:sh|py)", PAGE))
    assert len(names) > 10 and all((ROOT / name).is_file() for name in names)
    others = [line for line in LINES if not re.search(r"^clmoe |scripts/|^export ", line)]
    assert all(line.startswith(OTHERS) for line in others)


@pytest.mark.slow
def test_the_runs_start_in_their_dry_form(tmp_path: Path) -> None:
    """On miniature trees, with the page's paths replaced, scripts print what they would start; plan and check run."""
    for name in ("coin", "cl4vqa"):
        TREES[name](tmp_path / "data" / name)
    runs = tmp_path / "runs" / "coin" / "clmoe-seed0" / "08_OCR-VQA"
    runs.mkdir(parents=True)
    skipped = (*OTHERS, *LONG, "clmoe convert", "clmoe report", "clmoe eval")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    printed = []
    for block in SHELL_BLOCK.findall(PAGE):
        lines = [line for line in block.splitlines() if not line.startswith(skipped)]
        script = "\n".join(lines).replace("sbatch ", "bash ")
        script = script.replace("/data/", f"{tmp_path}/data/").replace("/runs/", f"{tmp_path}/runs/")
        for line in re.findall(r"^clmoe (.*)\n?", script, re.MULTILINE):
            cli.main(shlex.split(line))
        script = re.sub(r"^clmoe .*\n?", "", script, flags=re.MULTILINE)
        done = subprocess.run(
            ["bash", "-euc", script], cwd=ROOT, env={**environment(), "PATH": path, "DRY_RUN": "1"},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n{done.stdout[-500:]}{done.stderr[-3000:]}"
        printed += done.stdout.splitlines()
    starts = [re.search(r"clmoe\.cli run (\w+) (\w+) .*--base vicuna-7b-v1\.5", line) for line in printed]
    assert len([start for start in starts if start]) == LINES_THAT_TRAIN
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()], "nothing was written"


@pytest.mark.slow
def test_the_hours_are_the_computed_ones() -> None:
    command = [sys.executable, "-W", "ignore", "scripts/bench/hours.py", "--mfu", "0.4"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    table = done.stdout[done.stdout.index("| method") :]
    assert table.count("\n") == 8 and table in PAGE
