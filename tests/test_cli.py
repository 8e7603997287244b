"""The command line: bad input gives one clear line and exit code 2, and fast verbs stay fast."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from clmoe import cli
from tests.runs import Runs
from tests.support import TASKS, write_benchmark

FIRST, SECOND = TASKS[:2]
ROOT = Path(__file__).resolve().parents[1]
Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Runs a command that must exit with code 2 and write nothing under ``out``; returns the one line it prints."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        assert stop.value.code == 2
        assert not (tmp_path / "out").exists(), "something was written"
        error = capsys.readouterr().err
        assert error.startswith(f"clmoe {arguments[0]}: ")
        assert error.count("\n") == 1, error
        return error

    return run


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    """The YAML of a benchmark that belongs to the test, which may spoil it."""
    (tmp_path / "bad").mkdir()
    return write_benchmark(tmp_path / "bad")


def train_arguments(runs: Runs, benchmark: Path, output: Path, task: str = FIRST, method: str = "lora") -> list[str]:
    return [
        "train", "--config", method, "--benchmark", str(benchmark), "--model", str(runs.model),
        "--task", task, "--output", str(output),
    ]  # fmt: skip


def test_a_missing_image_of_a_training_row(runs: Runs, spoiled: Path, tmp_path: Path, refused: Refused) -> None:
    (spoiled.parent / FIRST / "images" / "5.png").unlink()
    error = refused(*train_arguments(runs, spoiled, tmp_path / "out" / FIRST))
    assert re.search(r"train\.json.*row 5.*5\.png", error)


def test_a_question_without_an_expected_answer(runs: Runs, spoiled: Path, tmp_path: Path, refused: Refused) -> None:
    path = spoiled.parent / FIRST / "test.json"
    rows = json.loads(path.read_text())
    del rows[2]["answer"]
    path.write_text(json.dumps(rows))
    checkpoint = runs.chain("lora", tasks=(FIRST,))[0]
    error = refused("eval", "--checkpoint", checkpoint, "--benchmark", spoiled, "--output", tmp_path / "out")
    assert "test.json" in error
    assert "no expected answer" in error


def test_an_unknown_task_names_the_nearest(runs: Runs, tmp_path: Path, refused: Refused) -> None:
    error = refused(*train_arguments(runs, runs.benchmark, tmp_path / "out" / "x", task="color"))
    assert "unknown task 'color'. Did you mean 'colour'?" in error
    checkpoint = runs.chain("lora", tasks=(FIRST,))[0]
    known = ("--benchmark", runs.benchmark, "--output", tmp_path / "out")
    error = refused("eval", "--checkpoint", checkpoint, "--tasks", "color", *known)
    assert "Did you mean 'colour'?" in error
    error = refused("eval", "--checkpoint", "base", "--model", runs.model, "--tasks", "color", *known)
    assert "Did you mean 'colour'?" in error


def test_unknown_names(runs: Runs, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out" / "x"
    assert "Did you mean 'clmoe'?" in refused(*train_arguments(runs, runs.benchmark, out, method="clmo"))
    assert "playground-coin" in refused(*train_arguments(runs, Path("playground-con"), out))
    arguments = train_arguments(runs, runs.benchmark, out)
    assert "Did you mean 'steps'?" in refused(*arguments, "training.step=3")
    assert "write key=value" in refused(*arguments, "training.steps")
    arguments[arguments.index("--model") + 1] = "/no/such/folder"
    assert "no such folder" in refused(*arguments)
    arguments[arguments.index("--model") + 1] = str(tmp_path)
    assert "config.json" in refused(*arguments)


def test_what_cannot_be_evaluated(runs: Runs, tmp_path: Path, refused: Refused) -> None:
    checkpoint, where = runs.chain("lora", tasks=(FIRST,))[0], ("--benchmark", runs.benchmark)
    known = ("eval", "--checkpoint", checkpoint, *where, "--output", tmp_path / "out")
    assert "not a finished checkpoint" in refused("eval", "--checkpoint", tmp_path, *where, "--output", known[-1])
    assert "can change after training" in refused(*known, "training.steps=3")
    assert "belong to --checkpoint base" in refused(*known, "--model", runs.model)


def test_a_checkpoint_of_another_benchmark(runs: Runs, spoiled: Path, tmp_path: Path, refused: Refused) -> None:
    values = yaml.safe_load(spoiled.read_text())
    values["name"] = "other"
    spoiled.write_text(yaml.safe_dump(values))
    checkpoint = runs.chain("lora", tasks=(FIRST,))[0]
    error = refused("eval", "--checkpoint", checkpoint, "--benchmark", spoiled, "--output", tmp_path / "out")
    assert "was trained on benchmark mini, not other" in error


def test_bad_tables(tmp_path: Path, refused: Refused) -> None:
    assert "cannot be read" in refused("metrics", tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text("after,a,b\na,50,x\n")
    error = refused("metrics", tmp_path / "bad.csv")
    assert "row 2" in error
    assert "column 'b'" in error
    assert "Did you mean 'playground-coin'?" in refused("data", "check", "playground-com")


PRINTED = yaml.safe_load((ROOT / "docs" / "results" / "paper_tables.yaml").read_text())
WITH_FIGURES = [(table["table"], row) for table in PRINTED["tables"] for row in table["rows"] if "printed" in row]


@pytest.mark.parametrize(("table", "row"), WITH_FIGURES, ids=[f"{table}, {row['row']}" for table, row in WITH_FIGURES])
def test_metrics_prints_published_figures(
    table: str, row: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``clmoe metrics`` gives LLaVA-CMoE's figures (arXiv 2503.21227), rounded or cut off, except listed misprints."""
    own, rows = f"after,{','.join(PRINTED['tasks'])}\n", {row["row"]: row for _, row in WITH_FIGURES}
    scores = {"immediate": rows["llava_cmoe"]["immediate"]} | row  # from Table 1 if a table leaves it out
    for kind, label in (("last", PRINTED["tasks"][-1]), ("immediate", "known")):
        (tmp_path / f"{kind}.csv").write_text(own + f"{label},{','.join(map(str, scores[kind]))}\n")
    cli.main(["metrics", str(tmp_path / "last.csv"), "--immediate", str(tmp_path / "immediate.csv"), "--json"])
    shown = json.loads(capsys.readouterr().out)
    means = {kind: sum(map(Decimal, map(str, scores[kind]))) / 8 for kind in ("immediate", "last")}
    means["bwt"] = means["last"] - means["immediate"]
    misprinted = {m["figure"]: m for m in PRINTED["misprints"] if (m["table"], m["row"]) == (table, row["row"])}
    for name, key in (("immediate", "immediate_known"), ("last", "last"), ("bwt", "bwt_known")):
        if name not in row["printed"] or row["row"] == "without extension":  # its Immediate is printed nowhere
            continue
        assert shown[key] == pytest.approx(float(means[name]), abs=0.0051)
        fits = row["printed"][name] in (shown[key], int(100 * means[name]) / 100)
        assert fits is (name not in misprinted)
        assert fits or misprinted[name] | {"printed": row["printed"][name], "computed": shown[key]} == misprinted[name]


