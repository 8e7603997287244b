"""Configuration: types are checked, errors on unknown keys name the nearest one, and every shipped YAML loads."""

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from clmoe.benchmarks.base import Benchmark, load_benchmark
from clmoe.config import (
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
from clmoe.locators import LOCATORS, make_locator
from clmoe.methods import method_class, methods
from clmoe.plan import make_plan
from clmoe.train.checkpoint import checked_method
from clmoe.utils.paths import find_config, known_configs
from clmoe.utils.schema import HOMES, RENAMED, words
from tests.support import TASKS, write_benchmark


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
        ("training.learning_rate=-0.001", "training.learning_rate", "-0.001"),
        ("training.learning_rate=.nan", "training.learning_rate", "nan"),
        ("training.steps=0", "training.steps", "0"),
        ("training.max_length=-1", "training.max_length", "-1"),
        ("training.micro_batch_size=-1", "training.micro_batch_size", "-1"),
        ("training.epochs=inf", "training.epochs", "inf"),
        ("evaluation.limit=0", "evaluation.limit", "0"),
        ("seed=-1", "seed", "-1"),
        ("adapter={router_scope: per_block, targets: [q_proj]}", "adapter.targets", "q_proj.*per_block"),
    ],
)
def test_a_wrong_value_names_the_field(override: str, field: str, found: str) -> None:
    with pytest.raises(ClmoeError, match=f"{field}.*{found}"):
        load_config("lora", {}, [override])


@pytest.mark.parametrize(
    ("method", "override", "named"),
    [
        ("clmoe", "adapter.router_top_k=9", ("adapter.router_top_k 9", "8 experts")),
        ("clmoe", "options.top_k=9", ("options.top_k 9", "adapter.experts 8")),
        ("moelora", "adapter.rank=12", ("adapter.rank 12", "adapter.experts 8")),
    ],
)
def test_numbers_that_do_not_fit_each_other(method: str, override: str, named: tuple[str, ...]) -> None:
    with pytest.raises(ClmoeError) as refused:
        load_config(method, {}, [override], None, checked_method)
    assert all(part in str(refused.value) for part in named)
    llava = ["adapter.experts=2", "adapter.router_top_k=3", "options.probe_experts=2"]
    load_config("llava_cmoe", {}, llava, None, checked_method)  # its blocks grow


def test_an_error_names_what_set_the_value(tmp_path: Path) -> None:
    """Errors, also on options, start with the source: key=value, recipe, recipe.methods, base or method file."""
    method, model = tmp_path / "mine.yaml", tmp_path / "model.yaml"
    method.write_text("extends: clmoe\nadapter: {rank: 7}\n")
    model.write_text("path: there\ndtype: fp8\n")
    bad = {"training": {"steps": 0}}
    own = {"methods": {"clmoe": {"options": {"gamma": 2}}}}
    for recipe, overrides, base, source, key in (
        ({}, ["training.steps=0"], None, "key=value", "training.steps"),
        ({}, ["options.gama=0"], None, "key=value", "options.gama"),
        ({"adapter": {"rank": 8}}, ["training.lr=1"], None, "key=value", "training.lr"),
        ({"adapter": {"rank": 8}} | bad, ["seed=1"], None, "b.yaml: recipe", "training.steps"),
        ({"adapter": {"rank": 8}} | own, ["options.beta=1"], None, "b.yaml: recipe.methods", "options.gamma"),
        ({"adapter": {"rank": 8}}, [], str(model), f"--base {model}", "model.dtype"),
        ({}, [], None, str(method), "adapter.rank 7"),
    ):
        with pytest.raises(ClmoeError) as refused:
            load_config(str(method), recipe, overrides, base, checked_method, "b.yaml")
        assert str(refused.value).startswith(f"{source}: {key}"), refused.value


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ({"training": {"lr": 1}}, "recipe.training.lr"),
        ({"training": {"steps": -1}}, "recipe.training.steps"),
        ({"methods": {"clmoe": {"adapter": {"rank": "x"}}}}, "recipe.methods.clmoe.adapter.rank"),
        ({"methods": 5}, "recipe.methods"),
        ({"training": 5}, "recipe.training"),
    ],
)
def test_a_bad_recipe_is_found_with_the_benchmark(recipe: dict[str, Any], key: str, tmp_path: Path) -> None:
    path = write_benchmark(tmp_path)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"recipe": recipe}))
    with pytest.raises(ClmoeError, match=rf"{path}.*{re.escape(key)}"):
        load_benchmark(str(path))


@pytest.mark.parametrize(
    ("method", "written", "key"),
    [
        ("lwf", "options.tau", "options.temperature"),
        ("clmoe", "options.momentum", "options.gamma"),
        ("clmoe", "gamma", "options.gamma"),
        ("clmoe", "options.experts", "adapter.experts"),
        ("clmoe", "num_experts", "adapter.experts"),
        ("lora", "options.lora_alpha", "adapter.alpha"),
        ("lora", "training.lr", "training.learning_rate"),
        ("lora", "steps", "training.steps"),
        ("llava_cmoe", "options.N_p", "options.probe_experts"),
        ("llava_cmoe", "locator.draws", "locator.options.draws"),
    ],
)
def test_a_papers_word_leads_to_the_key(method: str, written: str, key: str) -> None:
    with pytest.raises(ClmoeError, match=rf"{re.escape(written)}: .*Write .*{re.escape(key)}"):
        load_config(method, {}, [f"{written}=1"], None, checked_method)


