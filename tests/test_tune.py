"""``clmoe tune`` makes a few trials of each method's own options, and runs take what it chose."""

import dataclasses
import json
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest

import clmoe
from clmoe import cli, commands
from clmoe import sequence as sequence_module
from clmoe.benchmarks.base import load_benchmark
from clmoe.config import load_config
from clmoe.errors import ClmoeError
from clmoe.methods import method_class
from clmoe.train.checkpoint import checked_method
from clmoe.utils.files import write_json
from clmoe.utils.paths import known_configs
from tests.runs import Killed, Runs
from tests.support import TASKS
from tests.test_sequence import at_call


@pytest.mark.parametrize("method", known_configs("methods"))
def test_the_shipped_grid_of_every_method_is_six_values_of_its_own_options(method: str) -> None:
    recipe = load_benchmark("playground-coin", check_files=False).recipe
    config = load_config(method, recipe, [])
    own = dataclasses.fields(method_class(config.method).Options)
    assert (prod(map(len, config.tune.values())) if config.tune else 0) == (6 if own else 0) and len(config.tune) <= 2
    for values in product(*config.tune.values()):
        pairs = [f"{key}={json.dumps(value)}" for key, value in zip(config.tune, values, strict=True)]
        checked_method(load_config(method, recipe, pairs))
        assert all(key.removeprefix("options.") in {field.name for field in own} for key in config.tune)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The calls of a ``run`` that trains nothing: higher weight scores better, seed 1 gets 10 more than seed 0."""
    calls = []

    def run(method: str, benchmark: str, **given: Any) -> sequence_module.Result:
        calls.append(given)
        _, config, _ = sequence_module.chosen(
            method, benchmark, given["settings"], order="norm", base=given["base"], data=None
        )
        last = 50 * config.options["weight"] + 10 * config.seed
        return sequence_module.Result(given["output"], [given["output"]], None, {"last": last})  # type: ignore[arg-type]

    monkeypatch.setattr(commands.sequence, "run", run)
    monkeypatch.chdir(tmp_path)
    return calls


def test_the_best_mean_is_chosen_and_all_is_written_down(
    scored: list[dict[str, Any]], runs: Runs, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(
        "extends: lwf\ntune: {options.weight: [0.5, 0, 1], options.temperature: [1.0e-05, 0.2]}\n"
    )
    cli.main(["tune", "mine.yaml", str(runs.benchmark), "--base", str(runs.model), "--seeds", "0,1", "--output", "out"])
    found = json.loads(Path("out/mine.json").read_text())
    assert found["chosen"] == {"options.weight": 1.0, "options.temperature": 1e-05}, "of equals the first, and a number"
    assert (found["method"], found["order"], len(found["trials"])) == ("lwf", list(TASKS[::-1]), 6)
    assert found["trials"][0] == {
        "settings": {"options.weight": 0.5, "options.temperature": 1e-05},
        "last": {"0": 25, "1": 35},
        "mean": 30,
    }
    assert {given["order"] for given in scored} == {",".join(TASKS[::-1])} and len(
        {given["output"] for given in scored}
    ) == 12
    scored.clear()
    cli.main(["tune", "lwf", str(runs.benchmark), "--base", str(runs.model), "--order", "norm"])
    assert {given["order"] for given in scored} == {",".join(TASKS)}
    assert {pair for given in scored for pair in given["settings"] if "seed" in pair} == {"seed=100"}
    assert Path("runs/mini/tune/lwf.json").is_file()


@pytest.mark.parametrize(
    ("method", "settings", "named"),
    [
        ("lora", [], "tune: lora"),
        ("clmoe", ["tune={options.beta: [0, 0.1, 0.2, 0.3], options.gamma: [0.1, 0.2]}"], "8 trials"),
        ("clmoe", ["tune={options.gamma: 0.5}"], "lists of values"),
        ("clmoe", ["tune={training.steps: [1, 2]}"], "keys of options"),
        ("clmoe", ["tune={options.gama: [1, 2], options.gamma: [0.5]}"], "gama"),
    ],
)  # fmt: skip
def test_a_grid_that_cannot_be_tried_is_refused_before_the_first_trial(
    method: str,
    settings: list[str],
    named: str,
    scored: list[dict[str, Any]],
    runs: Runs,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["tune", method, str(runs.benchmark), "--base", str(runs.model), *settings])
    assert named in capsys.readouterr().err and not scored


def test_a_run_takes_what_was_chosen_unless_the_command_line_says_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "ewc.json"
    write_json(file, {"method": "ewc", "chosen": {"options.weight": 7}})
    recipe = {"methods": {"ewc": {"tuned": str(file), "options": {"weight": 2, "samples": 9}}}}
    assert load_config("ewc", recipe, []).options == {"weight": 7, "samples": 9}
    assert load_config("ewc", recipe, ["options.weight=3"]).options["weight"] == 3
    assert load_config("ewc", {}, [f"tuned={file}"]).options["weight"] == 7
    for method, named, values in (("mas", file, "method"), ("ewc", tmp_path / "none.json", "clmoe tune ewc")):
        with pytest.raises(ClmoeError, match=f"{named}.*{values}"):
            load_config(method, {}, [f"tuned={named}"])
    file.write_text('{"chosen": 3}')
    with pytest.raises(ClmoeError, match=str(file)):
        load_config("ewc", {}, [f"tuned={file}"])


@pytest.mark.slow
def test_options_of_answers_are_tried_on_one_training_and_answer_as_whole_runs(runs: Runs, tmp_path: Path) -> None:
    def answers(run: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (run / "predictions" / TASKS[1]).glob("*.jsonl")}

    order, steps = f"{TASKS[0]},{TASKS[1]}", "training.steps=30"
    line = ["tune", "clmoe", str(runs.benchmark), "--base", str(runs.model), "--output", str(tmp_path)]
    cli.main([*line, "--order", order, steps, "tune={options.gamma: [0.1, 0.9], options.beta: [0, 1]}"])
    tried = [answers(path.parent) for path in sorted(tmp_path.glob("*/matrix.csv"))]
    assert len(tried) == 4 and len(list(tmp_path.glob("*/sequence.json"))) == 2, "beta needs no training"
    for gamma, (of_beta0, of_beta1) in {"0.1": tried[:2], "0.9": tried[2:]}.items():
        settings = [steps, f"options.gamma={gamma}", "options.beta=1"]
        where = {"base": str(runs.model), "order": order, "seed": 100, "output": tmp_path / "whole" / gamma}
        assert of_beta0 != of_beta1
        assert of_beta1 == answers(clmoe.run("clmoe", str(runs.benchmark), **where, settings=settings).run)


@pytest.mark.slow
def test_a_stopped_search_goes_on_and_a_run_keeps_its_choice(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["tune", "ewc", str(runs.benchmark), "--base", str(runs.model), "--output", str(tmp_path / "tune")]
    line += ["training.steps=1", "tune={options.weight: [1, 2]}", "--order", f"{TASKS[1]},{TASKS[0]}"]
    with monkeypatch.context() as patch:
        patch.setattr(sequence_module, "prepare_request", at_call(4, sequence_module.prepare_request))
        with pytest.raises(Killed):
            cli.main(line)
    assert not (tmp_path / "tune" / "ewc.json").exists()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("0*/manifest.json")}
    assert len(done) == 3
    cli.main(line)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    chosen = tmp_path / "tune" / "ewc.json"
    where = {"base": str(runs.model), "order": TASKS[0], "output": tmp_path / "run"}
    clmoe.run("ewc", str(runs.benchmark), **where, settings=[f"tuned={chosen}", "training.steps=1"])
    assert json.loads((tmp_path / "run" / "tuned.json").read_text()) == json.loads(chosen.read_text())
