"""docs/results.md is what scripts/results.py makes of the kept run folders, and says what was not run."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from clmoe.errors import ClmoeError
from clmoe.utils.logging import EventLog
from tests.report.folders import make_run, row_of
from tests.support import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def results() -> ModuleType:
    return load_script("results")


def test_the_page_is_what_the_kept_runs_say(results: ModuleType) -> None:
    assert results.PAGE.read_text(encoding="utf-8") == results.results_page(), "run `python scripts/results.py`"


def test_every_label_of_the_papers_file_is_a_row_of_a_grid(results: ModuleType) -> None:
    import yaml

    paper = yaml.safe_load(results.PAPER.read_text(encoding="utf-8"))
    rows = {row.label for grid in results.read_grids(results.default_file()).values() for row in grid.rows}
    assert set(paper["figures"]) <= rows
    assert {label for claim in paper["claims"] for label in (claim["better"], *claim["than"])} <= rows


def test_what_had_learned_before_the_first_task_is_said(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RUNS", tmp_path)
    for label, stored in (("lora", 90_624), ("llava_cmoe", 552_448)):
        run = make_run(tmp_path / "playground-coin", label, 0, adapter_parameters=943_488)
        trained = "90624" if label == "lora" else "65024"
        (run / "parameters.csv").write_text(f"task,trainable,stored\ncolour_letter,{trained},{stored}\n")
        run.rename(run.with_name(f"{label}-seed0"))
    found = results.measured("playground-coin")
    # stored after the first task and not trained in it: 552,448 - 65,024
    assert "a start that no other method here has: 487,424 parameters" in results.head_start(found)
    row = row_of(results.summary_rows(found, ["lora", "llava_cmoe"], {"figures": {}}), "llava_cmoe")
    assert row["in the adapter at the end"] == "943,488"
    assert results.head_start(results.Measured("playground-cl4vqa", {})) == ""


def test_complete_runs_are_kept_with_their_origin(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RUNS", tmp_path / "kept")
    out = tmp_path / "out"
    for seed in (0, 1, 2):
        for label, last in (("clmoe", 50.0 + seed), ("lora", 20.0), ("clmoe_rmoe_off", 51.0)):
            run = make_run(out, label, seed, last, steps_per_task=200)
            folder = run.rename(out / f"{label}-seed{seed}")
            command = f"clmoe train --output {folder.resolve()}/01_a"
            EventLog(folder / "events.jsonl").write("started", commit="abc", command=command)
    shutil.copytree(out / "lora-seed0", out / "moelora-seed0")
    matrix = out / "moelora-seed0" / "matrix.csv"
    matrix.write_text("\n".join(matrix.read_text().splitlines()[:-1]) + "\n")  # not at its end yet

    assert results.collect(out) == 9
    kept = tmp_path / "kept" / "playground-coin" / "clmoe-seed0"
    origin = json.loads((kept / "provenance.json").read_text())
    assert (origin["commits"], origin["command"], len(origin["dates"])) == (["abc"], "clmoe train --output RUN/01_a", 1)
    page = results.results_page()
    # (2 (50 + s) + 80) / 3 - 40 for s = 0, 1, 2: 20, 20.67, 21.33
    assert "| CL-MoE ends higher (AP) than lora | holds, +20.7 (+19.0 to +22.3) | not run |" in page
    assert "ends higher than clmoe_rmoe_off | no difference shown, +0.0 (-1.7 to +1.7) | not run |" in page
    assert "| CL-MoE forgets less (AF) than lora | holds, +31.0 (" in page
    assert "not run: zero_shot, multitask, separate, moelora, ewc" in page
    assert f"| lora | 0 1 2 | {origin['dates'][0]} | abc | `clmoe train --output RUN/01_a` |" in page
    assert "- playground-coin: " in page

    make_run(out, "short", 0, steps_per_task=20).rename(out / "short-seed0")
    with pytest.raises(ClmoeError, match=r"short-seed0: 20 steps per task; the page compares runs of 200"):
        results.collect(out)
