"""``clmoe plan``: figures that the papers print, worked out by hand, and counts of really attached adapters."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from clmoe.train.forecast import Ask, make_forecast

from clmoe import cli
from clmoe.bases.llava import LoadedBase
from clmoe.benchmarks.base import load_benchmark
from clmoe.config import ModelConfig, dump_config, load_config, reload_config
from clmoe.errors import ClmoeError
from clmoe.experts.model import (
    add_routers,
    attach_adapter,
    count_parameters,
    expert_layers,
    freeze_experts,
    grow_experts,
)
from clmoe.methods import method_class
from clmoe.methods.plan import Plan, make_plan, meta_llava, plan_text, shapes_file
from clmoe.train.checkpoint import FREE_TRAINING_KEYS, Finished, Lineage, check_successor, training_identity
from clmoe.train.loop import planned_sharding
from clmoe.utils.paths import known_configs, repository_root
from tests.support import tiny_config

# LLaVA-1.5-7b: hidden 4096, FFN 11008, 32 blocks; one rank-r expert on an FFN projection has r * (4096 + 11008)
HIDDEN, BOTH, BLOCKS = 4096, 15104, 32


def plan_7b(method: str, *overrides: str, extended: float | None = None) -> Plan:
    config = load_config(method, {}, list(overrides), "llava-1.5-7b")
    return make_plan(method_class(config.method)(config), extended)


def on_results_page(what: str) -> str:
    """Our count as docs/results.md prints it beside the paper's."""
    paper = yaml.safe_load((repository_root() / "docs/results/paper.yaml").read_text(encoding="utf-8"))
    (ours,) = [entry["ours"] for entry in paper["counts"] if entry["what"].startswith(what)]
    return str(ours)


# ---- Published figures


def test_one_expert_in_22_75_blocks_is_the_papers_43_96_million() -> None:
    plan = plan_7b("llava_cmoe", extended=22.75)
    assert plan.growth is not None
    values = plan.growth.as_json()
    assert values["expert_parameters_per_block"] == 2 * 64 * BOTH == 1_933_312
    assert values["expert_parameters_per_task"] == 43_982_848
    assert on_results_page("LLaVA-CMoE: parameters trained") == f"{values['expert_parameters_per_task'] / 1e6:.2f} M"
    # every block: a router over the 8 old experts; 22.75 of them: one row more
    assert values["router_parameters_per_block"] == 8 * HIDDEN
    assert values["router_parameters_first_growth"] == 32 * 8 * HIDDEN + 93_184
    assert values["router_parameters_more_each_task"] == 93_184  # 22.75 * 4096
    assert plan.experts == 8 * 32 * 1_933_312
    assert plan.projector == 0
    text = plan_text(plan)
    assert "experts                                              43.98 M      43,982,848" in text


def test_lora_on_one_projection_is_the_papers_31_million() -> None:
    plan = plan_7b("lora", "adapter.rank=64", "adapter.targets=[up_proj]")
    assert plan.experts == 64 * BOTH * BLOCKS == 30_932_992
    assert on_results_page("LLaVA-CMoE's LoRA baseline") == f"{plan.experts / 1e6:.2f} M"
    assert (plan.routers, plan.growth) == (0, None)
    # the projector: two linears 1024 -> 4096 -> 4096 with biases
    assert plan.projector == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert plan.trainable == plan.experts + plan.projector
    (linear,) = plan.linears
    assert (linear.name, linear.din, linear.dout, linear.blocks) == ("up_proj", 4096, 11008, 32)
    assert (linear.experts, linear.rank, linear.scale) == (1, 64, 2.0)


def test_moelora_on_one_projection_is_the_papers_62_million() -> None:
    plan = plan_7b("moelora_cmoe_paper")
    assert plan.method == "moelora_cmoe_paper"
    assert plan.experts == 61_865_984
    assert on_results_page("LLaVA-CMoE's MoELoRA baseline") == f"{plan.experts / 1e6:.2f} M"
    assert plan.routers == 8 * HIDDEN * BLOCKS == 1_048_576
    assert plan.trainable == 61_865_984 + 1_048_576
    (linear,) = plan.linears
    assert (linear.experts, linear.rank, linear.total_rank) == (8, 16, 128)
    text = plan_text(plan)
    assert "61.87 M" in text
    assert "1.05 M" in text


