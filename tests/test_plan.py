"""``clmoe plan`` against figures that papers print, adapters really attached and trained, and measured memory."""

import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from clmoe import cli
from clmoe.bases.families import FAMILIES
from clmoe.bases.llava import load_base, shapes_file
from clmoe.benchmarks.base import Benchmark, load_benchmark
from clmoe.config import Config, ModelConfig, load_config
from clmoe.errors import ClmoeError
from clmoe.experts.model import adapter_tensors, attach_adapter
from clmoe.methods import method_class
from clmoe.plan import (
    FirstTask,
    activation_bytes,
    by_task,
    first_task,
    make_plan,
    plan_text,
    state_bytes,
)
from clmoe.plan.shapes import SIZE
from clmoe.train.checkpoint import read_checkpoint
from clmoe.utils.paths import known_configs, shipped_root
from tests.bases import tiny_families
from tests.runs import Runs
from tests.support import TASKS, TEST_ROWS, TRAIN_ROWS, load_script, tiny_config, write_benchmark

Values = dict[str, Any]
FROZEN_PROJECTOR = "adapter.train_projector=false"
HIDDEN, FFN, BLOCKS = 4096, 11008, 32  # of LLaVA-1.5-7b
PROJECTOR = 1024 * HIDDEN + HIDDEN + HIDDEN * HIDDEN + HIDDEN


def first_of(config: Config) -> FirstTask:
    return first_task(method_class(config.method)(config))


# ---- Parameters: published figures, and adapters that are really attached


@pytest.mark.parametrize(
    ("method", "overrides", "expert", "router", "projector", "printed"),
    [
        ("lora", ("adapter.rank=64", "adapter.targets=[up_proj]"), 30_932_992, 0, PROJECTOR, "LLaVA-CMoE's LoRA"),
        ("moelora_cmoe_paper", (), 61_865_984, 1_048_576, 0, "LLaVA-CMoE's MoELoRA"),
        ("clmoe_released", (), 79_953_920, 4_554_752, PROJECTOR, None),
        ("llava_cmoe", (), 8 * 32 * 2 * 64 * (HIDDEN + FFN), 8 * HIDDEN * BLOCKS, 0, None),
    ],
)
def test_published_counts(
    method: str, overrides: tuple[str, ...], expert: int, router: int, projector: int, printed: str | None
) -> None:
    """The counts are LLaVA-CMoE's 31 M and 62 M (Table 8) and CL-MoE's released preset, as docs/results.md has them."""
    first = first_of(load_config(method, {}, list(overrides), "llava-1.5-7b"))
    assert [first.count(part) for part in ("expert", "router", "projector")] == [expert, router, projector]
    assert first.count() == expert + router + projector
    assert sum(linear.parameters for linear in first.linears) == expert
    if printed:
        assert on_results_page(printed) == f"{expert / 1e6:.2f} M"


def on_results_page(what: str) -> str:
    paper = yaml.safe_load((shipped_root() / "docs/results/paper.yaml").read_text(encoding="utf-8"))
    (ours,) = [entry["ours"] for entry in paper["counts"] if entry["what"].startswith(what)]
    return str(ours)


def test_one_expert_in_22_75_blocks_is_the_papers_43_96_million() -> None:
    first = first_of(load_config("llava_cmoe", {}, [], "llava-1.5-7b"))
    trained, kept, growth = by_task(first, 3, 22.75)
    experts = 22.75 * growth["expert"]
    assert growth == {"expert": 2 * 64 * (HIDDEN + FFN), "router": 8 * HIDDEN, "router_row": HIDDEN}
    assert experts == 43_982_848 and on_results_page("LLaVA-CMoE: parameters trained") == f"{experts / 1e6:.2f} M"
    rows = round(22.75 * HIDDEN)  # added to the routers by each task up to and including this one
    assert trained == [first.count(), *(experts + 8 * HIDDEN * BLOCKS + n * rows for n in (1, 2))]
    assert kept == sum(trained)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", known_configs("methods"))
def test_every_method_plans(method: str) -> None:
    benchmark = load_benchmark("playground-coin", check_files=False)
    large = method in ("lora", "clmoe", "llava_cmoe")
    config = load_config(method, *(({}, [], "vicuna-7b-v1.5") if large else (benchmark.recipe, [])))
    values = make_plan(method_class(config.method)(config), benchmark, benchmark.order("norm", 0), 2, "zero2")
    assert (values["trainable_parameters"] == 0) == ("memory" not in values) == (method == "zero_shot")
    assert max(map(len, plan_text(values | {"notes": [], "missing": []}).splitlines())) <= 100


