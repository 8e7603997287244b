"""scripts/grid.py: what a row runs, and that a grid resumes after any stop. A stub for `clmoe` trains nothing."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from clmoe.benchmarks.base import load_benchmark
from clmoe.config import dump_config, load_config
from clmoe.errors import ClmoeError
from tests.support import load_script

FILE = """
rows:
  lora: {once: true}
  slow: {method: clmoe, order: rev, set: [options.gamma=0.9], locators: [oracle]}
  beta1: {of: slow, set: [options.beta=1]}
  real: {benchmark: coin}
grids:
  g: {title: G, sections: {first: [beta1, lora, slow, real], second: [slow, slow_oracle]}}
"""
# a `clmoe run` that leaves two checkpoints and fails or waits when told to; a `clmoe eval` likewise
STUB = """
import pathlib, sys, time
here, (verb, *arguments) = pathlib.Path(sys.argv[1]), sys.argv[2:]
out = pathlib.Path(arguments[arguments.index("--output") + 1])
with (here / "calls").open("a") as file:
    file.write(f"{verb} {out.name}\\n")
for task in ("01_a", "02_b"):
    (out / task).mkdir(parents=True, exist_ok=True)
if (here / f"fail {out.name}").exists():
    sys.exit("clmoe: options.gamma must lie between 0 and 1")
if (here / "wait").exists():
    (here / "ready").touch()
    time.sleep(60)
