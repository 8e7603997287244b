"""Configuration: types are checked, unknown keys name the nearest, and every shipped YAML loads."""

import dataclasses
import re
from pathlib import Path

import pytest

from clmoe.benchmarks.base import load_benchmark
from clmoe.config import (
    RENAMED,
    AdapterConfig,
    Config,
    LocatorConfig,
    TrainingConfig,
    build,
    dump_config,
    load_config,
    model_values,
    parse_overrides,
    reload_config,
)
from clmoe.errors import ClmoeError
from clmoe.locators import make_locator
from clmoe.methods import method_class
from clmoe.utils.paths import find_config, known_configs


def test_an_unknown_key_option_or_locator_names_the_nearest() -> None:
    for override, wrong, nearest in (
        ("training.step=3", "step", "steps"),
        ("trainng.steps=3", "trainng", "training"),
        ("locator.features=last", "features", "feature"),
    ):
        with pytest.raises(ClmoeError, match=f"'{wrong}'.*'{nearest}'"):
            load_config("clmoe", {}, [override])
    with pytest.raises(ClmoeError, match=r"options.*'gama'.*'gamma'"):
        method_class("clmoe")(load_config("clmoe", {}, ["options.gama=0.5"]))
    with pytest.raises(ClmoeError, match=r"options.*'beta'"):
        method_class("lora")(load_config("lora", {}, ["options.beta=0.5"]))
    with pytest.raises(ClmoeError, match=r"locator\.options.*'step'.*'steps'"):
        make_locator(load_config("llava_cmoe", {}, ["locator.options.step=5"]).locator, 0)
    with pytest.raises(ClmoeError, match=r"locator\.name.*'prototyp'.*'prototype'"):
        make_locator(load_config("clmoe", {}, ["locator=prototyp"]).locator, 0)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_key_says_its_new_name(old: str, new: str) -> None:
    with pytest.raises(ClmoeError, match=f"{old.split('.')[1]} is now {re.escape(new)}"):
        method_class("llava_cmoe")(load_config("llava_cmoe", {}, [f"{old}={{}}"]))


@pytest.mark.parametrize(
    ("override", "field", "found"),
    [
        ("training.steps=many", "training.steps", "'many'"),
        ("training.steps=2.5", "training.steps", "2.5"),
        ("training.steps=true", "training.steps", "True"),
        ("training.learning_rate=fast", "training.learning_rate", "'fast'"),
        ("training.gradient_checkpointing=1", "training.gradient_checkpointing", "1"),
        ("adapter.rank_is=each", "adapter.rank_is", "'each'"),
        ("adapter.targets=mlp", "adapter.targets", "'mlp'"),
        ("adapter.targets=[1]", r"adapter\.targets\[0\]", "1"),
        ("model.dtype=fp8", "model.dtype", "'fp8'"),
        ("locator.feature=middle", "locator.feature", "'middle'"),
        ("locator=5", "locator", "5"),
        ("training=5", "training", "5"),
        ("seed=null", "seed", "None"),
        # of the right type, but impossible
        ("adapter.rank=0", "adapter.rank", "0"),
        ("adapter.experts=0", "adapter.experts", "0"),
        ("adapter.router_top_k=-1", "adapter.router_top_k", "-1"),
        ("adapter.dropout=1", "adapter.dropout", "1"),
        ("adapter.targets=[]", "adapter.targets", "up_proj"),
        ("adapter.targets=[up_proj, downproj]", "adapter.targets", "'downproj'.*'down_proj'"),
        ("locator.samples=0", "locator.samples", "0"),
        ("adapter={router_scope: per_block, targets: [q_proj]}", "adapter.targets", "q_proj.*per_block"),
    ],
)
def test_a_wrong_value_names_the_field(override: str, field: str, found: str) -> None:
    with pytest.raises(ClmoeError, match=f"{field}.*{found}"):
        load_config("lora", {}, [override])


def test_numbers_may_be_written_as_people_write_them() -> None:
    for text, value in (("1e-3", 1e-3), ("0.001", 1e-3), ("1", 1.0), ("5.0e-5", 5e-5)):
        read = load_config("lora", {}, [f"training.learning_rate={text}"]).training.learning_rate
        assert (read, type(read)) == (value, float)


