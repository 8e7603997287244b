"""What docs/add-a-method.md and docs/add-a-benchmark.md say, done literally in a copy of the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
NAMED_BLOCK = re.compile(r"^`([^`\n]+)`[^\n]*:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a walk-through touches, without git and data."""
    for name in ("clmoe", "configs", "scripts", "tests", "playground/base"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def named_blocks(page: str) -> dict[str, str]:
    """The page's blocks that follow a line which begins with a file name."""
    return dict(NAMED_BLOCK.findall((DOCS / page).read_text()))


def run(checkout: Path, script: str) -> str:
    """Run shell lines in the checkout, as a user with the installed environment does; returns what they print."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_method_is_one_file_one_yaml_and_one_row(checkout: Path) -> None:
    blocks = named_blocks("add-a-method.md")
    contract = "tests/methods/test_contract.py"
    assert list(blocks) == [
        "clmoe/methods/anchor.py", "configs/methods/anchor.yaml", contract, "tests/methods/test_anchor.py",
    ]  # fmt: skip
    for name, text in blocks.items():
        path = checkout / name
        assert path.exists() == (name == contract)
        if name == contract:
            before = path.read_text()
            text = before.replace("ROWS = {\n", f"ROWS = {{\n{text}")
            assert text != before
        path.write_text(text)
    command, *others = SHELL_BLOCK.findall((DOCS / "add-a-method.md").read_text())[0].splitlines()
    printed = run(checkout, command)
    # a method that is continued has eight tests in the contract, three more have all methods or are its own
    assert re.search(r"^(\d+) passed", printed.splitlines()[-1]), printed
    assert int(printed.splitlines()[-1].split()[0]) >= 11, printed
    assert all(re.match(r"(bash scripts/sequence\.sh playground-coin|clmoe report) ", line) for line in others)


def test_a_benchmark_is_data_and_one_yaml(checkout: Path) -> None:
    blocks = named_blocks("add-a-benchmark.md")
    for name, text in blocks.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    (checkout / "my" / "images").mkdir()
    rows = [row for name, text in blocks.items() if name.endswith(".json") for row in json.loads(text)]
    for name in {row["image"] for row in rows}:
        Image.new("RGB", (40, 30), "blue" if name == "b.png" else "red").save(checkout / "my" / "images" / name)
    (script,) = SHELL_BLOCK.findall((DOCS / "add-a-benchmark.md").read_text())
    printed = run(checkout, script)
    assert re.search(r"^colour +2 train +1 test +0 bad$", printed, re.MULTILINE)
    assert "after choice: colour " in printed
    matrix = (checkout / "runs/colours/lora-seed0/matrix.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in matrix] == ["after", "colour", "choice"]
    assert matrix[0] == "after,colour,choice"
    assert (checkout / "runs/colours/lora-seed0/report/report.md").is_file()


@pytest.mark.parametrize("page", ["add-a-method.md", "add-a-benchmark.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", (DOCS / page).read_text()):
        assert (DOCS / target).exists(), target
    for name in re.findall(r"`([a-z_]+\.py)`", (DOCS / page).read_text()):
        assert (ROOT / "clmoe" / "methods" / name).is_file(), name


def test_every_hook_is_in_the_walk_through() -> None:
    """The table names what a subclass may override: no more and no less."""
    from clmoe.methods.base import Method

    hooks = {name for name in vars(Method) if not name.startswith("_")}
    table = (DOCS / "add-a-method.md").read_text().split("## The hooks")[1]
    named = {name for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == hooks