def test_every_word_leads_to_a_key_that_exists() -> None:
    options = {f"options.{field}" for kind in methods().values() for field in typing.get_type_hints(kind.Options)}
    options |= {
        f"locator.options.{field}" for kind in LOCATORS.values() for field in typing.get_type_hints(kind.Options)
    }
    known = options | {place for places in HOMES.values() for place in places}
    for word, text in words().items():
        keys = re.findall(r"\b(?:options|locator|adapter|training|model|evaluation)\.[\w.]*\w", text)
        assert set(keys) <= known and (keys or "max_new_tokens" in text), word


def test_of_epochs_and_steps_the_stronger_source_decides_or_both_are_refused(tmp_path: Path) -> None:
    assert load_config("lora", {"training": {"epochs": 2}}, ["training.steps=3"]).training.steps == 3
    chosen = ["training.epochs=2", "training.steps=null"]
    assert load_config("lora", {"training": {"steps": 3}}, chosen).training.epochs == 2
    (tmp_path / "config.yaml").write_text(dump_config(load_config("lora", {}, ["training.steps=3"])))
    assert load_config(str(tmp_path / "config.yaml"), {}, []).training.steps == 3
    for recipe, overrides, source in (
        ({"training": {"steps": 3}}, ["training.epochs=2"], "b: recipe"),
        ({}, ["training.epochs=2", "training.steps=3"], "key=value"),
    ):
        with pytest.raises(ClmoeError, match=rf"training\.epochs.*training\.steps.*{source}"):
            load_config("lora", recipe, overrides, benchmark="b")


@pytest.mark.parametrize("method", methods())
def test_a_key_has_one_default(method: str) -> None:
    """The options in a method's YAML must equal the defaults in its code, which docs/api.md shows."""
    given, default = load_config(method, {}, []).options, methods()[method].Options()
    assert given == {name: getattr(default, name) for name in given}


FUZZ = ("-1", "0", ".nan", ".inf", "1.0e+30", "1" + 400 * "0", "9" * 5000, "abc", "null", "true", "2024-13-45", "[]")


def numbers(kind: type, prefix: str = "") -> Iterator[str]:
    """The keys of a dataclass that hold numbers."""
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from numbers(hint, f"{prefix}{name}.")
        elif {int, float} & {hint, *typing.get_args(hint)}:
            yield prefix + name


@pytest.mark.slow
@pytest.mark.parametrize("method", methods())
def test_no_number_ends_in_a_traceback(method: str, mini: Benchmark, tiny_folder: Path) -> None:
    """Before any training, every extreme number is either refused with an error that names its key, or planned."""
    recipe = {"training": {"batch_size": 8}, "adapter": {"rank": 8, "experts": 4, "train_projector": False}}
    plain = load_config(method, recipe, [], str(tiny_folder))
    kinds = {"": Config, "options.": method_class(method).Options}
    kinds |= {"locator.options.": LOCATORS[plain.locator.name].Options} if plain.locator.name else {}
    keys = [key for prefix, kind in kinds.items() for key in numbers(kind, prefix)]
    assert len(keys) >= 22
    refused = 0
    for key in keys:
        for value in FUZZ:
            try:
                config = load_config(method, recipe, [f"{key}={value}"], str(tiny_folder), checked_method)
                make_plan(checked_method(config), mini, list(TASKS))
            except ClmoeError as error:
                refused += 1
                assert key.rpartition(".")[2] in str(error), error
    assert refused > len(FUZZ) * len(keys) / 2


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
    """A recipe's settings for a method's locator apply only while the method has that locator."""
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


def test_methods_are_comparable_on_a_benchmark_of_the_users_and_the_papers_on_a_published_one(tmp_path: Path) -> None:
    """On a user's benchmark, methods share rank, effective scale and projector; on CoIN they have the papers' values.

    A published scale is alpha / rank, times the mean gate if there are experts.
    """
    mine = write_benchmark(tmp_path)
    mine.write_text(yaml.safe_dump(yaml.safe_load(mine.read_text()) | {"recipe": {"training": {"steps": 3}}}))
    found: dict[str, set[Any]] = {}
    for benchmark in (str(mine), "coin", "playground-coin"):
        for name in ("lora", "moelora", "clmoe", "llava_cmoe", "olora"):
            recipe = load_benchmark(benchmark, check_files=False).recipe
            config = load_config(name, recipe, [])
            scale = method_class(name)(config).effective_scale()
            found.setdefault(benchmark, set()).add((config.adapter.rank, scale, config.adapter.train_projector))
    assert found[str(mine)] == {(64, 2.0, False)} and found["playground-coin"] == {(16, 2.0, False)}
    published = {(64, 2.0, True), (128, 0.25, True), (64, 0.25, True), (64, 1.0, False)}
    assert found["coin"] == published

    recipe = load_benchmark(str(mine), check_files=False).recipe
    assert load_config("clmoe", recipe | {"adapter": {"scale": 0.5, "rank": 8}}, []).adapter.scale == 0.5
    assert load_config("clmoe", recipe, ["adapter.alpha=16"]).adapter.scale is None
    own = tmp_path / "own.yaml"
    for text, expected in (("{alpha: 8}", (64, None)), ("{rank: 4}", (4, 2.0)), ("{scale: 1, alpha: 3}", (64, 1.0))):
        own.write_text(f"extends: clmoe\nadapter: {text}\n")
        adapter = load_config(str(own), recipe, []).adapter
        assert (adapter.rank, adapter.scale, adapter.train_projector) == (*expected, False)