def test_a_file_may_extend_one_other(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: clmoe\nlabel: mine\nadapter: {rank: 3}\nlocator: {feature: pooled}\noptions: {beta: 1}\n")
    mine, plain = load_config(str(path), {}, []), load_config("clmoe", {}, [])
    assert mine == dataclasses.replace(
        plain,
        label="mine",
        adapter=dataclasses.replace(plain.adapter, rank=3),
        locator=LocatorConfig("prototype", "pooled"),
        options={**plain.options, "beta": 1},
    )
    assert load_config(str(path), {"adapter": {"rank": 5}}, []).adapter.rank == 5, "the recipe goes over both"
    for wrong, named in (("clmo", "'clmoe'"), ("llava_cmoe_pooled", "extends another file")):
        path.write_text(f"extends: {wrong}\n")
        with pytest.raises(ClmoeError, match=named):
            load_config(str(path), {}, [])


def test_precedence_of_method_recipe_model_and_overrides(tmp_path: Path) -> None:
    method, model = tmp_path / "mine.yaml", tmp_path / "model.yaml"
    method.write_text("method: lora\nadapter: {rank: 3, alpha: 7}\ntraining: {steps: 1, batch_size: 2, workers: 3}\n")
    model.write_text("path: there\ndtype: bfloat16\n")
    own = {"lora": {"training": {"workers": 5}}, "clmoe": {"training": {"workers": 6}}}
    recipe = {
        "training": {"steps": 10, "learning_rate": 0.5, "workers": 4},
        "model": {"path": "recipe"},
        "methods": own,
    }
    config = load_config(str(method), recipe, ["training.steps=20", "model.dtype=float32"], str(model))
    assert config.adapter == AdapterConfig(rank=3, alpha=7.0)
    assert config.training == TrainingConfig(steps=20, batch_size=2, learning_rate=0.5, workers=5)
    assert (config.model.path, config.model.dtype) == ("there", "float32")


def test_another_locator_drops_the_options_of_the_one_below(tmp_path: Path) -> None:
    """A recipe's settings of a method's locator hold only while the method has that locator."""
    recipe = {"methods": {"llava_cmoe": {"locator": {"name": "vae", "options": {"steps": 7}}}}}
    assert load_config("llava_cmoe", recipe, []).locator == LocatorConfig("vae", options={"steps": 7})
    kept = load_config("llava_cmoe", recipe, ["locator.options.draws=2"]).locator
    assert kept == LocatorConfig("vae", options={"steps": 7, "draws": 2})
    changed = load_config("llava_cmoe", recipe, ["locator=nearest_mean", "locator.feature=pooled"]).locator
    assert changed == LocatorConfig("nearest_mean", "pooled")
    path = tmp_path / "mine.yaml"
    path.write_text("extends: llava_cmoe\nlocator: nearest_mean\n")
    assert load_config(str(path), recipe, []).locator == LocatorConfig("nearest_mean")


def test_overrides() -> None:
    pairs = ["training.steps=20", "training.batch_size=4", "label=a=b", "adapter.targets=[up_proj]"]
    training = {"steps": 20, "batch_size": 4}
    assert parse_overrides(pairs) == {"training": training, "label": "a=b", "adapter": {"targets": ["up_proj"]}}
    assert load_config("lora", {"training": training}, ["training.steps=null"]).training.steps is None
    for wrong in ("training.steps", "=3", "", "training.trackers=[wandb"):
        with pytest.raises(ClmoeError, match=f"override {re.escape(repr(wrong))}"):
            parse_overrides([wrong])


def test_a_frozen_config_is_read_back_and_has_stable_bytes(tmp_path: Path) -> None:
    config = load_config("llava_cmoe_pooled", {}, ["training.steps=3", "adapter.scale=1.5", "locator.options.steps=9"])
    (path := tmp_path / "config.yaml").write_text(dump_config(config))
    assert reload_config(path, []) == config
    assert dump_config(reload_config(path, [])) == path.read_text()
    assert reload_config(path, ["evaluation.limit=7"]).evaluation.limit == 7
    path.write_text(dump_config(load_config("clmoe_released", {}, [])))
    assert reload_config(path, []).adapter.as_released and "as_released" not in dump_config(config)


def test_a_broken_or_missing_file_name_or_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    for text in ("method: [", "- lora\n", "just text\n", "\x00"):
        path.write_text(text)
        with pytest.raises(ClmoeError, match=r"broken\.yaml"):
            load_config(str(path), {}, [])
    for source, named in (("nowhere.yaml", r"nowhere\.yaml"), ("clmo", "'clmoe'")):
        with pytest.raises(ClmoeError, match=named):
            load_config(source, {}, [])
    with pytest.raises(ClmoeError, match=r"here.*method"):
        build(Config, {}, "here")


@pytest.mark.parametrize("model", ["Playground", str(find_config("models", "playground")), "playground/base"])
def test_a_model_is_a_name_a_file_or_a_folder(model: str) -> None:
    assert model_values(model)["path"] == "playground/base"


@pytest.mark.parametrize("benchmark", known_configs("benchmarks"))
def test_every_method_fits_every_benchmark(benchmark: str) -> None:
    """Each shipped configuration has only known keys, and a locator if and only if the method keeps parts."""
    recipe = load_benchmark(benchmark, check_files=False).recipe
    for name in known_configs("methods"):
        config = load_config(name, recipe, [])
        method = method_class(config.method)(config)
        assert method.keeps_parts == bool(config.locator.name), name
        if method.keeps_parts:
            make_locator(config.locator, config.seed)
        if config.adapter.scale is not None and method.effective_scale() is not None:
            assert method.effective_scale() == pytest.approx(config.adapter.scale), name