ALL = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FFN_LINEARS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.mark.parametrize(("model", "D", "F", "blocks"), [("7b", 4096, 11008, 32), ("13b", 5120, 13824, 40)])
@pytest.mark.parametrize(
    ("method", "linears", "rank", "experts", "projector"),
    [
        ("lora", FFN_LINEARS, 64, 0, True),
        ("olora", FFN_LINEARS, 64, 0, True),
        ("moelora", FFN_LINEARS, 128, 8, True),
        ("clmoe", FFN_LINEARS, 64, 8, True),
        ("clmoe_released", (*ALL, *FFN_LINEARS), 32, 4, True),
        ("llava_cmoe", ("mlp.up_proj", "mlp.down_proj"), 8 * 64, 8, False),
    ],
)
def test_what_is_saved_at_full_size(
    method: str, linears: tuple[str, ...], rank: int, experts: int, projector: bool,
    model: str, D: int, F: int, blocks: int,
) -> None:  # fmt: skip
    """Every saved tensor has the expected name, shape and type; routers are per linear, LLaVA-CMoE's per block."""
    first, expected = first_of(load_config(method, {}, [], f"llava-1.5-{model}")), {}
    for block in range(blocks):
        for linear in linears:
            name = linear.rpartition(".")[2]
            dout, din = {"down_proj": (D, F), "gate_proj": (F, D), "up_proj": (F, D)}.get(name, (D, D))
            at, inner = f"language_model.layers.{block}.{linear}", f"clmoe_experts.{name}"
            if method == "llava_cmoe":
                at = at.rpartition(".")[0]
            keys = ("lora_A.weight", "lora_B.weight") if method == "lora" else (f"{inner}.A", f"{inner}.B")
            expected |= {f"{at}.{keys[0]}": (rank, din), f"{at}.{keys[1]}": (dout, rank)}
            if experts:
                read = D if method == "llava_cmoe" else din
                expected[f"{at}.clmoe_routers.instance.0.weight"] = (experts, read)
    if projector:
        for number, din in ((1, 1024), (2, D)):
            part = f"multi_modal_projector.linear_{number}"
            expected |= {f"{part}.weight": (D, din), f"{part}.bias": (D,)}
    saved = adapter_tensors(first.model)
    assert {name.removeprefix("base_model.model.model."): tuple(t.shape) for name, t in saved.items()} == expected
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    parameters = sum(math.prod(shape) for shape in expected.values())
    assert first.count() == parameters
    share = state_bytes(first, 8, "zero2")
    assert [share[part] for part in ("adapter", "gradients", "optimizer")] == [
        4 * parameters, 4 * parameters // 8, 12 * parameters // 8,
    ]  # fmt: skip


FAST = ("options.extend=every", "options.probe_min_steps=1", "locator.options.steps=1", FROZEN_PROJECTOR)


ROUTER = ("options.stored=2", "options.router_rank=8", "options.router_epochs=1", FROZEN_PROJECTOR)


@pytest.mark.parametrize("method", ["lora", "clmoe", "olora", "keeplora", "llava_cmoe", "mrlora", "modalprompt"])
def test_counts_are_those_of_checkpoints(method: str, mini: Benchmark, runs: Runs) -> None:
    """Planned counts equal what each task trained and what is kept in the end; CL-MoE's task gates are not trained."""
    grows, overrides = method == "llava_cmoe", {"llava_cmoe": FAST, "mrlora": ROUTER}.get(method, ())
    checkpoints = runs.chain(method, *overrides, tasks=TASKS if grows else TASKS[:2])
    last = load_file(checkpoints[-1] / "adapter_model.safetensors").items()
    first = first_of(load_config(method, mini.recipe, list(overrides), str(runs.model)))
    trained, kept, _ = by_task(first, len(checkpoints), 2 if grows else None)
    assert trained == [read_checkpoint(c).lineage.trainable_parameters for c in checkpoints]
    assert kept == sum(tensor.numel() for name, tensor in last if "gates" not in name)
    assert first.count("expert", kept=True) == sum(linear.parameters for linear in first.linears)


# ---- Memory


