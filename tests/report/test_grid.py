"""Grid files: what they say, what is refused, and how a row is started."""

from pathlib import Path

import pytest

from clmoe.benchmarks.base import load_benchmark
from clmoe.config import load_config
from clmoe.errors import ClmoeError
from clmoe.report.grid import default_file, read_grids, repeats, start

FILE = """
rows:
  lora: {}
  clmoe: {}
  slow: {method: clmoe, config: clmoe_released, order: rev, set: [options.gamma=0.9]}
  beta1: {of: slow, router: oracle, set: [options.beta=1]}
grids:
  g: {title: G, sections: {first: [lora, slow], second: [slow, beta1]}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "grids.yaml"
    path.write_text(FILE)
    return path


def test_rows_stand_once_in_the_order_of_the_sections(file: Path) -> None:
    grid = read_grids(file)["g"]
    assert [row.label for row in grid.rows] == ["lora", "slow", "beta1"]
    assert {title: [row.label for row in rows] for title, rows in grid.sections.items()} == {
        "first": ["lora", "slow"],
        "second": ["slow", "beta1"],
    }


def test_a_row_is_started_by_its_script_or_evaluates_anothers_checkpoints(file: Path, tmp_path: Path) -> None:
    rows = {row.label: row for row in read_grids(file)["g"].rows}
    begun = start(rows["slow"], rows, "playground-coin", 2, tmp_path, ["training.steps=3"])
    assert begun.command == [
        "bash", "scripts/playground/clmoe.sh", "label=slow", "options.gamma=0.9", "training.steps=3",
    ]  # fmt: skip
    assert begun.environment == {
        "OUT": str(tmp_path / "slow-seed2"),
        "SEED": "2",
        "BENCHMARK": "playground-coin",
        "METHOD": "clmoe_released",
        "ORDER": "rev",
    }
    again = start(rows["beta1"], rows, "coin", 2, tmp_path, ["training.steps=3", "evaluation.limit=5"])
    # an evaluation takes no settings of the training
    assert again.command == [
        "bash", "scripts/eval.sh", "coin", "--router", "oracle", "label=beta1", "options.beta=1", "evaluation.limit=5",
    ]  # fmt: skip
    assert again.environment == {
        "OUT": str(tmp_path / "beta1-seed2"),
        "RUN": str(tmp_path / "slow-seed2"),
        "ORDER": "rev",
    }
    lora = start(rows["lora"], rows, "coin", 0, tmp_path, [])
    assert (lora.command[1], "ORDER" in lora.environment) == ("scripts/coin/lora.sh", False)


REAL = ("coin", "cl4vqa", "ucit", "mllm_dcl")


@pytest.mark.parametrize(
    ("benchmark", "environment", "again"),
    [
        *((benchmark, {}, {"llava_cmoe_first_task": "llava_cmoe"}) for benchmark in REAL),
        ("coin", {"WARMUP": "/data/neutral"}, {}),
        ("playground-coin", {}, {}),
        ("playground-coin", {"WARMUP": ""}, {"llava_cmoe_first_task": "llava_cmoe"}),
        ("playground-cl4vqa", {"ORDER": "rev"}, {"llava_cmoe_order_rev": "llava_cmoe"}),
    ],
)
def test_a_row_that_would_be_an_earlier_run_once_more(
    benchmark: str, environment: dict[str, str], again: dict[str, str]
) -> None:
    assert repeats(read_grids(default_file())["llava_cmoe"].rows, benchmark, [], environment) == again


@pytest.mark.parametrize("benchmark", REAL)
@pytest.mark.parametrize("grid", ["table1", "clmoe"])
def test_no_other_rows_are_equal_on_the_real_benchmarks(benchmark: str, grid: str) -> None:
    assert repeats(read_grids(default_file())[grid].rows, benchmark, [], {}) == {}


def test_overrides_make_rows_equal_but_checkpoints_that_are_evaluated_stay() -> None:
    rows = read_grids(default_file())["clmoe"].rows
    gammas = {"clmoe_gamma0.3": "clmoe", "clmoe_gamma0.5": "clmoe", "clmoe_gamma0.9": "clmoe"}
    assert repeats(rows, "coin", ["options.gamma=0.5"], {}) == gammas
    assert repeats(rows, "coin", ["options.consolidation=none"], {}) == {}  # clmoe_both_off evaluates clmoe_mmoe_off


def test_a_method_without_a_script_of_its_own_goes_through_the_general_one(file: Path, tmp_path: Path) -> None:
    file.write_text(FILE.replace("  lora: {}", "  ewc: {}\n  ewd: {}").replace("[lora, slow]", "[ewc, ewd]"))
    rows = {row.label: row for row in read_grids(file)["g"].rows}
    assert start(rows["ewc"], rows, "ucit", 0, tmp_path, []).command[:4] == [
        "bash",
        "scripts/benchmark.sh",
        "ucit",
        "ewc",
    ]
    with pytest.raises(ClmoeError, match=r"row ewd: unknown method 'ewd'.*ewc"):
        start(rows["ewd"], rows, "ucit", 0, tmp_path, [])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[lora, slow]", "[lorra]", "grids.g.sections: unknown row 'lorra'.*lora"),
        ("lora: {}", "lora: {methd: x}", "rows.lora: unknown key 'methd'.*method"),
        ("lora: {}", "lora: {method: clmoe}", "rows.clmoe and rows.lora are the same run"),
        ("of: slow, ", "", "rows.beta1: 'router' needs 'of'"),
        ("of: slow", "of: slow, order: rev", "rows.beta1: with 'of', method, config and order are those of slow"),
        ("of: slow", "of: slw", "rows.beta1.of: unknown row 'slw'.*slow"),
        ("grids:", "  twice: {of: beta1}\ngrids:", "rows.twice: beta1 has no checkpoints of its own; name slow"),
        ("[slow, beta1]", "[beta1]", "beta1 evaluates the checkpoints of slow: list that row too"),
        ("rows:", "row:", "rows must be a mapping"),
    ],
)
def test_what_is_wrong_is_named(file: Path, old: str, new: str, message: str) -> None:
    text = FILE.replace(old, new, 1)
    if "list that row too" in message:
        text = text.replace("[lora, slow]", "[lora]")
    file.write_text(text)
    with pytest.raises(ClmoeError, match=message):
        read_grids(file)


def test_the_shipped_rows_resolve_and_no_two_are_the_same_run() -> None:
    """Equal resolved configurations would train the same thing twice under two labels."""
    benchmark = load_benchmark("playground-coin", None)
    rows = {row.label: row for grid in read_grids(default_file()).values() for row in grid.rows}
    # as scripts/playground/llava_cmoe.sh starts it
    warm = ["options.initial_experts_from=warmup", "options.warmup_train=x", "options.warmup_images=x"]
    seen: dict[object, str] = {}
    for row in rows.values():
        source = rows[row.of] if row.of else row
        extra = warm if source.script == "llava_cmoe" else []
        config = load_config(
            source.config or source.script, benchmark.recipe, [*extra, *source.set, *row.set, "label=same"]
        )
        key = repr((config, source.order, bool(row.of), row.router))
        assert key not in seen, f"{row.label} is {seen.get(key)}"
        seen[key] = row.label
    assert {"clmoe_rmoe_off", "llava_cmoe_probes8", "olora"} <= set(rows)
