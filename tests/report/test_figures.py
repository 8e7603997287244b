"""The numbers behind the page's figures, against the files of invented run folders."""

import csv
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from clmoe.errors import ClmoeError
from clmoe.report import figures
from clmoe.report.costs import read_costs
from clmoe.report.run import group_runs, read_run
from clmoe.report.samples import read_answers
from tests.report.folders import TASKS, block, layer, make_run, predict


def table(data: figures.Data) -> list[dict[str, Any]]:
    return [dict(zip(data.columns, row, strict=True)) for row in data.rows]


def test_matrices_hold_every_cell_of_the_files_and_the_means(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "moe", seed, last) for seed, last in ((0, 50.0), (1, 44.0))]
    runs.append(make_run(tmp_path, "plain", 7, 20.0))
    rows = table(figures.matrices(group_runs(runs)))
    for run, kind, seeds in ((runs[0], "seed", "0"), (runs[1], "seed", "1"), (runs[2], "mean", "7")):
        label = "plain" if seeds == "7" else "moe"
        shown = {(r["after"], r["task"]): r["score"] for r in rows if (r["label"], r["seeds"]) == (label, seeds)}
        assert {r["kind"] for r in rows if (r["label"], r["seeds"]) == (label, seeds)} == {kind}
        with (run / "matrix.csv").open() as file:
            for line in csv.DictReader(file):
                after = line.pop("after")
                for task, text in line.items():
                    assert shown.pop((after, task)) == (float(text) if text else None)
        assert not shown
    means = {(r["after"], r["task"]): r["score"] for r in rows if r["seeds"] == "0 1"}
    assert means["box", "count"] == 47.0
    assert means["colour_letter", "box"] is None


def test_matrices_of_seeds_in_other_orders_stand_alone(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "moe", 0), make_run(tmp_path, "moe", 1, order=TASKS[::-1])]
    rows = table(figures.matrices(group_runs(runs)))
    assert {(row["kind"], row["seeds"]) for row in rows} == {("mean", "0"), ("mean", "1")}
    assert len(rows) == 18


def test_scores_and_curves_are_means_and_deviations(tmp_path: Path) -> None:
    groups = group_runs([make_run(tmp_path, "moe", seed, last) for seed, last in ((0, 50.0), (1, 44.0))])
    scores = {row["quantity"]: row for row in table(figures.scores(groups))}
    assert set(scores) == {"immediate", "last"}  # the task was never given
    assert scores["last"] == {
        "label": "moe",
        "quantity": "last",
        "mean": mean([60, 56]),
        "std": pytest.approx(stdev([60, 56])),
        "n": 2,
        "seeds": "60 56",
    }
    curve = [row for row in table(figures.curves(groups)) if row["task"] == "colour_letter"]
    assert [(row["stage"], row["after"], row["mean"]) for row in curve] == [
        (1, "colour_letter", 80),
        (2, "count", 70),
        (3, "box", 47),
    ]
    assert curve[2]["std"] == pytest.approx(stdev([50, 44]))
    quantities = {row["quantity"]: row["mean"] for row in table(figures.comparison(groups))}
    assert quantities["trainable_parameters"] == 90_624 and quantities["bwt_n_minus_1"] == -33
    assert "minutes" not in quantities and "immediate_known" not in quantities


def test_outcomes_are_summed_over_seeds_without_the_last_task(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "moe", 0), make_run(tmp_path, "moe", 1), make_run(tmp_path, "none", 0)]
    for run, later in zip(runs, (1.0, 0.0), strict=False):
        predict(run, "count", "count", {"a": ("x", 1.0), "b": ("x", 0.0)})
        predict(run, "box", "count", {"a": ("x", later), "b": ("x", 1.0), "c": ("x", 0.0)})
        predict(run, "box", "box", {"a": ("x", 1.0)})
    groups = group_runs(runs)
    rows = figures.outcomes(groups, read_answers(groups)).rows
    assert rows == [("moe", "count", 1, 1, 2, 0)]  # kept, forgotten, gained, never


