"""scripts/quickstart.py: the forecast for runs that wait, are running, or have finished tasks; nothing is trained."""

import json
import os
import sys
import time
from argparse import Namespace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.support import load_script

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "grid", raising=False)
    return load_script("quickstart")


def test_a_run_is_forecast_by_the_calibration_and_then_by_its_own_tasks(quickstart: ModuleType) -> None:
    forecast = quickstart.Forecast(rate=lambda: 1000.0, cost={"lora": 100}, tasks=4, steps=80, jobs=2, cores=2)
    assert forecast.whole("lora") == pytest.approx((quickstart.START + 4 * 80 * 100) / 1000)
    assert forecast.left("lora", 0, 0, 0.0, 5.0) == pytest.approx(forecast.whole("lora") - 5)
    assert forecast.left("lora", 0, 2, 30.0, 33.0) == 27.0  # 15 s a task, 3 s into the third
    assert forecast.left("lora", 2, 1, 15.0, 16.0) == 14.0  # two tasks were finished by an earlier command
    assert forecast.left("lora", 0, 3, 30.0, 99.0) == 0.0
    assert quickstart.rounds_per_second(1, 0.05) > 1


def test_runs_share_the_cores(quickstart: ModuleType) -> None:
    forecast = quickstart.Forecast(lambda: 1000.0, {"long": 100, "short": 10}, 1, 1000, jobs=3, cores=2)
    long, short = forecast.whole("long"), forecast.whole("short")
    assert forecast.together([], ["long", "short"]) == pytest.approx(long)  # the longest has a core to itself
    assert forecast.together([long, long, 5.0], ["short"]) == pytest.approx((2 * long + 5 + short) / 2)
    finished = quickstart.Forecast(lambda: pytest.fail("measured"), {"long": 100}, 1, 1000, jobs=3, cores=2)
    assert finished.together([], []) == 0.0


def test_the_line_counts_tasks_and_skips_what_is_finished(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = Namespace(
        grid="quickstart", benchmark="playground-coin", seeds=[0], jobs=2, only=[], order="box,viz", out=tmp_path,
        base=None, data=None, tuned=None, overrides=["training.steps=5"], file=ROOT / "configs" / "quickstart.yaml",
    )  # fmt: skip
    runs = quickstart.Runs(
        args, quickstart.Forecast(lambda: 1000.0, {"lora": 1, "clmoe": 2, "llava_cmoe": 3}, 2, 5, 2, 2)
    )
    assert runs.waiting == ["llava_cmoe", "clmoe", "lora"]  # longest first
    lora = next(row for row in runs.chosen if row.label == "lora")
    with (tmp_path / "out").open("wb") as log:
        child = runs.start(lora, ["sleep", "60"], log)
    assert runs.waiting == ["llava_cmoe", "clmoe"] and os.getpriority(os.PRIO_PROCESS, child.pid) == 10
    runs.processes["lora"] = child.pid, time.time() - 20
    (tmp_path / "lora-seed0").mkdir()
    now = datetime.now(UTC) - timedelta(seconds=10)
    event = {"time": now.isoformat(timespec="milliseconds"), "event": "evaluated", "after": "box", "task": "box"}
    (tmp_path / "lora-seed0" / "events.jsonl").write_text(json.dumps(event) + "\n")
    left, at = runs.state()
    assert at == "lora 2/2" and left == pytest.approx(runs.forecast.whole("llava_cmoe"), abs=0.2)
    child.kill()
    child.wait()
    assert runs.state()[1] == ""
    log = tmp_path / "logs" / "clmoe-seed0.log"
    log.parent.mkdir()
    (tmp_path / "clmoe-seed0").mkdir()
    row = next(row for row in runs.chosen if row.label == "clmoe")
    log.write_text("".join(f"finished: {' '.join(command)}\n" for command in runs.commands(row, 0)))
    assert quickstart.Runs(args, runs.forecast).waiting == ["llava_cmoe", "lora"]


def test_every_row_has_a_cost(quickstart: ModuleType) -> None:
    quick, grids = (yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) for name in ("quickstart", "grids"))
    rows = {row for part in grids["grids"]["published"]["sections"].values() for row in part} | set(quick["rows"])
    assert rows <= set(quick["cost"])
