"""``clmoe plan`` on the miniature benchmark: its figures against really written files, and what is missing by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from clmoe import cli
from clmoe.errors import ClmoeError
from clmoe.system.memory import Sharding
from clmoe.train.loop import planned_sharding, total_steps
from tests.runs import Runs
from tests.support import TASKS, TEST_ROWS, TRAIN_ROWS, write_benchmark

FIRST, SECOND = TASKS[:2]
Values = dict[str, Any]


def plan(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    capsys.readouterr()
    if code:
        with pytest.raises(SystemExit) as stop:
            cli.main(["plan", *map(str, arguments)])
        assert stop.value.code == code
    else:
        cli.main(["plan", *map(str, arguments)])
    return capsys.readouterr().out


def figures(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Values:
    return json.loads(plan(capsys, *arguments, "--json", code=code))


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    """A benchmark of its own to spoil; its YAML."""
    (tmp_path / "bad").mkdir()
    return write_benchmark(tmp_path / "bad")


@pytest.fixture
def lora(runs: Runs) -> tuple[object, ...]:
    return ("--config", "lora", "--model", runs.model)


# ---- Steps and batches


def test_records_and_steps(capsys: pytest.CaptureFixture[str], mini_yaml: Path, lora: tuple[object, ...]) -> None:
    where = (*lora, "--benchmark", mini_yaml, "--order", f"{SECOND},{FIRST}")
    values = figures(capsys, *where, "training.steps=null", "training.batch_size=5", "training.epochs=1.5")
    steps = total_steps(TRAIN_ROWS, 5, 1.5, None)
    counts = {"train_records": TRAIN_ROWS, "test_records": TEST_ROWS, "steps": steps}
    assert values["tasks"] == [{"task": name, **counts} for name in (SECOND, FIRST)]
    assert values["missing"] == []


def test_the_union_trains_once(capsys: pytest.CaptureFixture[str], mini_yaml: Path, runs: Runs) -> None:
    where = ("--config", "multitask", "--model", runs.model, "--benchmark", mini_yaml)
    values = figures(capsys, *where, "training.steps=null")
    assert [row["task"] for row in values["tasks"]] == [*TASKS, "all"]
    assert values["tasks"][-1]["train_records"] == 3 * TRAIN_ROWS
    assert values["tasks"][-1]["steps"] == 9
    assert figures(capsys, *where, "training.steps=4")["tasks"][-1]["steps"] == 12


def test_a_tasks_passes_count(capsys: pytest.CaptureFixture[str], spoiled: Path, runs: Runs) -> None:
    values = yaml.safe_load(spoiled.read_text())
    values["tasks"][0]["passes"] = 3
    spoiled.write_text(yaml.safe_dump(values))
    where = ("--model", runs.model, "--benchmark", spoiled, "training.steps=null")
    alone, union = (figures(capsys, "--config", method, *where)["tasks"] for method in ("lora", "multitask"))
    assert [row["steps"] for row in alone] == [9, 3, 3]
    assert union[-1]["train_records"] == 5 * TRAIN_ROWS and union[-1]["steps"] == 15


def test_accumulation_follows_from_the_gpus(
    capsys: pytest.CaptureFixture[str], mini_yaml: Path, lora: tuple[object, ...]
) -> None:
    where = (*lora, "--benchmark", mini_yaml, "training.batch_size=24", "training.micro_batch_size=2")
    assert figures(capsys, *where, "--gpus", 4)["batch"] == {"global": 24, "gpus": 4, "micro": 2, "accumulation": 3}
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", *map(str, where), "--gpus", "5"])
    assert stop.value.code == 2
    assert "cannot be cut into 5 processes" in capsys.readouterr().err


# ---- Memory


def test_memory_follows_what_is_asked(
    capsys: pytest.CaptureFixture[str], mini_yaml: Path, lora: tuple[object, ...]
) -> None:
    where = (*lora, "--benchmark", mini_yaml, "training.max_length=100", "adapter.train_projector=false")
    alone = figures(capsys, *where)
    trained = alone["trainable_parameters"]
    state = alone["memory"]["state"]
    assert state["adapter_weights"] == state["gradients"] == 4 * trained
    assert state["optimizer"] == 8 * trained
    assert state["base_weights"] >= 4 * alone["base_parameters"]
    assert sorted(alone["memory"]["by_tokens"]) == ["100", "68"]  # an image of 4 tokens and 64 of text; max_length
    for row in alone["memory"]["by_tokens"].values():
        assert row["total"] == sum(state.values()) + row["activations"]
        assert row["activations_recomputed"] < row["activations"]
    half = figures(capsys, *where, "model.dtype=bfloat16")["memory"]
    assert half["state"]["base_weights"] < 0.6 * state["base_weights"]
    assert half["state"]["adapter_weights"] == state["adapter_weights"]
    shorter = figures(capsys, *where, "--tokens", 50, "--answer-tokens", 1)["memory"]["by_tokens"]
    assert shorter["50"]["activations"] < alone["memory"]["by_tokens"]["68"]["activations"]


@pytest.mark.parametrize("name", ["zero2", "zero2_offload", "zero3"])
def test_zero_takes_less(
    name: str, capsys: pytest.CaptureFixture[str], mini_yaml: Path, lora: tuple[object, ...]
) -> None:
    where = (*lora, "--benchmark", mini_yaml, "--gpus", 4, "adapter.train_projector=false")
    plain, zero = (figures(capsys, *where, *more)["memory"] for more in ((), ("--deepspeed", name)))
    assert zero["state"]["optimizer"] + zero["state"]["gradients"] < plain["state"]["optimizer"]
    assert (zero["host"] > 0) == (name == "zero2_offload")
    assert (zero["state"]["base_weights"] < plain["state"]["base_weights"]) == (name == "zero3")


def test_the_shipped_settings_are_read(tmp_path: Path) -> None:
    assert planned_sharding(None, 3) == Sharding(3)
    assert planned_sharding("zero2", 8) == Sharding(8, 2, False, 100_000_000)  # two buffers of 5e7: overlap_comm
    assert planned_sharding("zero2_offload", 8) == Sharding(8, 2, True, 100_000_000)
    assert planned_sharding("zero3", 8) == Sharding(8, 3, False, 50_000_000, 50_000_000)
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}')
    assert planned_sharding(str(own), 2) == Sharding(2, 2, False, 500_000_000)
    with pytest.raises(ClmoeError, match="zero2"):
        planned_sharding("zero22", 2)


# ---- Disk


FAST = ("options.extend=every", "options.probe_min_steps=1", "locator.options.steps=1", "adapter.train_projector=false")


def tensor_bytes(path: Path) -> int:
    """Without the file's header, which counts in the smallest models only."""
    return sum(tensor.nbytes for tensor in load_file(path).values()) if path.exists() else 0


