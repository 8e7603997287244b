"""Follows the docs/add-a-*.md pages to the letter in a copy of the checkout, and checks the links of all pages."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clmoe import cli
from clmoe.bases.families import FAMILIES
from clmoe.config import LocatorConfig
from clmoe.evaluate.matrix import GENERAL_METRICS, METRICS, general_metrics, metrics_from_files, read_general_csv
from clmoe.locators.base import Asked
from clmoe.methods.base import Method
from tests.launch import environment
from tests.runs import Runs
from tests.support import TASKS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
NAMED_BLOCK = re.compile(r"^`([^`\n]+)`[^\n]*:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)]+)\)")
SHELL_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the parts of the checkout that a walk-through touches, without git and data."""
    for name in ("clmoe", "configs", "scripts", "tests", "playground/base"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def named_blocks(page: str) -> dict[str, str]:
    """The page's blocks that follow a line beginning with a file name, by that name."""
    return dict(NAMED_BLOCK.findall((DOCS / page).read_text()))


def run(checkout: Path, script: str) -> str:
    """Run shell lines in the checkout, as a user in the installed environment does, and return what they print."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = environment() | {"PYTHONPATH": str(checkout), "PATH": path}
    command = ["bash", "-euc", f"exec 2>&1; {script}"]
    done = subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def typed(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Sequence[str]], str]:
    """Runs shell lines in the checkout and returns what they print.

    Lines that begin with `clmoe` run in this process, because a process of their own takes ten seconds to start.
    """
    monkeypatch.chdir(checkout)

    def type_lines(lines: Sequence[str]) -> str:
        for line in lines:
            if line.startswith("clmoe "):
                cli.main(shlex.split(line)[1:])
            else:
                print(run(checkout, line))
        return capsys.readouterr().out

    return type_lines


def test_the_worked_example_of_every_metric(tmp_path: Path) -> None:
    page = (DOCS / "metrics.md").read_text()
    table, known = re.findall(r"```\n(after,.*?)```", page, re.DOTALL)[0], re.findall(r"With K = ([\d, ]+):", page)[0]
    (tmp_path / "matrix.csv").write_text(table)
    (tmp_path / "known.csv").write_text(f"after,a,b,c\nknown,{known}\n")
    found, _ = metrics_from_files(tmp_path / "matrix.csv", tmp_path / "known.csv")
    (tmp_path / "general.csv").write_text(re.findall(r"```\n(after,.*?)```", page, re.DOTALL)[1])
    found |= general_metrics(read_general_csv(tmp_path / "general.csv", ("a", "b", "c"))[1], "c")
    rows = re.findall(r"^\| `(\w+)` \| ([\d() /+-]+) \| (\S+) \|$", page, re.MULTILINE)
    assert [name for name, *_ in rows] == [*METRICS, *GENERAL_METRICS]
    for name, by_hand, printed in rows:
        assert f"{found[name]:.2f}" == printed == f"{eval(by_hand):.2f}", name  # eval of numbers on our own page


def test_a_method_of_ones_own_runs_without_the_package(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "my_method.py").write_text(named_blocks("add-a-method.md")["my_method.py"])
    shell = SHELL_BLOCK.findall((DOCS / "add-a-method.md").read_text())[0].splitlines()
    shown, *_ = [shlex.split(line)[1:] for line in shell]
    assert [line.split()[:3] for line in shell] == [
        ["clmoe", "run", "my_method.py"], ["clmoe", "run", "lora"], ["clmoe", "report", "runs/anchor"],
    ]  # fmt: skip
    settings = [argument for argument in shown if "=" in argument]
    where = ["--base", str(runs.model), "--output", str(tmp_path / "run"), "--order", TASKS[0]]
    cli.main(["run", str(tmp_path / "my_method.py"), str(runs.benchmark), *where, *settings])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["label"] == "anchor"


@pytest.mark.slow
def test_the_method_of_the_page_keeps_every_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is checked with the page's own `clmoe check-method` line. The page's other method is the package's `agem`."""
    name = "my_method.py"
    (tmp_path / name).write_text(named_blocks("add-a-method.md")[name])
    lines = "\n".join(SHELL_BLOCK.findall((DOCS / "add-a-method.md").read_text())).splitlines()
    (line,) = [line for line in lines if line.startswith(f"clmoe check-method {name}")]
    monkeypatch.chdir(tmp_path)
    cli.main(shlex.split(line)[1:])
    *found, last = capsys.readouterr().out.splitlines()
    assert len(found) == 7 and all(line.startswith("ok ") for line in found), found
    assert last == f"{name}: keeps every promise"


@pytest.mark.slow
def test_a_method_is_one_file_one_yaml_and_one_row(checkout: Path) -> None:
    blocks = named_blocks("add-a-method.md")
    contract, method = "tests/methods/test_contract.py", "clmoe/methods/anchor.py"
    gradients = blocks.pop("my_agem.py")
    assert gradients == (ROOT / "clmoe/methods/agem.py").read_text(), "the page shows the package's file"
    assert list(blocks) == ["my_method.py", "configs/methods/anchor.yaml", contract, "tests/methods/test_anchor.py"]
    blocks[method] = blocks.pop("my_method.py")
    for name, text in blocks.items():
        path = checkout / name
        assert path.exists() == (name == contract)
        if name == contract:
            before = path.read_text()
            text = before.replace("ROWS = {\n", f"ROWS = {{\n{text}")
            assert text != before
        path.write_text(text)
    shells = SHELL_BLOCK.findall((DOCS / "add-a-method.md").read_text())
    (tests,) = [shell for shell in shells if "pytest" in shell]
    printed = run(checkout, tests)
    # six tests of the contract are for methods that are continued; three more are for all methods or are its own
    assert re.search(r"^(\d+) passed", printed.splitlines()[-1]), printed
    assert int(printed.splitlines()[-1].split()[0]) >= 9, printed


@pytest.mark.slow
def test_a_locator_is_one_file_and_one_line(checkout: Path, tmp_path: Path) -> None:
    ((name, text),) = named_blocks("add-a-locator.md").items()
    assert not (checkout / name).exists()
    (checkout / name).write_text(text)
    rooms = checkout / "clmoe/locators/__init__.py"
    source = rooms.read_text().replace('"vae": Vae,\n', '"vae": Vae,\n    "diagonal": Diagonal,\n')
    rooms.write_text(source.replace("\nLOCATORS:", "\nfrom clmoe.locators.diagonal import Diagonal\n\nLOCATORS:"))
    test, evaluate = SHELL_BLOCK.findall((DOCS / "add-a-locator.md").read_text())[0].splitlines()
    printed = run(checkout, test)
    assert re.search(r"^1 passed", printed.splitlines()[-1]), printed
    assert "scripts/eval.sh playground-coin locator=diagonal" in evaluate

    namespace: dict[str, Any] = {}
    exec(text, namespace)
    locator, restored = (namespace["Diagonal"](LocatorConfig("diagonal"), 0) for _ in range(2))
    means = torch.tensor([[0.0] * 4, [3.0] * 4])
    for mean in means:
        locator.fit(mean + torch.randn(50, 4, generator=torch.Generator().manual_seed(0)))
    locator.save(tmp_path / "locator.safetensors")
    restored.load(tmp_path / "locator.safetensors")
    scores = restored.scores(Asked(["a", "b"], 2, features=means))
    assert scores.argmax(1).tolist() == [0, 1]
    assert torch.equal(scores, locator.scores(Asked(["a", "b"], 2, features=means)))


@pytest.mark.slow
def test_a_benchmark_is_data_and_one_yaml(checkout: Path, typed: Callable[[Sequence[str]], str]) -> None:
    blocks = {name: text for name, text in named_blocks("add-your-data.md").items() if "easy" not in name}
    for name, text in blocks.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    (checkout / "my" / "images").mkdir()
    rows = [row for name, text in blocks.items() if name.endswith(".json") for row in json.loads(text)]
    for name in {row["image"] for row in rows}:
        Image.new("RGB", (40, 30), "blue" if name == "b.png" else "red").save(checkout / "my" / "images" / name)
    _, script = SHELL_BLOCK.findall((DOCS / "add-your-data.md").read_text())
    printed = typed(script.splitlines())
    assert re.search(r"^colour +2 train +1 test +0 bad$", printed, re.MULTILINE)
    assert "after choice: colour " in printed
    matrix = (checkout / "runs/colours/lora-seed0/matrix.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in matrix] == ["after", "colour", "choice"]
    assert matrix[0] == "after,colour,choice"
    text = (checkout / "runs/colours/report/report.md").read_text()
    assert "not alike" not in text, "a method differs from another in what the benchmark leaves open"


@pytest.mark.slow
def test_a_package_of_others_becomes_a_table_and_a_page(checkout: Path, typed: Callable[[Sequence[str]], str]) -> None:
    """Follows the page to the letter, but skips the installation, draws a tenth of the pictures and trains for less."""
    pytest.importorskip("easy_vqa", reason="needs the package easy-vqa, which the development tools have")
    blocks = {name: text for name, text in named_blocks("add-your-data.md").items() if "easy" in name}
    table = "my/easy_vqa_tables.py"
    blocks[table], changed = re.subn(r", (10+)0\)", r", \1)", blocks[table])
    assert changed == 2, "of the training and of the test pictures"
    for name, text in blocks.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    script, _ = SHELL_BLOCK.findall((DOCS / "add-your-data.md").read_text())
    install, *lines = script.splitlines()
    assert install == "pip install easy-vqa"
    lines = [f"{line} training.steps=3" if line.startswith("clmoe run") else line for line in lines]
    printed = typed(lines)
    counts = re.findall(r"^(\w+) +(\d+) train +(\d+) test +0 bad$", printed, re.MULTILINE)
    assert [name for name, *_ in counts] == ["shape", "colour", "presence"]
    for name, *rows in counts:
        for split, number in zip(("train", "test"), rows, strict=True):
            made = json.loads((checkout / f"my/prepared/{name}/{split}.json").read_text())
            assert len(made) == int(number) == (checkout / f"my/{name}-{split}.csv").read_text().count("\n") - 1
    page = (checkout / "runs/easy-vqa/report/report.html").read_text()
    assert "Report: easy-vqa" in (checkout / "runs/easy-vqa/report/report.md").read_text()
    assert all(word in page for word in ("separate", "lora", "presence", "<svg"))


@pytest.mark.slow
def test_a_base_is_a_row_and_a_tiny_model_of_it(checkout: Path) -> None:
    blocks = named_blocks("add-a-base.md")
    table, model, tiny = "clmoe/bases/families.py", "configs/models/paligemma-3b.yaml", "tests/bases/tiny_families.py"
    assert list(blocks) == [table, model, tiny]
    assert sum(len(text.splitlines()) for text in blocks.values()) <= 80
    for name in (table, tiny):
        before = (checkout / name).read_text()
        (checkout / name).write_text(before.replace("FAMILIES = {\n", f"FAMILIES = {{\n{blocks[name]}"))
        assert (checkout / name).read_text() != before
    (checkout / model).write_text(blocks[model])
    test, shown = SHELL_BLOCK.findall((DOCS / "add-a-base.md").read_text())[0].splitlines()
    printed = run(checkout, test)
    assert re.search(r"^(\d+) passed", printed.splitlines()[-1]), printed
    assert int(printed.splitlines()[-1].split()[0]) >= 18, printed
    assert shown.split()[-2:] == ["--base", Path(model).stem]


def test_the_page_of_bases_lists_every_family() -> None:
    table = (DOCS / "bases.md").read_text().split("<!-- end -->")[0]
    assert re.findall(r"^\| (\w+) \| \d", table, re.MULTILINE) == list(FAMILIES), "run scripts/bases_page.py"


@pytest.mark.parametrize("page", ["../README.md", *sorted(path.name for path in DOCS.glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    path = DOCS / page
    for target, _, anchor in (link.partition("#") for link in LINK.findall(path.read_text())):
        found = path.parent / target if target else path
        assert found.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, anchor


def test_the_hooks_examples_exist() -> None:
    for name in re.findall(r"`([a-z_]+\.py)`", (DOCS / "add-a-method.md").read_text().split("## The hooks")[1]):
        assert (ROOT / "clmoe" / "methods" / name).is_file(), name


def test_the_tests_of_published_faults_exist() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    page = (DOCS / "faults.md").read_text()
    names = re.findall(r"(?:`|::)(test_\w+)(?!\.py)\b", page)
    assert len(names) > 20
    assert not [name for name in names if f"def {name}(" not in tests]
    for path in re.findall(r"tests/[\w/]+\.py", page):
        assert (ROOT / path).is_file(), path


def test_every_hook_is_in_the_walk_through() -> None:
    """The page's table names exactly what a subclass may override, no more and no less."""
    hooks = {name for name in vars(Method) if not name.startswith("_")}
    table = (DOCS / "add-a-method.md").read_text().split("## The hooks")[1]
    named = {name for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == hooks
