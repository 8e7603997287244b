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
    training_identity,
    versions,
)


def config(*overrides: str, method: str = "clmoe") -> Config:
    return load_config(method, {}, list(overrides))


def write(folder: Path, settings: Config, tasks: list[str], parent: str | None = None) -> Finished:
    """A finished checkpoint without weights."""
    folder.mkdir(parents=True)
    lineage = Lineage(
        method=settings.method, benchmark="mini", tasks=tasks, seed=0, parent=parent, base="base",
        config_sha256=training_identity(settings), steps=4, trainable_parameters=1, adapter_parameters=1,
        effective_scale=2.0, versions=versions(),
    )  # fmt: skip
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


def test_evaluation_overrides_change_the_config_that_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a", config(), ["colour"])
    assert read_checkpoint(tmp_path / "a", ["evaluation.limit=3"]).config.evaluation.limit == 3


def test_a_foreign_lineage_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a", config(), ["colour"])
    (tmp_path / "a" / "continual.json").write_text('{"tasks": ["colour"]}')
    (tmp_path / "a" / "manifest.json").unlink()
    seal(tmp_path / "a")
    with pytest.raises(ClmoeError, match=r"continual\.json"):
        read_checkpoint(tmp_path / "a")


def test_identity_covers_what_decides_a_training() -> None:
    same = training_identity(config())
    assert training_identity(config("evaluation.limit=3", "evaluation.exact=false", "label=x")) == same
    for free in ("micro_batch_size=2", "gradient_checkpointing=true", "workers=2", "save_steps=7", "keep_states=1"):
        assert training_identity(config(f"training.{free}")) == same, free
    changes = [
        "seed=1",
        "training.steps=3",
        "training.batch_size=2",
        "adapter.rank=8",
        "options.gamma=0.5",
        "model.path=x",
    ]
    assert len({same, *(training_identity(config(change)) for change in changes)}) == len(changes) + 1


@pytest.mark.parametrize(
    ("overrides", "method", "message"),
    [
        ((), "moelora", "method clmoe there, moelora here"),
        (("adapter.rank=32",), "clmoe", r"adapter\.rank 64 there, 32 here"),
        (("model.path=elsewhere",), "clmoe", r"model\.path .* there, elsewhere here"),
    ],
)
def test_a_parent_of_another_kind_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], method: str, message: str
) -> None:
    parent = write(tmp_path / "a", config(), ["colour"])
    with pytest.raises(ClmoeError, match=message):
        check_successor(parent, config(*overrides, method=method), "mini", "count")


def test_a_parent_from_another_benchmark_is_refused(tmp_path: Path) -> None:
    parent = write(tmp_path / "a", config(), ["colour"])
    with pytest.raises(ClmoeError, match="benchmark mini there, other here"):
        check_successor(parent, config(), "other", "count")


def test_a_learned_task_is_refused(tmp_path: Path) -> None:
    parent = write(tmp_path / "a", config(), ["colour", "count"])
    with pytest.raises(ClmoeError, match="has learned 'count' already"):
        check_successor(parent, config(), "mini", "count")
    check_successor(parent, config("evaluation.limit=2"), "mini", "side")


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


def identities(settings: Config) -> dict[str, str]:
    """The identity after each field of the configuration was changed alone, by the field's name."""
    found = {"label": training_identity(dataclasses.replace(settings, label="x"))}
    found["seed"] = training_identity(dataclasses.replace(settings, seed=1))
    for section in ("model", "adapter", "locator", "training", "evaluation"):
        old = getattr(settings, section)
        for name, annotation in typing.get_type_hints(type(old)).items():
            value = 0.1 if name == "dropout" else another(getattr(old, name), annotation)
            new = dataclasses.replace(old, **{name: value})
            found[f"{section}.{name}"] = training_identity(dataclasses.replace(settings, **{section: new}))
    for name, options in one_changed(settings.options):
        found[f"options.{name}"] = training_identity(dataclasses.replace(settings, options=options))
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
    found, own = identities(settings), training_identity(settings)
    assert {name for name, identity in found.items() if identity == own} == FREE
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
