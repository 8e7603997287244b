"""Configuration: types are checked, unknown keys name the nearest, and every shipped YAML loads and plans."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from clmoe import cli
from clmoe.benchmarks.base import load_benchmark
from clmoe.config import (
    AdapterConfig,
    Config,
    TrainingConfig,
    build,
    dump_config,
    load_config,
    merge,
    parse_overrides,
    reload_config,
)
from clmoe.errors import ClmoeError
from clmoe.methods import method_class
from clmoe.utils.paths import known_configs


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=3", r"unknown key 'step'\. Did you mean 'steps'\?"),
        ("trainng.steps=3", r"unknown key 'trainng'\. Did you mean 'training'\?"),
        ("adapter.ranks=3", r"unknown key 'ranks'\. Did you mean 'rank'\?"),
        ("evaluation.batchsize=3", r"unknown key 'batchsize'\. Did you mean 'batch_size'\?"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, message: str) -> None:
    with pytest.raises(ClmoeError, match=message):
        load_config("clmoe", {}, [override])


def test_a_configuration_may_extend_another(tmp_path: Path) -> None:
    changed = tmp_path / "mine.yaml"
    changed.write_text("extends: clmoe\nlabel: mine\nadapter: {rank: 3}\noptions: {beta: 1}\n")
    mine, plain = load_config(str(changed), {}, []), load_config("clmoe", {}, [])
    assert (mine.label, mine.adapter.rank, mine.options["beta"]) == ("mine", 3, 1)
    expected = dataclasses.replace(
        plain,
        label="mine",
        adapter=dataclasses.replace(plain.adapter, rank=3),
        options={**plain.options, "beta": 1},
    )
    assert mine == expected
    assert load_config(str(changed), {"adapter": {"rank": 5}}, []).adapter.rank == 5, "the recipe goes over both"


def test_extending_is_one_level_and_names_are_checked(tmp_path: Path) -> None:
    changed = tmp_path / "mine.yaml"
    changed.write_text("extends: clmo\n")
    with pytest.raises(ClmoeError, match="Did you mean 'clmoe'"):
        load_config(str(changed), {}, [])
    changed.write_text("extends: llava_cmoe_pooled\n")
    with pytest.raises(ClmoeError, match="which extends another file itself"):
        load_config(str(changed), {}, [])


def test_a_methods_own_unknown_option_names_the_nearest() -> None:
    config = load_config("clmoe", {}, ["options.gama=0.5"])
    with pytest.raises(ClmoeError, match=r"options: unknown key 'gama'\. Did you mean 'gamma'\?"):
        method_class("clmoe")(config)
    with pytest.raises(ClmoeError, match="unknown key 'beta'"):
        method_class("lora")(load_config("lora", {}, ["options.beta=0.5"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=many", "training.steps: 'many' is a str, expected int"),
        ("training.steps=2.5", "training.steps: 2.5 is a float, expected int"),
        ("training.steps=true", "training.steps: True is a bool, expected int"),
        ("training.learning_rate=fast", "training.learning_rate: 'fast' is not a number"),
        ("training.gradient_checkpointing=1", "gradient_checkpointing: 1 is a int, expected bool"),
        ("adapter.rank_is=each", "'each' is not one of total, per_expert"),
        ("adapter.targets=mlp", "adapter.targets: 'mlp' is a str, expected list"),
        ("adapter.targets=[1]", r"adapter.targets\[0\]: 1 is a int, expected str"),
        ("model.dtype=fp8", "'fp8' is not one of float32, bfloat16, float16"),
        ("training=5", "training: expected a mapping, got 5"),
        ("seed=null", "seed: None is a NoneType, expected int"),
    ],
)
def test_wrong_types_name_the_field(override: str, message: str) -> None:
    with pytest.raises(ClmoeError, match=message):
        load_config("lora", {}, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rank=0", "adapter.rank must be at least 1, not 0"),
        ("adapter.experts=0", "adapter.experts must be at least 1, not 0"),
        ("adapter.router_top_k=-1", "adapter.router_top_k must be at least 1, not -1"),
        ("adapter.dropout=1", r"adapter.dropout must be at least 0 and below 1, not 1\.0"),
        ("adapter.targets=[]", "adapter.targets is empty"),
        ("adapter.targets=[up_proj, downproj]", "adapter.targets: unknown linear 'downproj'. Did you mean 'down_proj'"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(override: str, message: str) -> None:
    with pytest.raises(ClmoeError, match=message):
        load_config("clmoe", {}, [override])


def test_a_blocks_router_serves_its_ffn_only() -> None:
    with pytest.raises(ClmoeError, match=r"adapter\.targets: q_proj is not a part of the FFN"):
        load_config("clmoe", {}, ["adapter.router_scope=per_block", "adapter.targets=[up_proj, q_proj]"])


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("0.001", 1e-3), ("1", 1.0), ("5.0e-5", 5e-5)])
def test_numbers_may_be_written_as_people_write_them(text: str, value: float) -> None:
    read = load_config("lora", {}, [f"training.learning_rate={text}"]).training.learning_rate
    assert read == value
    assert type(read) is float


def test_fields_that_may_be_empty() -> None:
    assert load_config("lora", {"training": {"steps": 5}}, ["training.steps=null"]).training.steps is None
    assert load_config("clmoe", {}, ["adapter.router_top_k=2"]).adapter.router_top_k == 2


def test_precedence_of_method_recipe_model_and_overrides(tmp_path: Path) -> None:
    method = tmp_path / "mine.yaml"
    method.write_text("method: lora\nadapter: {rank: 3, alpha: 7}\ntraining: {steps: 1, batch_size: 2}\n")
    model = tmp_path / "model.yaml"
    model.write_text("path: there\ndtype: bfloat16\n")
    recipe = {"training": {"steps": 10, "learning_rate": 0.5}, "model": {"path": "recipe"}}
    config = load_config(str(method), recipe, ["training.steps=20", "model.dtype=float32"], str(model))
    assert (config.adapter.rank, config.adapter.alpha) == (3, 7.0)
    assert (config.training.steps, config.training.batch_size, config.training.learning_rate) == (20, 2, 0.5)
    assert (config.model.path, config.model.dtype) == ("there", "float32")
    assert config.training.warmup_ratio == TrainingConfig().warmup_ratio


def test_a_model_is_a_name_a_file_or_a_folder() -> None:
    assert load_config("lora", {}, [], "playground").model.path == "playground/base"
    assert load_config("lora", {}, [], "some/where").model.path == "some/where"


def test_overrides() -> None:
    pairs = ["training.steps=20", "training.batch_size=4", "options.beta=1", "label=a=b", "adapter.targets=[up_proj]"]
    assert parse_overrides(pairs) == {
        "training": {"steps": 20, "batch_size": 4},
        "options": {"beta": 1},
        "label": "a=b",
        "adapter": {"targets": ["up_proj"]},
    }
    for wrong in ("training.steps", "=3", ""):
        with pytest.raises(ClmoeError, match="write key=value"):
            parse_overrides([wrong])
    with pytest.raises(ClmoeError, match=r"override 'training\.trackers=\[wandb': the value is not YAML"):
        parse_overrides(["training.trackers=[wandb"])


def test_merge_replaces_values_and_joins_mappings() -> None:
    low, high = {"a": {"x": 1, "y": 2}, "b": [1, 2]}, {"a": {"y": 3}, "b": [4], "c": None}
    assert merge(low, high) == {"a": {"x": 1, "y": 3}, "b": [4], "c": None}
    assert low == {"a": {"x": 1, "y": 2}, "b": [1, 2]}


def test_a_frozen_config_is_read_back_and_has_stable_bytes(tmp_path: Path) -> None:
    config = load_config("clmoe_released", {}, ["training.steps=3", "adapter.scale=1.5"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert reload_config(path, []) == config
    assert dump_config(reload_config(path, [])) == path.read_text()
    assert reload_config(path, ["evaluation.limit=7"]).evaluation.limit == 7


@pytest.mark.parametrize("text", ["method: [", "- lora\n", "just text\n", "\x00"])
def test_a_broken_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ClmoeError, match=r"broken\.yaml"):
        load_config(str(path), {}, [])


def test_missing_files_and_names() -> None:
    with pytest.raises(ClmoeError, match=r"nowhere\.yaml: no such file"):
        load_config("nowhere.yaml", {}, [])
    with pytest.raises(ClmoeError, match="Did you mean 'clmoe'"):
        load_config("clmo", {}, [])
    with pytest.raises(ClmoeError, match="method"):
        build(Config, {}, "here")


def test_defaults_of_a_list_are_not_shared() -> None:
    assert AdapterConfig().targets is not AdapterConfig().targets


@pytest.mark.parametrize("name", known_configs("methods"))
@pytest.mark.parametrize("benchmark", known_configs("benchmarks"))
def test_every_method_plans_on_every_benchmark(name: str, benchmark: str, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_benchmark(benchmark, check_files=False)
    config = load_config(name, loaded.recipe, [])
    method = method_class(config.method)(config)
    if config.adapter.scale is not None and method.effective_scale() is not None:
        assert method.effective_scale() == pytest.approx(config.adapter.scale)
    cli.main(["plan", "--config", name, "--benchmark", benchmark, "--steps"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    tasks = [task.name for task in loaded.tasks]
    chains = {
        "none": [],
        "union": [["01", "all", "-"]],
        "separate": [[f"{i:02}", task, "-"] for i, task in enumerate(tasks, 1)],
        "sequence": [[f"{i:02}", task, tasks[i - 2] if i > 1 else "-"] for i, task in enumerate(tasks, 1)],
    }
    assert lines == chains[method.chain]


def test_a_plan_follows_the_order(capsys: pytest.CaptureFixture[str], mini_yaml: Path) -> None:
    cli.main(["plan", "--config", "lora", "--benchmark", str(mini_yaml), "--steps", "--order", "side,colour"])
    assert capsys.readouterr().out.splitlines() == ["01 side -", "02 colour side"]


def test_every_yaml_names_only_fields_that_exist() -> None:
    root = Path(cli.__file__).parents[1] / "configs"
    fields = {field.name for field in dataclasses.fields(Config)} | {"extends"}
    for path in (root / "methods").glob("*.yaml"):
        assert yaml.safe_load(path.read_text()).keys() <= fields, path.name
