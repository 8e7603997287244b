"""All methods of a comparison keep to one budget, and a finished run records what it has spent of it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from clmoe import cli
from clmoe.benchmarks.base import load_benchmark
from clmoe.config import Config, dump_config, load_config
from clmoe.methods import method_class
from clmoe.plan import by_task, first_task
from clmoe.plan.budget import within_budget
from clmoe.plan.spent import active_parameters, write_spent
from clmoe.train.checkpoint import Finished, Lineage, read_checkpoint, seal
from clmoe.utils.paths import shipped_root
from tests.runs import Runs
from tests.support import TASKS

GRID = yaml.safe_load((shipped_root() / "configs" / "grids.yaml").read_text())["grids"]["matched"]
METHODS = GRID["sections"]["All methods"]
BUDGET = [f"budget.{key}={value}" for key, value in GRID["budget"].items()]
PER_RANK = 4 * 3 * (128 + 344)  # for a LoRA on the FFN's three linears, in the four blocks of the playground's base
ROUTERS = 4 * 8 * (128 + 128 + 344)  # routers over eight experts, one for each of these linears


def configured(method: str, *overrides: str, benchmark: str = "playground-coin") -> Config:
    return load_config(method, load_benchmark(benchmark, check_files=False).recipe, list(overrides))


def kept(config: Config, tasks: int) -> int:
    method = method_class(config.method)(config)
    count = by_task(first_task(method), tasks, config.budget.extended_blocks if method.grows else None)[1]
    assert count is not None
    return count


@pytest.mark.parametrize(("benchmark", "tasks"), [("playground-coin", 8), ("playground-cl4vqa", 10)])
@pytest.mark.parametrize("method", METHODS)
def test_every_row_of_the_matched_table_keeps_to_its_budget(method: str, benchmark: str, tasks: int) -> None:
    before = configured(method, *BUDGET, *GRID["set"].get(method, []), benchmark=benchmark)
    config = within_budget(before, tasks)
    number, kind = kept(config, tasks), method_class(method)
    assert abs(number - 508_000) <= 0.02 * 508_000
    assert config.training.steps == 200 and kind(config).effective_scale() == kind(before).effective_scale()
    assert not kind.memory or config.options[kind.memory] == 800 / tasks
    rank = config.adapter.rank  # counted by hand as well, for methods that do not grow
    by_hand = {
        "lora": rank * PER_RANK,
        "clmoe": rank * PER_RANK + ROUTERS,
        "separate": tasks * rank * PER_RANK,
        "keeplora": tasks * rank * PER_RANK,
        "mrlora": (tasks + 1) * rank * PER_RANK,
    }
    assert number == by_hand.get(method, number)
    assert f" {number:,} (" in (shipped_root() / "docs" / "budget.md").read_text()


def test_the_scale_stays_where_alpha_gives_it() -> None:
    config = load_config("clmoe", {}, ["adapter.train_projector=false", "budget.parameters=508000"])
    found = within_budget(config, 8)
    assert (config.adapter.rank, config.adapter.alpha, found.adapter.rank, found.adapter.alpha) == (64, 128, 88, 176)


def test_nothing_changes_without_a_budget_or_where_nothing_trains() -> None:
    config = configured("replay")
    assert within_budget(config, 8) is config
    assert not {"budget", "tune", "tuned"} & yaml.safe_load(dump_config(config)).keys(), "checkpoints keep their bytes"
    untrained = configured("zero_shot", *BUDGET)
    assert within_budget(untrained, 8) is untrained
    only = within_budget(configured("replay", "budget.stored_samples=16"), 8)
    assert replace(only, options=config.options, budget=config.budget) == config and only.options["per_task"] == 2


@pytest.mark.parametrize(
    ("method", "settings", "named"),
    [
        ("clmoe", ["budget.parameters=100000"], r"64,512 with adapter\.rank=8 and 109,824 with adapter\.rank=16"),
        ("separate", ["budget.parameters=1000"], r"45,312 with adapter\.rank=1 "),
        ("replay", ["budget.stored_samples=100"], r"budget\.stored_samples 100 .* 8 tasks"),
        ("llava_cmoe", ["budget.parameters=508000"], r"budget\.extended_blocks"),
        ("lora", ["budget.parameters=90624", "adapter.rank=4"], r"adapter\.rank .* budget\.parameters"),
        ("lora", ["budget.steps=9", "training.epochs=1", "training.steps=null"], r"training\.\w+ .* budget\.steps"),
        ("dgg", ["budget.stored_samples=80", "options.per_task=1"], r"options\.per_task .* budget\.stored_samples"),
    ],
)
def test_a_budget_that_cannot_be_met_is_one_error(
    method: str, settings: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "--config", method, "--benchmark", "playground-coin", *settings])
    error = capsys.readouterr().err
    assert re.search(named, error) and error.count("\n") == 1


# ---- What a run has spent


def meets(**adapter: Any) -> dict[str, Any]:
    return {"router_owners": [], "router_top_k": None, "pick": "sum"} | adapter


EXPERTS = {"clmoe_experts.up_proj.A": (8, 8), "clmoe_experts.up_proj.B": (12, 8)}  # four of rank 2 on a linear 8 -> 12
CASES: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "LoRA of rank 2": ("lora", {}, {"lora_A.weight": (2, 8), "lora_B.weight": (12, 2)}),
    "four experts under a router": (
        "moelora", meets(layout={"0": [0] * 4}, router_owners=[0]),
        {**EXPERTS, "clmoe_routers.instance.0.weight": (4, 8)},
    ),
    "two of the four, the second task's router": (
        "llava_cmoe", meets(layout={"0": [0, 0, 0, 1]}, router_owners=[0, 1], router_top_k=2),
        {**EXPERTS, "clmoe_routers.instance.0.weight": (3, 8), "clmoe_routers.instance.1.weight": (4, 8)},
    ),
    "four tasks' LoRAs, one picked": ("separate", meets(layout={"0": [0, 1, 2, 3]}, pick="task"), EXPERTS),
    "four tasks' LoRAs, mixed": ("disco", meets(layout={"0": [0, 1, 2, 3]}, pick="task"), EXPERTS),
    "four tasks' LoRAs, added up": ("olora", meets(layout={"0": [0, 1, 2, 3]}), EXPERTS),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_worked_examples_of_active_parameters(case: str, tmp_path: Path) -> None:
    """``active_parameters`` gives the counts of the worked examples in docs/metrics.md, each printed as a sum there."""
    method, adapter, shapes = CASES[case]
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    tensors = {f"language_model.layers.0.mlp.up_proj.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    page = (shipped_root() / "docs" / "metrics.md").read_text()
    (row,) = re.findall(
        rf"^\| {re.escape(case)} \| ([\d x+()]+) \| (\d+) \| ([\d x+()]+) \| (\d+) \|$", page, re.MULTILINE
    )
    found = active_parameters(tmp_path, method_class(method))
    assert found == int(row[3]) == eval(row[2].replace("x", "*"))
    assert sum(tensor.numel() for tensor in tensors.values()) == int(row[1]) == eval(row[0].replace("x", "*"))


def test_the_worked_example_of_flops_and_bytes(tmp_path: Path) -> None:
    """``spent.json`` has metrics.md's figures: rank-16 LoRA with a memory, playground base, two tasks of 200 steps."""
    page = (shipped_root() / "docs" / "metrics.md").read_text()
    printed = {
        name: int(text.replace(",", "")) for name, text in re.findall(r"`(\w+)` = .* = ([\d,]+)$", page, re.MULTILINE)
    }
    config = configured("replay")
    folder, data = tmp_path / "run" / "02_b", tmp_path / "data"
    for name in ("a.png", "b.png"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_bytes(bytes(1000))
    records = [
        {"id": str(i), "image": name, "turns": [["q", "a"]]} for i, name in enumerate(("a.png", "b.png", "b.png"))
    ]
    dones = []
    for folder in (tmp_path / "run" / "01_a", tmp_path / "run" / "02_b"):
        folder.mkdir(parents=True)
        memory = [{"task": "a", "drawn_from": 9, "seed": 0, "records": records}]
        (folder / "memory.json").write_text(json.dumps(memory).ljust(1000))
        (folder / "adapter_config.json").write_text("{}".ljust(200))
        save_file({"layers.0.lora_A.weight": torch.zeros(90_624)}, folder / "adapter_model.safetensors")
        seal(folder)
        lineage = Lineage("replay", "x", ["a"], 0, None, "", 200, 90_624, 90_624, 2.0, {})
        dones.append(Finished(folder, "", lineage, config, config.locator))
    (tmp_path / "run" / "samples.json").write_text(json.dumps({d.folder.name: {"trained": 200 * 16} for d in dones}))
    write_spent(
        tmp_path / "run", replace(load_benchmark("playground-coin", check_files=False), root=data), config, dones
    )
    spent = json.loads((tmp_path / "run" / "spent.json").read_text())
    header = (folder / "adapter_model.safetensors").stat().st_size - 4 * 90_624
    assert spent["stored_bytes"] == printed["stored_bytes"] + header
    # T tokens of width D through L blocks; the tower, W wide, sees P patches and a class token in four layers
    T, D, F, L, V, W, P = 80, 128, 344, 4, 954, 96, 16
    blocks, attention = 2 * T * L * (4 * D * D + 3 * D * F), 2 * T * T * D * L
    tower = 4 * (2 * (P + 1) * (4 * W * W + 2 * W * 384) + 4 * (P + 1) ** 2 * W) + 2 * P * W * 3 * 14**2
    projector, adapter = 2 * P * (W * D + D * D), 2 * T * 90_624
    sample = 2 * (blocks + 2 * 16 * V * D) + 3 * attention + 3 * adapter + tower + projector
    assert spent["training_flops"] == 2 * 200 * 16 * sample == printed["training_flops"]
    question = blocks + attention + 2 * V * D + adapter + tower + projector
    assert spent["question_flops"] == question == printed["question_flops"]
    assert spent["stored_samples"] == 3 == printed["stored_samples"]
    (tmp_path / "run" / "samples.json").unlink()  # runs of older versions lack it
    write_spent(tmp_path / "run", load_benchmark("playground-coin", check_files=False), configured("lora"), dones)
    assert json.loads((tmp_path / "run" / "spent.json").read_text())["training_flops"] is None


@pytest.mark.slow
def test_a_run_meets_its_budget_and_says_what_it_spent(runs: Runs, tmp_path: Path) -> None:
    """MR-LoRA keeps a fourth LoRA, its router, on three tasks; the budget buys rank 2 on all linears of two blocks."""
    per_task = 2 * 2 * (4 * (48 + 48) + 3 * (48 + 64))
    budget = [f"budget.parameters={4 * per_task}", "budget.stored_samples=6", "budget.steps=1"]
    options = ["options.router_rank=8", "options.router_epochs=2", "options.router_batch=4"]
    where = ["--base", str(runs.model), "--output", str(tmp_path / "run")]
    cli.main(["run", "mrlora", str(runs.benchmark), *where, *budget, *options, "adapter.train_projector=false"])
    last = read_checkpoint(tmp_path / "run" / f"03_{TASKS[2]}")
    assert last.lineage.adapter_parameters == 4 * per_task
    assert last.config.budget.parameters == 4 * per_task and (last.config.adapter.rank, last.lineage.steps) == (2, 1)
    spent, samples = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("spent", "samples"))
    assert (spent["active_parameters"], spent["stored_samples"]) == (per_task, 6)
    assert samples[f"02_{TASKS[1]}"] == {"router": 8, "trained": 8}  # 4 records twice, 4 at a time; one step of 8
