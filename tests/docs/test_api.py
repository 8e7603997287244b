"""docs/api.md agrees with the code, and names every file of a run folder and every environment variable."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from clmoe import cli
from tests.bases import test_families
from tests.runs import Runs
from tests.support import TASKS, load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_script("api_page")


@pytest.fixture(scope="module")
def page(generator: ModuleType) -> str:
    return generator.PAGE.read_text(encoding="utf-8")


def named(page: str, section: str) -> set[str]:
    """The names in the first column of a section's table; a row may hold several."""
    cells = re.findall(r"^\| `([^`]+)` \|", page.partition(f"\n## {section}\n")[2].split("\n## ")[0], re.MULTILINE)
    return {name for cell in cells for name in cell.split(", ")}


def test_the_page_is_what_the_code_says(generator: ModuleType, page: str) -> None:
    assert page == generator.api_page(), "run `python scripts/api_page.py` and read what changed"


def test_every_verb_and_every_option_holder_has_a_table(page: str) -> None:
    titles = set(re.findall(r"^### (.*)$", page, re.MULTILINE))
    assert {f"clmoe {verb}" for verb in cli.VERBS} <= titles
    assert {"Top level", "model", "adapter", "locator", "training", "evaluation", "Result"} <= titles
    assert {"LoadedCheckpoint", "Options of method `clmoe`", "Options of locator `vae`"} <= titles


@pytest.mark.slow
def test_every_file_of_a_run_folder_is_named(page: str, runs: Runs, tmp_path: Path) -> None:
    common = [str(runs.benchmark), "--base", str(runs.model), "--order", ",".join(TASKS[:2]), "training.steps=2"]
    growing = ["adapter.train_projector=false", "options.probe_min_steps=2", "locator.options.steps=20"]
    (tmp_path / "choice.json").write_text('{"method": "clmoe", "order": [], "trials": [], "chosen": {}}')
    for method, settings in (("llava_cmoe", growing), ("clmoe", [f"tuned={tmp_path / 'choice.json'}"])):
        cli.main(["run", method, *common, "--output", str(tmp_path / method), *settings])
    cli.main(["report", str(tmp_path / "clmoe"), "--format", "csv"])
    found = {f"{path.name}/" if path.is_dir() else path.name for path in tmp_path.glob("*/[!.]*")}
    checkpoints = {name for name in found if re.fullmatch(r"\d\d_\w+/", name)}
    assert found - checkpoints | {"NN_task/", "general.csv"} == named(page, "Run folders")


def test_every_variable_is_named(page: str) -> None:
    sources = [path.read_text() for path in (ROOT / "clmoe").rglob("*.py")]
    used = {name for text in sources for name in re.findall(r"\bCLMOE_[A-Z_]+\b", text)}
    assert used == {name for name in named(page, "Environment") if name.startswith("CLMOE_")}


def test_every_variable_that_a_script_takes_is_named(page: str) -> None:
    """A script takes a variable if it has a default or an alternative for it, or if no script sets it."""
    lines = [line for path in (ROOT / "scripts").rglob("*.sh") for line in path.read_text().splitlines()]
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    optional = set(re.findall(r"\$\{([A-Z_]{2,}):?[-+]", text))
    needed = set(re.findall(r"\$\{?([A-Z_]{2,})", text)) - set(re.findall(r"^\s*([A-Z_]{2,})=", text, re.MULTILINE))
    taken = {name for name in optional | needed if not name.startswith(("SLURM_", "BASH_"))}
    assert taken == {name for name in named(page, "Environment") if not name.startswith("CLMOE_")}


def test_every_check_of_a_family_has_one_column_of_the_page() -> None:
    checks = [name.removeprefix("test_") for name in vars(test_families) if name.startswith("test_")]
    columns = load_script("bases_page").COLUMNS.values()
    assert [sum(check.startswith(names) for names in columns) for check in checks] == [1] * len(checks)