def full_width(name: str, tokens: int = 160) -> None:
    """Print the measured and planned memory of a step with two blocks and two tower layers of LLaVA-1.5-7b."""
    torch.set_num_threads(1)
    shapes = json.loads(shapes_file(load_config(name, {}, [], "llava-1.5-7b").model).read_text())
    shapes["text_config"]["num_hidden_layers"], shapes["vision_config"]["num_hidden_layers"] = 2, 2
    shapes["vision_config"]["image_size"] = 112  # 64 tokens
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shapes))
        config = load_config(name, {}, ["model.dtype=float32"], folder)
        first, before = first_of(config), largest_size()
        planned = [activation_bytes(first, 2, tokens, again) for again in (False, True)]
        steps = load_script("bench/rehearse").measured(config, 2, tokens)
    process = largest_size() - before
    state = sum(state_bytes(first).values())
    found = [(step.state, step.peak) for step in steps]
    print(json.dumps({"state": state, "planned": planned, "measured": found, "process": process}))


def largest_size() -> int:
    """The peak resident size of this process in bytes. getrusage's figure starts at the size of its parent process."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


@pytest.mark.slow
def test_memory_of_a_step_at_true_width() -> None:
    """The plan fits the bytes of the tensors and, as a second witness, the resident size of a process of its own."""
    code = "from tests.test_plan import full_width; full_width('clmoe')"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    for (state, peak), planned in zip(found["measured"], found["planned"], strict=True):
        assert found["state"] == pytest.approx(state, rel=0.01)
        assert planned == pytest.approx(peak, rel=0.15)
    assert found["state"] + max(found["planned"]) == pytest.approx(found["process"], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "olora", "clmoe_released", "llava_cmoe"])
def test_memory_of_a_step_in_bfloat16(name: str, tmp_path: Path) -> None:
    """The plan fits the bytes counted tensor by tensor at true width with 576 image tokens, without matrix products."""
    rehearse = load_script("bench/rehearse")
    (tmp_path / "config.json").write_text(json.dumps(rehearse.cut("llava-1.5-7b", 2)))
    config = load_config(name, {}, ["model.dtype=bfloat16"], str(tmp_path))
    state, *activations = rehearse.planned(config, 1, 640)
    for step, planned in zip(rehearse.measured(config, 1, 640, computes=False), activations, strict=True):
        assert state == pytest.approx(step.state, rel=0.01)
        assert planned == pytest.approx(step.peak, rel=0.1)


def step_and_plan(family: str, method: str, dtype: str, folder: Path) -> tuple[list[int], list[int]]:
    """Measured and planned bytes of a family's wide model: state, then activations without and with recomputation."""
    rehearse = load_script("bench/rehearse")
    config = load_config(method, {}, [f"model.dtype={dtype}"], str(tiny_families.save_wide(family, folder)))
    plain, again = rehearse.measured(config, 2, 320, computes=False)
    return [plain.state, plain.peak, again.peak], list(rehearse.planned(config, 2, 320))


