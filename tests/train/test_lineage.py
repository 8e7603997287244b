"""What may follow what: lineage, successors, and the same command twice."""

import dataclasses
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clmoe.config import Config, EvaluationConfig, build, dump_config, load_config
from clmoe.errors import ClmoeError
from clmoe.methods import method_class, methods
from clmoe.train.checkpoint import (
    Finished,
    Lineage,
    check_same,
    check_successor,
    identity,
    read_checkpoint,
    seal,
)


def config(*overrides: str, method: str = "clmoe") -> Config:
    return load_config(method, {}, list(overrides))


def write(folder: Path, settings: Config, tasks: list[str], parent: str | None = None) -> Finished:
    """A finished checkpoint without weights."""
    folder.mkdir(parents=True)
    lineage = Lineage(settings.method, "mini", tasks, 0, parent, "base", 4, 1, 1, 2.0)
    (folder / "continual.json").write_text(json.dumps(dataclasses.asdict(lineage)))
    (folder / "config.yaml").write_text(dump_config(settings))
    seal(folder)
    return read_checkpoint(folder)


def test_a_checkpoint_is_read_back(tmp_path: Path) -> None:
    settings = config("options.beta=0.25")
    done = write(tmp_path / "a", settings, ["colour"])
    assert done.config == settings
    assert done.lineage.tasks == ["colour"]
    assert done.lineage.versions.keys() >= {"torch", "transformers", "peft"}
    assert len(done.identity) == 64
    assert read_checkpoint(done.folder, ["evaluation.limit=3"]).config.evaluation.limit == 3


def test_lineages_of_0_2_0_are_read_and_foreign_ones_named(tmp_path: Path) -> None:
    done = write(tmp_path / "a", config(), ["colour"])
    path, lineage = done.folder / "continual.json", dataclasses.asdict(done.lineage)
    path.write_text(json.dumps(lineage | {"config_sha256": "0" * 64}))
    seal(done.folder)
    assert read_checkpoint(done.folder).lineage == done.lineage
    for foreign in ({"tasks": ["colour"]}, lineage | {"more": 1}, [], "text"):
        path.write_text(json.dumps(foreign))
        seal(done.folder)
        with pytest.raises(ClmoeError, match=r"continual\.json"):
            read_checkpoint(done.folder)


def test_what_may_follow_a_checkpoint(tmp_path: Path) -> None:
    parent = write(tmp_path / "a", config(), TASKS)
    check_successor(parent, config("evaluation.limit=2"), "mini", "side")
    for settings, benchmark, task, message in (
        (config(method="moelora"), "mini", "side", "method clmoe there, moelora here"),
        (config("adapter.rank=32"), "mini", "side", r"adapter\.rank 64 there, 32 here"),
        (config("model.path=elsewhere"), "mini", "side", r"model\.path .* there, elsewhere here"),
        (config(), "other", "side", "benchmark mini there, other here"),
        (config(), "mini", "count", "has learned 'count' already"),
    ):
        with pytest.raises(ClmoeError, match=message):
            check_successor(parent, settings, benchmark, task)


TASKS = ["colour", "count"]
# How batches are computed, saved and logged may change while a task is trained, and evaluation at any time.
FREE = {
    "training.micro_batch_size", "training.gradient_checkpointing", "training.workers", "training.save_steps",
    "training.keep_states", "training.logging_steps", "training.trackers",
    *(f"evaluation.{field.name}" for field in dataclasses.fields(EvaluationConfig)),
    "model.architecture", "label",
}  # fmt: skip


def another(value: Any, annotation: Any) -> Any:
    """A value that the field may have, and that differs."""
    choices = typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()
    if choices:
        return next(choice for choice in choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        return {"x": 1}
    if isinstance(value, list):
        return value[:-1] or ["tensorboard"]
    if isinstance(value, str):
        return f"{value}x"
    return 3 if value is None else value / 2 + 7


def identity_of(settings: Config) -> str:
    return json.dumps(identity(settings, "mini", None, TASKS), sort_keys=True)


def identities(settings: Config) -> dict[str, str]:
    """The identity after each field of the configuration was changed alone, by the field's name."""
    found = {"label": identity_of(dataclasses.replace(settings, label="x"))}
    found["seed"] = identity_of(dataclasses.replace(settings, seed=1))
    for section in ("model", "adapter", "locator", "training", "evaluation"):
        old = getattr(settings, section)
        for name, annotation in typing.get_type_hints(type(old)).items():
            value = 0.1 if name == "dropout" else another(getattr(old, name), annotation)
            new = dataclasses.replace(old, **{name: value})
            found[f"{section}.{name}"] = identity_of(dataclasses.replace(settings, **{section: new}))
    for name, options in one_changed(settings.options):
        found[f"options.{name}"] = identity_of(dataclasses.replace(settings, options=options))
    return found


def one_changed(options: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The options with each of them changed alone, and its name."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", options | {name: new}) for inner, new in one_changed(value))
        else:
            yield name, options | {name: another(value, type(value))}


@pytest.mark.parametrize("method", methods())
def test_all_that_can_change_a_training_is_part_of_its_identity(method: str) -> None:
    own_needs = ["options.initial_experts_from=first_task"] if method == "llava_cmoe" else []
    settings = config(*own_needs, method=method)
    options = build(method_class(method).Options, settings.options, "options")
    settings = dataclasses.replace(settings, options=dataclasses.asdict(options))
    found, own = identities(settings), identity_of(settings)
    assert {name for name, other in found.items() if other == own} == FREE
    assert len(set(found.values())) == len(found) - len(FREE) + 1, "each of the others is an identity of its own"


def test_the_same_run_is_recognised_and_any_other_refused(tmp_path: Path) -> None:
    parent = write(tmp_path / "a", config(), ["colour"])
    done = write(tmp_path / "b", config(), TASKS, parent.identity)
    free = config("label=other name", "evaluation.limit=5", "training.logging_steps=3")
    check_same(done, identity(free, "mini", parent.identity, TASKS))
    for wanted, named in (
        ((config("options.gamma=0.5"), "mini", parent.identity, TASKS), r"options\.gamma 0\.7 there, 0\.5 here"),
        ((config(), "twin", parent.identity, TASKS), "benchmark mini there, twin here"),
        ((config(), "mini", None, TASKS), "parent"),
        ((config(), "mini", "0" * 64, TASKS), "parent"),
        ((config(), "mini", parent.identity, ["colour", "side"]), "tasks"),
    ):
        with pytest.raises(ClmoeError, match=named):
            check_same(done, identity(*wanted))