def test_usage_of_routers_and_of_probes(tmp_path: Path) -> None:
    steady, grown = make_run(tmp_path, "steady", 2), make_run(tmp_path, "grown", 0)
    lines = [f"count,{layer(3)},0,0.75", f"count,{layer(3)},1,0.25"]
    (steady / "usage.csv").write_text("\n".join(["task,block,expert,share", *lines]) + "\n")
    plans = [{"task": "box", "blocks": {layer(10): block([1.0, 0.5, 0.5], 0.2, 1), layer(2): block([-1.0, 2.0], 0, 0)}}]
    (grown / "expansion.json").write_text(json.dumps(plans))
    assert figures.usage(group_runs([steady, grown])).rows == [
        ("steady", 2, "count", "layer 3", 0, "expert", 0.75),
        ("steady", 2, "count", "layer 3", 1, "expert", 0.25),
        ("grown", 0, "box", "layer 10", 0, "expert", 0.5),
        ("grown", 0, "box", "layer 10", 1, "expert", 0.25),
        ("grown", 0, "box", "layer 10", 2, "probe", 0.25),  # of layer 2 the activations are no shares
    ]
    assert figures.expansion(group_runs([grown])).rows == [
        ("grown", 0, "box", "layer 2", 0, 2.0, 0.0),
        ("grown", 0, "box", "layer 10", 1, 0.5, 0.2),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cuont,b,0,0.5", "column 'task': 'cuont' is none of"),
        ("count,b,1,0.5", "column 'expert': expected 0, found 1"),
        ("count,b,0,1.5", "column 'share': '1.5' is not a number from 0 to 1"),
        ("count,b,0,x", "column 'share': 'x' is not a number from 0 to 1"),
    ],
)
def test_malformed_usage_is_named(tmp_path: Path, line: str, message: str) -> None:
    run = make_run(tmp_path, "moe", 0)
    (run / "usage.csv").write_text(f"task,block,expert,share\n{line}\n")
    with pytest.raises(ClmoeError, match=r"usage\.csv, row 2") as error:
        read_run(run)
    assert message in str(error.value)


def test_locator_and_parameters(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0)
    lines = ["box,vae,count,count,3", "box,vae,count,box,1", "box,vae,box,box,4", "box,vae,colour_letter,count,4"]
    (run / "locator.csv").write_text("\n".join(["after,decider,task,located,count", *lines]) + "\n")
    (run / "parameters.csv").write_text("task,trainable,stored\ncolour_letter,5,6\ncount,7,13\n")
    groups = group_runs([run])
    cells = {(row["task"], row["located"]): row["percent"] for row in table(figures.locator(groups))}
    assert cells["count", "count"] == 75 and cells["count", "box"] == 25 and cells["count", "colour_letter"] == 0
    assert len(cells) == 9
    assert figures.located(groups).rows == [("moe", "VAE bank", pytest.approx(100 * 7 / 12), None, 1)]
    assert [row[:3] + row[4:5] for row in figures.parameters(groups).rows] == [
        ("moe", "colour_letter", 5, 6),
        ("moe", "count", 7, 13),
    ]


def test_costs_by_task_and_work(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0)
    events = [
        {"event": "step", "task": "count", "loss": 1.0},
        {"event": "trained", "task": "count", "phase": "probe", "seconds": 5.0},
        {"event": "trained", "task": "count", "phase": "trained", "seconds": 10.0, "peak_rss_mib": 700},
        {"event": "trained", "task": "count", "phase": "trained", "seconds": 2.5, "peak_rss_mib": 600},
        {"event": "ended", "task": "count", "phase": "trained", "seconds": 1.0, "peak_cuda_mib": 9},
        {"event": "evaluated", "after": "count", "task": "colour_letter", "seconds": 3.0},
        {"event": "evaluated", "after": "count", "task": "count.oracle", "seconds": 4.0},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "trai')
    found = [(c.task, c.work, c.seconds, c.peak_rss_mib, c.peak_cuda_mib) for c in read_costs(read_run(run))]
    assert found == [
        ("count", "probes and warm-up", 5.0, None, None),
        ("count", "training", 12.5, 700, None),
        ("count", "end of task", 1.0, None, 9),
        ("count", "evaluation", 7.0, None, None),
    ]
    rows = figures.costs(group_runs([run])).rows
    assert rows[1] == ("moe", 0, "count", "training", 12.5, 700, None)