@pytest.mark.parametrize("method", ["lora", "moelora", "clmoe", "llava_cmoe"])
def test_disk_is_what_a_run_writes(
    method: str, capsys: pytest.CaptureFixture[str], mini_yaml: Path, runs: Runs
) -> None:
    overrides, tasks = (FAST, TASKS) if method == "llava_cmoe" else ((), TASKS[:2])
    checkpoints = runs.chain(method, *overrides, tasks=tasks)
    names = ("adapter_model.safetensors", "locator.safetensors", "prototypes.safetensors")
    written = sum(tensor_bytes(folder / name) for folder in checkpoints for name in names)
    where = ("--config", method, "--model", runs.model, "--benchmark", mini_yaml, "--order", ",".join(tasks))
    disk = figures(capsys, *where, *overrides)["disk"]
    # CL-MoE's task gates, E numbers for each linear and task, are not counted
    assert disk["checkpoints"] == pytest.approx(written, rel=0.01 if method == "clmoe" else 1e-5)
    features = sum(tensor_bytes(path) for path in (checkpoints[0].parent / "features").glob("*.safetensors"))
    if features:  # of training samples only: these runs were not evaluated
        rows = len(tasks) * (TRAIN_ROWS + TEST_ROWS)
        assert disk["features"] == rows * 48 * 4
        assert features == pytest.approx(disk["features"] * TRAIN_ROWS / (TRAIN_ROWS + TEST_ROWS))


def test_a_state_holds_three_times_the_weights(
    capsys: pytest.CaptureFixture[str], mini_yaml: Path, lora: tuple[object, ...]
) -> None:
    where = (*lora, "--benchmark", mini_yaml, "adapter.train_projector=false")
    none, two = (
        figures(capsys, *where, "training.steps=10", f"training.save_steps={every}")["disk"]["unfinished_task"]
        for every in (0, 3)
    )
    size = 4 * figures(capsys, *where)["trainable_parameters"]
    assert none == 3 * size + size  # SIGTERM's state, and the sealed phase
    assert two == 3 * 3 * size + size  # two kept, and the third before the oldest is deleted


