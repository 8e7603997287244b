"""docs/api.md says what the code says, and names every file of a run folder and every variable."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from clmoe import cli
from tests.runs import Runs
from tests.support import TASKS, load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_script("api_page")


def test_the_page_is_what_the_code_says(generator: ModuleType) -> None:
    assert generator.PAGE.read_text() == generator.api_page(), "run `python scripts/api_page.py` and read what changed"


def test_a_row_says_key_type_default_and_meaning(generator: ModuleType) -> None:
    """The reader of docstrings on rows that are easy to get wrong: two names, nested, a choice, none."""
    page = generator.api_page()
    for row in (
        "| `adapter.router_top_k` | int \\| null | `null` | experts per token; None mixes all. |",
        "| `options.locator.steps` | int | `2000` | of the fit. |",
        '| `model.attention` | sdpa \\| flash_attention_2 \\| eager | `"sdpa"` |',
        "| `options.probe_min_steps` | int | `100` | *open*: length of the probe training. |",
        "| `--router located\\|oracle\\|last\\|random` | `located` |",
        "| `key=value` |  | for instance training.steps=20 |",
        "| `.answer(image, question, max_new_tokens=64, router='located', task=None)` | Answer one question",
    ):
        assert row in page


def test_every_file_of_a_run_folder_is_named(generator: ModuleType, runs: Runs, tmp_path: Path) -> None:
    settings = ("adapter.train_projector=false", "options.probe_min_steps=2", "options.locator.steps=20")
    run = runs.evaluate(runs.chain("llava_cmoe", *settings)[1], tmp_path / "run", order=",".join(TASKS[:2]))
    other = runs.evaluate(runs.chain("clmoe")[1], tmp_path / "other", order=",".join(TASKS[:2]))
    cli.main(["report", str(run), "--format", "csv"])
    paths = [path for folder in (run, other) for path in folder.iterdir() if path.name[0] != "."]
    found = {f"{path.name}/" if path.is_dir() else path.name for path in paths}
    assert found == generator.RUN_FILES.keys() - {"NN_task/"}


def test_every_variable_is_named(generator: ModuleType) -> None:
    sources = [path.read_text() for path in (ROOT / "clmoe").rglob("*.py")]
    used = {name for text in sources for name in re.findall(r"\bCLMOE_[A-Z_]+\b", text)}
    assert used == {name for name in generator.ENVIRONMENT if name.startswith("CLMOE_")}


def test_every_variable_that_a_script_takes_is_named(generator: ModuleType) -> None:
    """Those with a default or an alternative, and those that no script sets."""
    lines = [line for path in (ROOT / "scripts").rglob("*.sh") for line in path.read_text().splitlines()]
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    optional = set(re.findall(r"\$\{([A-Z_]{2,}):?[-+]", text))
    needed = set(re.findall(r"\$\{?([A-Z_]{2,})", text)) - set(re.findall(r"^\s*([A-Z_]{2,})=", text, re.MULTILINE))
    taken = {name for name in optional | needed if not name.startswith(("SLURM_", "BASH_"))}
    named = {name for names in generator.ENVIRONMENT for name in names.split(", ")}
    assert taken == {name for name in named if not name.startswith("CLMOE_")}
