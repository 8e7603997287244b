"""Run folders: every file is read and checked, and runs are grouped; errors name file, row and field."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from clmoe.errors import ClmoeError
from clmoe.report.page import write_report
from clmoe.report.runs import group_runs, read_run
from tests.report.folders import TASKS, block, layer, make_run, write, write_expansion

PARAMETERS, USAGE = "task,trainable,stored", "task,block,expert,share"
LOCATED = "after,locator,task,located,count"


def rows(table: pd.DataFrame) -> list[tuple[Any, ...]]:
    return list(table.itertuples(index=False, name=None))


def refused(run: Path, file: str, *parts: str) -> None:
    with pytest.raises(ClmoeError) as error:
        read_run(run)
    assert [part for part in (file, *parts) if part not in str(error.value)] == []


def test_tables_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0, method="of-my-own")
    events = [json.dumps({"event": "trained", "peak_rss_mib": peak}) for peak in (700, 900, 800)]
    write(run / "events.jsonl", *events, '{"event": "cut')
    write(run / "timing.json", '{"minutes": 4}')
    write(run / "parameters.csv", PARAMETERS, "colour_letter,5,6", "count,7,13")
    write(run / "locator.csv", LOCATED, "box,my_own,count,box,3")
    write(run / "usage.csv", USAGE, f"box,{layer(10)},0,1.0", f"box,{layer(3)},0,0.75", f"box,{layer(3)},1,0.25")
    read = read_run(run)
    assert (read.chain, read.staged, read.scoring) == ("sequence", True, "fixed")
    assert (read.peak_memory_mib, read.minutes, read.limit) == (900, 4, None)
    assert rows(read.parameters) == [("colour_letter", 5, 6), ("count", 7, 13)]
    assert rows(read.located) == [("box", "my_own", "count", "box", 3)]
    assert rows(read.usage)[1:] == [("box", "layer 3 mlp", e, "expert", share) for e, share in ((0, 0.75), (1, 0.25))]
    bare = read_run(make_run(tmp_path, "bare", 0))
    assert all(getattr(bare, name).empty for name in ("parameters", "expansion", "usage", "located"))
    assert bare.minutes is bare.peak_memory_mib is None


def test_expansion_gives_decisions_and_the_usage_of_experts_and_probes(tmp_path: Path) -> None:
    first = {layer(10): block([1.0, 0.5, 0.5], 0.2, 1), layer(2): block([-1.0, 2.0], -0.3, 0)}
    second = {layer(2): block([0.4, 0.1, 0.3, 0.2], 0.25, 1, probes=3)}
    run = read_run(write_expansion(make_run(tmp_path, "moe", 0), [{}, first, second]))
    assert rows(run.expansion) == [
        ("count", "layer 2 mlp", 0, 2.0, 0.0),  # a threshold below 0 counts as 0
        ("count", "layer 10 mlp", 1, 0.5, 0.2),
        ("box", "layer 2 mlp", 1, 0.3, 0.25),  # the most active of three probes
    ]
    # in task count, the activations of layer 2 are not shares
    shares = [(0, "expert", 0.5), (1, "expert", 0.25), (2, "probe", 0.25)]
    assert rows(run.usage)[:3] == [("count", "layer 10 mlp", *share) for share in shares]
    assert list(run.usage["kind"][3:]) == ["expert", "probe", "probe", "probe"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", "0"), ("seed", True), ("order", [1, 2, 3]), ("scoring", "oficial"), ("benchmark", None)],
)
def test_malformed_run_json_is_named(tmp_path: Path, field: str, value: Any) -> None:
    run = make_run(tmp_path, "moe", 0)
    info = json.loads((run / "run.json").read_text()) | {field: value}
    write(run / "run.json", json.dumps({name: value for name, value in info.items() if value is not None}))
    refused(run, "run.json", field)


@pytest.mark.parametrize(
    ("file", "lines", "where"),
    [
        ("run.json", ["[]"], "expected a mapping"),
        ("matrix.csv", ["after,count,colour_letter,box"], "count, colour_letter, box"),
        ("parameters.csv", ["task,trainable"], "header"),
        ("parameters.csv", [], "header"),
        ("parameters.csv", [PARAMETERS, "count,1"], "row 2"),
        ("parameters.csv", [PARAMETERS, "count,1.5,2"], "row 2, column 'trainable': '1.5'"),
        ("parameters.csv", [PARAMETERS, "count,1,-2"], "row 2, column 'stored': '-2'"),
        ("parameters.csv", [PARAMETERS, "cuont,1,2"], "row 2, column 'task': 'cuont'"),
        ("parameters.csv", [PARAMETERS, "box,1,2", "box,1,2"], "row 3: second row for box"),
        ("usage.csv", [USAGE, "count,b,0,nan"], "row 2, column 'share': 'nan'"),
        ("locator.csv", [LOCATED, "box,vae,box,box,1", "box,vae,box,box,2"], "row 3: second row for box,vae,box,box"),
        ("expansion.json", ["{}"], "expected a list"),
        ("expansion.json", ["[3]"], "entry 1"),
        ("expansion.json", ['[{"task": "count"}]'], "entry 1: "),
        ("expansion.json", ['[{"task": "x", "blocks": {}}]'], "field 'task': found x;"),
        ("expansion.json", ['[{"task": "box", "blocks": {"b": {"added": 1.5}}}]'], "task 'box', block 'b'.added"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, file: str, lines: list[str], where: str) -> None:
    refused(tmp_path, "run.json")
    refused(write(make_run(tmp_path, "moe", 0) / file, *lines), file, where)


def test_runs_are_grouped_by_label_and_seed_unless_they_cannot_be_compared(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "x", "moe", 0), make_run(tmp_path, "other", 0, order=TASKS[::-1])
    groups = group_runs([make_run(tmp_path, "moe", 1), second, first])
    assert [(group.label, [run.seed for run in group.runs]) for group in groups] == [("moe", [0, 1]), ("other", [0])]
    with pytest.raises(ClmoeError, match="both hold moe, seed 0"):
        group_runs([first, make_run(tmp_path / "y", "moe", 0)])
    for field, value in (("benchmark", "coin"), ("scoring", "official"), ("order", ["a", "b", "c"])):
        other = make_run(tmp_path / field, "other", 0, **{field: value})
        with pytest.raises(ClmoeError, match=field if field != "order" else "tasks"):
            group_runs([first, other])
    with pytest.raises(ClmoeError, match="no run folder"):
        group_runs([])
    with pytest.raises(ClmoeError, match="'md'"):
        write_report([first], tmp_path / "out", ["mdd"])