def test_cl_moes_released_preset() -> None:
    """Four experts of rank 8 on all seven linears: 79.95 M, four rows of router for each, and the projector."""
    plan = plan_7b("clmoe_released")
    assert plan.experts == 32 * BLOCKS * (4 * 2 * HIDDEN + 3 * BOTH) == 79_953_920
    assert plan.routers == 4 * BLOCKS * (6 * HIDDEN + 11008) == 4_554_752
    assert plan.projector == 1024 * 4096 + 4096 + 4096 * 4096 + 4096 == 20_979_712
    text = plan_text(plan)
    assert all(f"{number} M" in text for number in ("79.95", "4.55", "20.98"))


@pytest.mark.parametrize("model", known_configs("models"))
@pytest.mark.parametrize("method", known_configs("methods"))
def test_every_yaml_loads_and_plans(method: str, model: str) -> None:
    benchmark = load_benchmark("playground-coin", check_files=False)
    config = load_config(method, benchmark.recipe if model == "playground" else {}, [], model)
    chosen = method_class(config.method)(config)
    plan = make_plan(chosen)
    assert plan.method == config.name
    assert (plan.trainable == 0) == (chosen.chain == "none")
    ask = Ask(planned_sharding("zero2", 2))
    forecast = make_forecast(chosen, benchmark, benchmark.order("norm", 0), plan, ask)
    assert (forecast.memory is None) == (chosen.chain == "none")
    assert max(map(len, plan_text(plan).splitlines())) <= 100


@pytest.mark.parametrize(
    ("name", "hidden", "ffn", "blocks"), [("llava-1.5-7b", 4096, 11008, 32), ("llava-1.5-13b", 5120, 13824, 40)]
)
def test_the_shipped_shapes_are_the_whole_models(name: str, hidden: int, ffn: int, blocks: int) -> None:
    config = load_config("lora", {}, [], name).model
    assert config.dtype == "bfloat16"
    model = meta_llava(shapes_file(config))
    block = 4 * hidden**2 + 3 * hidden * ffn + 2 * hidden
    language = blocks * block + 2 * 32064 * hidden + hidden
    # CLIP ViT-L/14-336: class, patches, 577 positions, two outer norms; a layer has 4 D^2, 8 D^2 and 13 D of vectors
    tower = 1024 + 3 * 14 * 14 * 1024 + 577 * 1024 + 4 * 1024 + 24 * (12 * 1024**2 + 13 * 1024)
    projector = 1024 * hidden + hidden + hidden**2 + hidden
    assert sum(parameter.numel() for parameter in model.parameters()) == language + tower + projector
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in model.parameters())
    assert model.config.vision_feature_layer == -2


# ---- Against adapters that are really attached

VARIANTS = [
    ("lora", ()),
    ("lora", ("adapter.train_projector=false", "adapter.targets=[q_proj,up_proj]")),
    ("moelora", ()),
    ("clmoe_released", ()),
    ("moelora", ("adapter.router_scope=per_block", "adapter.experts=2")),
    ("llava_cmoe", ()),
]


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_the_counts_are_those_of_the_attached_adapter(
    name: str, overrides: tuple[str, ...], tiny_folder: Path, tiny_base: LoadedBase
) -> None:
    config = tiny_config(name, tiny_folder, *overrides)
    method = method_class(config.method)(config)
    plan = make_plan(method)
    assert plan.shapes == str(tiny_folder / "config.json")
    assert plan.base == sum(parameter.numel() for parameter in tiny_base.model.parameters())
    model = attach_adapter(tiny_base.model, method.adapter(tiny_base))
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert plan.trainable == count_parameters(model)[0]
    assert plan.trainable == plan.experts + plan.routers + plan.projector
    assert plan.experts == sum(linear.parameters for linear in plan.linears)
    assert plan.routers == sum(layer.routers.instance[0].weight.numel() for layer in expert_layers(model).values())  # type: ignore[operator]
    assert sorted(linear.name for linear in plan.linears) == sorted(config.adapter.targets)
    assert plan.steps == 4
    assert plan.effective_scale == method.effective_scale()