# ---- What is missing


def test_every_missing_file_is_named(
    capsys: pytest.CaptureFixture[str], spoiled: Path, lora: tuple[object, ...]
) -> None:
    root = spoiled.parent
    (root / FIRST / "train.json").unlink()
    (root / SECOND / "test.json").write_text('[{"question_id": 1}, ')
    shutil.rmtree(root / SECOND / "images")
    values = figures(capsys, *lora, "--benchmark", spoiled, "training.steps=null", code=1)
    assert values["missing"] == [
        f"{FIRST}: train file {root / FIRST / 'train.json'}",
        f"{SECOND}: image folder {root / SECOND / 'images'}",
        f"{root / SECOND / 'test.json'}: record 1 (from 0): expected an object {{...}}",
    ]
    first = values["tasks"][0]
    assert (first["train_records"], first["test_records"], first["steps"]) == (None, TEST_ROWS, None)
    text = plan(capsys, *lora, "--benchmark", spoiled, code=1)
    assert "missing (3)" in text
    # the part of the sequence that is asked for is whole
    assert figures(capsys, *lora, "--benchmark", spoiled, "--order", TASKS[2])["missing"] == []


def test_a_missing_data_folder_is_no_crash(
    capsys: pytest.CaptureFixture[str], mini_yaml: Path, lora: tuple[object, ...], tmp_path: Path
) -> None:
    values = figures(capsys, *lora, "--benchmark", mini_yaml, "--data", tmp_path / "nowhere", code=1)
    assert values["missing"][0] == f"data folder {tmp_path / 'nowhere'}"
    assert len(values["missing"]) == 1 + 3 * len(TASKS)
    assert values["trainable_parameters"] > 0
    assert values["memory"]["by_tokens"]


def test_data_that_is_made_on_first_use_is_not_missing(
    capsys: pytest.CaptureFixture[str], lora: tuple[object, ...], tmp_path: Path
) -> None:
    values = figures(capsys, *lora, "--benchmark", "playground-coin", "--data", tmp_path / "new", "adapter.rank=8")
    assert values["missing"] == []
    assert "is made by the first training" in values["notes"][0]


def test_weights_that_are_not_here(
    capsys: pytest.CaptureFixture[str], mini_yaml: Path, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("--config", "lora", "--benchmark", mini_yaml, "--model")
    shapes = f"model.architecture={runs.model / 'config.json'}"
    offline = figures(capsys, *where, "nobody/has-this", shapes, code=1)
    assert offline["missing"] == [
        "model nobody/has-this: neither a folder nor in the hub's cache, and HF_HUB_OFFLINE is set"
    ]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    online = figures(capsys, *where, "nobody/has-this", shapes)
    assert online["notes"] == ["model nobody/has-this is not here: fetched from the hub by the first training"]
    shutil.copy(runs.model / "config.json", tmp_path)
    empty = figures(capsys, *where, tmp_path, code=1)
    assert empty["missing"] == [f"model {tmp_path}: no *.safetensors in it"]
    assert "no such folder" in figures(capsys, *where, tmp_path / "gone", shapes, code=1)["missing"][0]


def test_a_methods_own_files(capsys: pytest.CaptureFixture[str], mini_yaml: Path, runs: Runs, tmp_path: Path) -> None:
    warm = [
        "options.initial_experts_from=warmup",
        f"options.warmup_train={tmp_path / 'w.json'}",
        "options.warmup_images=x",
    ]
    where = ("--config", "llava_cmoe", "--model", runs.model, "--benchmark", mini_yaml, "adapter.train_projector=false")
    assert figures(capsys, *where, *warm, code=1)["missing"] == [
        f"options.warmup_train: {tmp_path / 'w.json'} does not exist"
    ]


# ---- The text


def test_the_text_fits_100_columns(capsys: pytest.CaptureFixture[str], mini_yaml: Path) -> None:
    overrides = ("training.steps=569000", "training.batch_size=128", "adapter.train_projector=false")
    where = ("--config", "llava_cmoe", "--model", "llava-1.5-13b", "--benchmark", mini_yaml, "--gpus", 8)
    text = plan(capsys, *where, "--deepspeed", "zero2_offload", "--extended-blocks", 22.75, *overrides, code=1)
    assert max(map(len, text.splitlines())) <= 100
    for part in ("in the host", "all together at 2,048 tokens", "features of the locator", "569,000", "micro-batch 16"):
        assert part in text