"""


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = load_script("grid")
    (tmp_path / "grids.yaml").write_text(FILE)
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(module, "CLMOE", [sys.executable, str(tmp_path / "stub.py"), str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield module
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, list[str]]:
    """Run the grid; return the exit code and the calls of `clmoe` so far."""
    monkeypatch.setattr("sys.argv", ["grid.py", "g", *arguments, "--file", "grids.yaml", "--out", "out"])
    code = module.main()
    return code, Path("calls").read_text().splitlines()


def make(module: ModuleType, **changed: Any) -> Any:
    given = {"file": Path("grids.yaml"), "grid": "g", "benchmark": "playground-coin", "only": [], "out": Path("out")}
    given |= {"data": None, "base": None, "order": "norm", "tuned": None, "jobs": 1, "overrides": []}
    return module.Grid(SimpleNamespace(**given | changed))


def test_a_row_becomes_one_command_or_one_for_each_checkpoint(grid: ModuleType) -> None:
    Path("out/slow-seed3/01_a").mkdir(parents=True)
    Path("out/slow-seed3/02_b").mkdir()
    made = make(grid, data="/d", base="/b", overrides=["training.steps=3", "evaluation.limit=5"])
    (command,) = made.commands(made.rows["slow"], 3)
    assert " ".join(command[len(grid.CLMOE) :]) == (
        "run clmoe playground-coin --order rev --output out/slow-seed3 --data /d --seed 3 --base /b label=slow "
        "options.gamma=0.9 training.steps=3 evaluation.limit=5"
    )
    for label, override in (("beta1", "options.beta=1"), ("slow_oracle", "locator=oracle")):
        assert [" ".join(command[len(grid.CLMOE) :]) for command in made.commands(made.rows[label], 3)] == [
            f"eval --benchmark playground-coin --order rev --output out/{label}-seed3 --data /d "
            f"--checkpoint out/slow-seed3/{task} label={label} {override} evaluation.limit=5"
            for task in ("01_a", "02_b")
        ]
    assert made.commands(made.rows["beta1"], 4) == []
    assert [row.label for row in make(grid, only=["beta1"]).chosen] == ["slow", "beta1"]
    assert [row.label for row in make(grid, benchmark="a/coin.yaml").chosen][-1] == "real"


def test_a_grid_runs_in_the_files_order_and_a_second_time_does_nothing(
    grid: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, calls = run(grid, monkeypatch, "--seeds", "0")
    evaluations = [f"eval {label}-seed0" for label in ("slow_oracle", "beta1") for _ in range(2)]
    assert (code, calls) == (0, ["run lora-seed0", "run slow-seed0", *evaluations])
    assert run(grid, monkeypatch, "--seeds", "0") == (0, calls)
    Path("out/lora-seed0").rename("elsewhere")
    assert run(grid, monkeypatch, "--seeds", "0") == (0, [*calls, "run lora-seed0"])
    # clmoe decides whether a finished run may get other settings
    assert run(grid, monkeypatch, "--only", "lora", "--seeds", "0,1", "a=b") == (0, [*calls, *["run lora-seed0"] * 2])


def test_nothing_starts_after_a_failure_and_the_same_line_goes_on(
    grid: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("fail slow-seed0").touch()
    assert run(grid, monkeypatch) == (1, ["run lora-seed0", "run slow-seed0"])
    assert "slow-seed0 failed with 1: clmoe: options.gamma must lie" in capsys.readouterr().err
    Path("fail slow-seed0").unlink()
    code, calls = run(grid, monkeypatch, "--jobs", "3")
    assert code == 0
    assert (calls.count("run lora-seed0"), calls.count("run slow-seed0"), len(calls)) == (1, 2, 5 + 3 * 4)


def test_sigterm_is_passed_on(grid: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminate() -> None:
        while not Path("ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    Path("wait").touch()
    threading.Thread(target=terminate, daemon=True).start()
    assert run(grid, monkeypatch) == (75, ["run lora-seed0"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[slow, slow_oracle]", "[slw]", "unknown row 'slw'.*slow"),
        ("once: true", "onse: true", "rows.lora.onse: unknown key 'onse'.*once"),
        ("of: slow", "of: slw", "unknown row 'slw'.*slow"),
        ("  g:", "  h:", "unknown grid 'g'"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(grid: ModuleType, old: str, new: str, message: str) -> None:
    Path("grids.yaml").write_text(FILE.replace(old, new))
    with pytest.raises(ClmoeError, match=message):
        make(grid)


@pytest.mark.parametrize("benchmark", ["playground-coin", "coin", "cl4vqa", "ucit", "mllm_dcl"])
def test_the_shipped_rows_resolve_and_no_two_are_the_same_run(grid: ModuleType, benchmark: str) -> None:
    file = Path(__file__).resolve().parents[1] / "configs" / "grids.yaml"
    recipe = load_benchmark(benchmark, check_files=False).recipe
    labels: dict[str, str] = {}
    for name in yaml.safe_load(file.read_text())["grids"]:
        made = make(grid, file=file, grid=name, benchmark=benchmark)
        for row in made.chosen:
            source = made.rows[row.of or row.label]
            overrides = [*source.set, *(row.set if row.of else ()), "label=same"]
            config = load_config(source.method or source.label, recipe, overrides)
            assert labels.setdefault(f"{row.of} {source.order} {dump_config(config)}", row.label) == row.label
    assert {"clmoe_rmoe_off", "llava_cmoe_last", "olora"} <= set(labels.values())


def test_a_budget_gives_its_rows_labels_settings_and_seeds_of_their_own(
    grid: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = (
        "{title: B, budget: {steps: 7, parameters: 90624}, set: {slow: [options.top_k=1]}, seeds: {playground-coin: {"
    )
    matched = f"  b: {budget}default: 1, lora: 2}}}}, sections: {{all: [slow, lora]}}}}\n"
    Path("grids.yaml").write_text(FILE + matched)
    Path("tuned").mkdir()
    made = make(grid, grid="b", tuned=Path("tuned"))
    assert made.seeds == {"lora_b": [0, 1], "slow_b": [0]} and [row.label for row in made.chosen] == [
        "lora_b",
        "slow_b",
    ]
    (command,) = made.commands(made.rows["slow_b"], 0)
    assert " ".join(command[len(grid.CLMOE) :]) == (
        "run clmoe playground-coin --order rev --output out/slow_b-seed0 --seed 0 label=slow_b options.gamma=0.9 "
        "options.top_k=1 budget.steps=7 budget.parameters=90624 tuned=tuned/clmoe.json"
    )
    assert made.settings(made.rows["lora_b"]) == ["budget.steps=7", "budget.parameters=90624"], (
        "lora has nothing to tune"
    )
    for label in ("slow", "slow_b"):
        assert [row.label for row in make(grid, grid="b", only=[label]).chosen] == ["slow_b"]
    Path("grids.yaml").write_text(FILE + matched.replace("[slow, lora]", "[slow, beta1]"))
    with pytest.raises(ClmoeError, match=r"grids\.b: beta1"):
        make(grid, grid="b")


def test_hours_follow_the_plan_and_what_finished_rows_took(grid: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "rounds_per_second", lambda jobs: 1000.0)
    made = make(grid, only=["lora", "slow"], overrides=["training.steps=100"])
    hours = made.hours()
    cost = yaml.safe_load(grid.COSTS.read_text())["cost"]
    # half of the recipe's 200 steps for each of the eight tasks; there is no data, so no answers are counted
    assert hours["lora"] == pytest.approx((grid.START + 8 * 200 * cost["lora"] / 2) / 1000 / 3600)
    assert hours["slow"] == pytest.approx((grid.START + 8 * 200 * cost["clmoe"] / 2) / 1000 / 3600)
    (log := Path("out/logs/lora-seed0.log")).parent.mkdir(parents=True)
    (run := Path("out/lora-seed0")).mkdir()
    (run / "timing.json").write_text('{"minutes": 30}')
    (command,) = made.commands(made.rows["lora"], 0)
    log.write_text(f"finished: {grid.shlex.join(command)}\n")
    later = made.hours()
    assert later["lora"] == 0.5 and later["slow"] == pytest.approx(hours["slow"] * 0.5 / hours["lora"])