def test_growth_is_what_an_extended_block_trains(tiny_folder: Path, tiny_base: LoadedBase) -> None:
    config = tiny_config("llava_cmoe", tiny_folder)
    method = method_class(config.method)(config)
    growth = make_plan(method, extended_blocks=1).growth
    assert growth is not None
    model = attach_adapter(tiny_base.model, method.adapter(tiny_base))
    layers = expert_layers(model)
    one = next(iter(layers))
    fresh = {k: e.fresh(1, torch.Generator()) for k, e in layers[one].experts.items()}
    freeze_experts(model, 1)
    grow_experts(model, 1, {one: fresh})
    widths = {name: (5 if name == one else 4, 48) for name in layers}
    add_routers(model, 1, {name: torch.zeros(shape) for name, shape in widths.items()})
    values = growth.as_json()
    experts = sum(e.A.numel() + e.B.numel() for e in layers[one].experts.values())  # type: ignore[union-attr]
    assert values["expert_parameters_per_task"] == experts == 8 * 2 * (48 + 64)
    assert values["router_parameters_first_growth"] == count_parameters(model)[0] - experts == (5 + 4) * 48


# ---- The verb


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    cli.main(["plan", *map(str, arguments)])
    return capsys.readouterr().out


def test_the_verb_prints_text_or_json(capsys: pytest.CaptureFixture[str], mini_yaml: Path, tiny_folder: Path) -> None:
    arguments = ("--config", "llava_cmoe", "--benchmark", mini_yaml, "--model", tiny_folder)
    override = "adapter.train_projector=false"
    text = output(capsys, *arguments, override)
    assert "colour                                24              12           4" in text
    assert "(--extended-blocks X tells" in text
    values = json.loads(output(capsys, *arguments, "--extended-blocks", "1.5", "--json", override))
    assert values["growth"]["expert_parameters_per_task"] == 3 * 8 * (48 + 64)  # 1.5 blocks of 2 linears of rank 8
    assert values["linears"][1] == {
        "name": "down_proj", "din": 64, "dout": 48, "blocks": 2, "experts": 4, "rank": 8, "total_rank": 32,
        "scale": 4.0, "parameters": 2 * 32 * 112,
    }  # fmt: skip
    assert values["steps_per_task"] == 4


def test_the_verb_counts_within_a_budget(
    capsys: pytest.CaptureFixture[str], mini_yaml: Path, tiny_folder: Path
) -> None:
    def rank(*overrides: str) -> int:
        arguments = ("--config", "lora", "--benchmark", mini_yaml, "--model", tiny_folder, "--json", *overrides)
        return int(json.loads(output(capsys, *arguments))["linears"][0]["rank"])

    # three projections of 48 and 64 in two blocks: 672 parameters with every rank
    assert rank(f"adapter.budget={6 * 672 + 300}", "adapter.train_projector=false") == 6
    assert rank("adapter.rank=5") == 5