def test_metrics_says_what_is_lacking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "matrix.csv").write_text("after,a,b\nb,10,50\n")
    cli.main(["metrics", str(tmp_path / "matrix.csv")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["last", "30.00"] in lines and ["maa", "needs", "row", "a,", "column", "a"] in lines


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv[0] = 'clmoe'\nfrom clmoe import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'peft', 'numpy'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert all(f"\n    {verb}" in done.stdout for verb in cli.VERBS)


@pytest.mark.parametrize(
    ("arguments", "new"),
    [
        (["eval", "--router", "oracle"], "locator=oracle"),
        (["train", "--then-eval"], "clmoe run"),
        (["plan", "--steps"], "clmoe run"),
        (["card", "runs/x"], "clmoe export"),
    ],
)
def test_what_was_renamed_says_the_new_name(arguments: list[str], new: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert new in capsys.readouterr().err


def test_an_error_of_another_process_than_the_main_one_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "OTHERS_SPEAK_AFTER", 0)
    monkeypatch.setattr("clmoe.utils.processes.leave", sys.exit)
    with pytest.raises(SystemExit) as stop:
        cli.main(["metrics", "/nosuch.csv"])
    assert stop.value.code == 2
    assert re.match(r"clmoe metrics: /nosuch\.csv: .* \(process 1, on \S+\)$", capsys.readouterr().err)


@pytest.mark.slow
def test_a_package_of_ones_own_run_as_a_module_registers_the_adapter(tmp_path: Path) -> None:
    """The adapter is registered although ``sys.argv[0]`` is ``-m`` during the import, as for our own command line."""
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("import clmoe, peft\nassert 'CLMOE' in peft.PeftType.__members__\n")
    (package / "run.py").write_text("")
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"
    subprocess.run([sys.executable, "-m", "mine.run"], check=True, env={**os.environ, "PYTHONPATH": path})