def families_wide() -> None:
    """Print the ratio of planned to measured activations for every family, type and method."""
    for family, dtype in product(tiny_families.FAMILIES, ("float32", "bfloat16")):
        for method in ("lora", "clmoe", "llava_cmoe"):
            with tempfile.TemporaryDirectory() as folder:
                measured, planned = step_and_plan(family, method, dtype, Path(folder))
            print(family, dtype, method, *(f"{p / m:.3f}" for m, p in zip(measured[1:], planned[1:], strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "clmoe"])
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_memory_of_a_step_of_other_families(family: str, method: str, tmp_path: Path) -> None:
    """The plan also fits attention with a quarter of the keys, norms on them (Qwen3, Gemma) and masks (Qwen, Gemma)."""
    measured, planned = step_and_plan(family, method, "bfloat16", tmp_path)
    assert planned[0] == pytest.approx(measured[0], rel=0.01)
    assert planned[1:] == pytest.approx(measured[1:], rel=0.1)


@pytest.mark.parametrize(
    ("gpus", "settings", "buffers", "shares"),
    [
        (1, None, 0, [1, 1, 1, 2, 0]),  # base, adapter; gradients, optimizer, communication as shares of the adapter
        (4, None, 0, [1, 1, 1, 2, 1]),
        (4, "zero1", 5e8, [1, 1, 1, 3 / 4, 0]),
        (4, "zero2", 2 * 5e7, [1, 1, 1 / 4, 3 / 4, 0]),
        (4, "zero2_offload", 2 * 5e7, [1, 1, 0, 0, 0]),
    ],
)
def test_state_is_cut_as_zero_cuts_it(
    gpus: int, settings: str | None, buffers: float, shares: list[float], tiny_folder: Path, tmp_path: Path
) -> None:
    """Each part of the state is a share of the bytes of base or adapter; ``buffers`` counts float32 elements."""
    first = first_of(tiny_config("lora", tiny_folder))
    if settings == "zero1":  # the user's own file
        settings = str(tmp_path / "zero1.json")
        Path(settings).write_text('{"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}')
    P, B = 4 * first.count(), first.base_bytes
    communication = P * shares[4] + 4 * buffers
    parts = [B * shares[0], *(P * share for share in shares[1:4]), communication]
    assert list(state_bytes(first, gpus, settings).values()) == pytest.approx(parts, abs=1)


def test_four_bit_weights_are_what_double_quantisation_stores() -> None:
    """The planned bytes of 4-bit weights are those that bitsandbytes stores, counted tensor by tensor."""
    plain, packed = (
        first_of(load_config("lora", {}, [f"model.load_in_4bit={on}"], "llava-1.5-7b")).base_bytes
        for on in ("false", "true")
    )
    weights = BLOCKS * (4 * HIDDEN**2 + 3 * HIDDEN * FFN)
    assert plain - packed == 2 * weights - (weights // 2 + weights // 64 + 4 * (weights // 64 // 256))


# ---- The verb


def plan(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Values:
    """Run ``clmoe plan --json``, which must end with ``code``; return its values."""
    capsys.readouterr()
    try:
        cli.main(["plan", *map(str, arguments), "--json"])
    except SystemExit as stop:
        assert stop.code == code
    else:
        assert code == 0
    return json.loads(capsys.readouterr().out)


def test_records_steps_and_batches(capsys: pytest.CaptureFixture[str], mini_yaml: Path, runs: Runs) -> None:
    where = ("--config", "lora", "--model", runs.model, "--benchmark", mini_yaml)
    chosen = ("training.steps=null", "training.batch_size=24", "training.epochs=1.5", "training.micro_batch_size=2")
    values = plan(capsys, *where, "--order", ",".join(TASKS[1::-1]), "--gpus", 4, *chosen)
    counts = {"train_records": TRAIN_ROWS, "test_records": TEST_ROWS, "steps": math.ceil(1.5 * TRAIN_ROWS / 24)}
    parameters = values["trainable_parameters"]
    assert values["tasks"] == [{"task": name, **counts, "parameters": parameters} for name in TASKS[1::-1]]
    assert values["batch"] == {"global": 24, "gpus": 4, "micro": 2, "accumulation": 3}
    memory, recomputed = values["memory"], (*chosen, "training.gradient_checkpointing=true")
    assert memory["tokens"] == 4 + 64
    parts = ("base", "adapter", "gradients", "optimizer", "communication", "activations")
    assert memory["total"] == sum(memory[part] for part in parts)
    for less in (("--tokens", 40, *chosen), recomputed):
        assert plan(capsys, *where, "--gpus", 4, *less)["memory"]["total"] < memory["total"]
    with pytest.raises(ClmoeError, match=r"training\.batch_size 24"):
        config = load_config("lora", {}, ["training.batch_size=24"], str(runs.model))
        make_plan(method_class("lora")(config), load_benchmark(str(mini_yaml)), [TASKS[0]], gpus=5)


def test_passes_and_the_union(capsys: pytest.CaptureFixture[str], tmp_path: Path, runs: Runs) -> None:
    benchmark = write_benchmark(tmp_path)
    values = yaml.safe_load(benchmark.read_text())
    values["tasks"][0]["passes"] = 3
    benchmark.write_text(yaml.safe_dump(values))
    where = ("--model", runs.model, "--benchmark", benchmark)
    alone = plan(capsys, "--config", "lora", *where, "training.steps=null")["tasks"]
    assert [row["steps"] for row in alone] == [9, 3, 3]
    (union,) = plan(capsys, "--config", "multitask", *where, "training.steps=null")["tasks"]
    assert (union["task"], union["train_records"], union["steps"]) == ("all", 5 * TRAIN_ROWS, 15)
    assert plan(capsys, "--config", "multitask", *where, "training.steps=4")["tasks"][0]["steps"] == 12
    none = plan(capsys, "--config", "zero_shot", "--benchmark", benchmark)
    assert none["trainable_parameters"] == 0 and {row["steps"] for row in none["tasks"]} == {0}


def test_every_missing_file_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, runs: Runs) -> None:
    benchmark, (first, second, third) = write_benchmark(tmp_path), TASKS
    (tmp_path / first / "train.json").unlink()
    (tmp_path / second / "test.json").write_text('[{"question_id": 1}, ')
    shutil.rmtree(tmp_path / second / "images")
    own = (f"options.warmup_train={tmp_path / 'w'}", "options.warmup_images=x", "options.initial_experts_from=warmup")
    where = ("training.steps=null", FROZEN_PROJECTOR, "--config", "llava_cmoe", "--benchmark", benchmark)
    values = plan(capsys, *own, *where, "--model", runs.model, code=1)
    names = (f"{first}/train.json", f"{second}/images", "w", f"{second}/test.json")
    assert all(str(tmp_path / name) in item for name, item in zip(names, values["missing"], strict=True))
    assert [row["steps"] for row in values["tasks"]] == [None, 3, 3]
    assert plan(capsys, *where, "--model", runs.model, "--order", third)["missing"] == []
    gone = plan(capsys, *where, "--model", runs.model, "--data", tmp_path / "nowhere", code=1)
    assert len(gone["missing"]) == 1 + 3 * len(TASKS) and gone["memory"]["total"] > 0
    shutil.copy(runs.model / "config.json", tmp_path)
    assert "safetensors" in plan(capsys, *where, "--model", tmp_path, "--order", third, code=1)["missing"][0]
    shapes = f"model.architecture={runs.model / 'config.json'}"
    hub = plan(capsys, shapes, *where, "--model", "nobody/has-this", "--order", third)
    assert hub["missing"] == [] and "nobody/has-this" in hub["notes"][0]


def test_extended_blocks_without_a_meaning(mini: Benchmark) -> None:
    for name, blocks in (("lora", 1), ("zero_shot", 1), ("llava_cmoe", 33), ("llava_cmoe", float("nan"))):
        method = method_class(name)(load_config(name, {}, [], "llava-1.5-7b"))
        with pytest.raises(ClmoeError, match="--extended-blocks"):
            make_plan(method, mini, list(TASKS), extended_blocks=blocks)


# ---- Other families


@pytest.mark.parametrize("name", tiny_families.FAMILIES)
def test_every_family_plans(name: str, capsys: pytest.CaptureFixture[str], mini_yaml: Path, tmp_path: Path) -> None:
    """A family's plan has the parameters of the loaded base and the image tokens that its processor counts."""
    folder = tiny_families.save_family(name, tmp_path / name)
    base, config = load_base(ModelConfig(path=str(folder))), tiny_config("clmoe", folder)
    values = plan(capsys, "--config", "clmoe", "--model", folder, "--benchmark", mini_yaml, "training.steps=3")
    assert values["base_parameters"] == sum(parameter.numel() for parameter in base.model.parameters())
    first = first_of(config)
    attached = attach_adapter(base.model, first.method.adapter(base))
    assert first.count() == sum(parameter.numel() for parameter in attached.parameters() if parameter.requires_grad)
    (width, height), chat = SIZE, base.chat
    assert chat is not None and first.image.source.startswith(f"{width} x {height}")
    if name != "smolvlm":  # whose processor cannot count
        counted = chat.processor._get_num_multimodal_tokens(image_sizes=[[height, width]])["num_image_tokens"][0]
        assert first.image.tokens == pytest.approx(counted, abs=6), "besides marks around it, here of single bytes"
    assert "32 x 24 pixels" in values["image"]["source"], "the benchmark's images"
    assert values["memory"]["tokens"] == values["image"]["tokens"] + 64
    for file in folder.glob("*processor_config.json"):
        file.unlink()
    assumed = first_of(config).image
    assert str(folder) in assumed.source and assumed.tokens == FAMILIES[name].assumed[0]  # type: ignore[index]


# ---- Where the shapes come from


def test_where_shapes_are_found(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.json"
    shutil.copy(tiny_folder / "config.json", other)
    assert shapes_file(ModelConfig(path=str(tiny_folder), architecture=str(other))) == tiny_folder / "config.json"
    assert shapes_file(ModelConfig(path="some/hub-name", architecture=str(other))) == other
    monkeypatch.chdir(tmp_path)
    shipped = shipped_root() / "configs" / "models" / "llava-1.5-13b.config.json"
    assert shapes_file(load_config("lora", {}, [], "llava-1.5-13b").model) == shipped
    cached = tmp_path / "hub" / "models--some--kept"
    (cached / "snapshots" / "1").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    shutil.copy(other, cached / "snapshots" / "1" / "config.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert shapes_file(ModelConfig(path="some/kept")) == cached / "snapshots" / "1" / "config.json"
    with pytest.raises(ClmoeError, match=r"some/hub-name.*llava-1\.5-7b.*model\.architecture"):
        shapes_file(ModelConfig(path="some/hub-name"))
    with pytest.raises(ClmoeError, match=r"nowhere\.json"):
        shapes_file(ModelConfig(path="some/hub-name", architecture="nowhere.json"))