def test_a_method_without_training(capsys: pytest.CaptureFixture[str], mini_yaml: Path) -> None:
    arguments = ("--config", "zero_shot", "--benchmark", mini_yaml)
    text = output(capsys, *arguments)
    assert text.startswith("zero_shot trains nothing\n")
    assert text.endswith("nothing is missing\n")
    assert "memory" not in text
    assert json.loads(output(capsys, *arguments, "--json"))["trainable_parameters"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lora", "--extended-blocks", "1"), "--extended-blocks: lora adds no experts to later tasks"),
        (("llava_cmoe", "--extended-blocks", "1", "options.extend=none"), "adds no experts to later tasks"),
        (("llava_cmoe", "--extended-blocks", "33"), "--extended-blocks 33: the model has 32 blocks"),
        (("llava_cmoe", "--extended-blocks", "-1"), "--extended-blocks -1: the model has 32 blocks"),
        (("llava_cmoe", "--extended-blocks", "nan"), "--extended-blocks nan: the model has 32 blocks"),
        (("llava_cmoe", "--extended-blocks", "1", "--steps"), "--extended-blocks belongs to the parameters"),
    ],
)
def test_extended_blocks_without_a_meaning(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], mini_yaml: Path
) -> None:
    method, *rest = arguments
    where = ("--benchmark", str(mini_yaml), "--model", "llava-1.5-7b")
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--config", method, *where, *rest, "adapter.train_projector=false"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# ---- Where the shapes come from


def test_a_folder_goes_before_the_named_file(tiny_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    shutil.copy(tiny_folder / "config.json", other)
    assert shapes_file(ModelConfig(path=str(tiny_folder), architecture=str(other))) == tiny_folder / "config.json"
    assert shapes_file(ModelConfig(path="some/hub-name", architecture=str(other))) == other


def test_the_shipped_file_is_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = shapes_file(load_config("lora", {}, [], "llava-1.5-13b").model)
    assert found == repository_root() / "configs" / "models" / "llava-1.5-13b.config.json"


def test_shapes_that_are_nowhere() -> None:
    with pytest.raises(ClmoeError, match=r"some/hub-name is not a folder here.*llava-1\.5-7b.*model\.architecture"):
        shapes_file(ModelConfig(path="some/hub-name"))
    with pytest.raises(ClmoeError, match=r"model\.architecture nowhere\.json: no such file"):
        shapes_file(ModelConfig(path="some/hub-name", architecture="nowhere.json"))


def set_hidden(value: object) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["text_config"].update(hidden_size=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(model_type="llama"), "field 'model_type': expected 'llava', found 'llama'"),
        (lambda values: values["text_config"].update(model_type="nope"), "not a LLaVA that transformers can build"),
        (set_hidden("wide"), "hidden_size"),
        (
            lambda values: values["vision_config"].update(num_attention_heads=0),
            "not a LLaVA that transformers can build",
        ),
        (set_hidden(-1), "not a LLaVA that transformers can build"),
    ],
)
def test_a_broken_file_is_named(
    change: Callable[[dict[str, Any]], None], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    values = json.loads((tiny_folder / "config.json").read_text())
    change(values)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ClmoeError, match=rf"broken\.json: .*{message}") as error:
        meta_llava(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[]", "{", "null"])
def test_a_file_of_another_kind_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ClmoeError, match=r"broken\.json"):
        meta_llava(path)


def test_the_field_makes_no_training_another_one() -> None:
    plain = load_config("lora", {}, [])
    named = load_config("lora", {}, ["model.architecture=a.json"])
    assert named.model.architecture == "a.json"
    assert training_identity(named) == training_identity(plain)
    assert dump_config(named) == dump_config(plain)
    values = dataclasses.asdict(plain)
    del values["evaluation"], values["label"], values["model"]["architecture"]
    for key in FREE_TRAINING_KEYS:
        del values["training"][key]
    assert training_identity(plain) == hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def test_a_model_that_differs_is_named_by_what_matters(tmp_path: Path) -> None:
    """The refusal names ``model.path``, not ``model.architecture``, which comes first in the alphabet."""
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(load_config("lora", {}, [])))
    lineage = Lineage("lora", "mini", ["a"], 0, None, "", "", 1, 1, 1, None, {})
    parent = Finished(tmp_path, "", lineage, reload_config(path, []))
    check_successor(parent, load_config("lora", {}, ["model.architecture=a.json"]), "mini", "b")
    with pytest.raises(ClmoeError, match=r"model\.path playground/base there, x here"):
        check_successor(parent, load_config("lora", {}, ["model.architecture=a.json", "model.path=x"]), "mini", "b")
