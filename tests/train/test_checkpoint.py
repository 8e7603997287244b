"""A checkpoint folder is complete or does not exist, damage is named, and what may follow it is checked."""

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
from clmoe.train import checkpoint
from clmoe.train.checkpoint import (
    Finished,
    Lineage,
    build_folder,
    check_same,
    check_successor,
    identity,
    is_complete,
    read_checkpoint,
    seal,
    verify,
    work_folder,
)


def fill(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "continual.json").write_text("{}\n")
    (folder / "state").mkdir()
    (folder / "state" / "deep.bin").write_bytes(b"deep")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "checkpoint"
    build_folder(target, fill)
    return target


def test_a_sealed_folder_is_complete_and_its_identity_follows_its_content(folder: Path, tmp_path: Path) -> None:
    assert is_complete(folder)
    twin = tmp_path / "elsewhere" / "twin"
    build_folder(twin, fill)
    assert verify(twin) == verify(folder), "equal files give the same identity wherever they lie"

    def other(path: Path) -> None:
        fill(path)
        (path / "continual.json").write_text("[]\n")

    build_folder(tmp_path / "other", other)
    assert verify(tmp_path / "other") != verify(folder)


def test_an_altered_and_an_extra_file_of_a_subfolder_are_named(folder: Path) -> None:
    (folder / "state" / "notes.txt").write_text("mine")
    with pytest.raises(ClmoeError, match=r"state/notes\.txt"):
        verify(folder)
    (folder / "state" / "notes.txt").unlink()
    (folder / "state" / "deep.bin").write_bytes(b"Deep")
    with pytest.raises(ClmoeError, match=r"state/deep\.bin is damaged"):
        is_complete(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {}}', '{"format_version": "99", "files": {}}'])
def test_a_broken_manifest_is_named(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ClmoeError, match=r"manifest\.json"):
        verify(folder)


def test_a_folder_without_manifest_does_not_exist_for_readers(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    assert not is_complete(folder)
    with pytest.raises(ClmoeError, match="not a finished checkpoint"):
        verify(folder)
    assert not is_complete(folder / "nowhere")


def test_a_crash_while_filling_leaves_nothing_and_the_rerun_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"

    def crash(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_folder(target, crash)
    assert not target.exists()
    build_folder(target, fill)
    assert is_complete(target)
    assert not (target / "half").exists(), "what the crash left is thrown away"
    assert not work_folder(target).exists()


def test_a_crash_before_the_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "checkpoint"
    for step in ("seal", "flush", "file_sha256"):
        with monkeypatch.context() as patch:

            def stop(path: Path) -> None:
                raise OSError("power is gone")

            patch.setattr(checkpoint, step, stop)
            with pytest.raises(OSError, match="power"):
                build_folder(target, fill)
        assert not target.exists() and not (work_folder(target) / "manifest.json").exists()


# ---- Lineage


def config(*overrides: str, method: str = "clmoe") -> Config:
    return load_config(method, {}, list(overrides))


def write(folder: Path, settings: Config, tasks: list[str], parent: str | None = None) -> Finished:
    """Write a finished checkpoint without weights."""
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
        (config(), "mini", "count", "has already learned 'count'"),
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
    """Another value that the field may have."""
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
    """By field name, the identity after changing that field of the configuration alone."""
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
    """For each option, its name and the options with that one alone changed."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", options | {name: new}) for inner, new in one_changed(value))
        else:
            yield name, options | {name: another(value, type(value))}


@pytest.mark.parametrize("method", methods())
def test_all_that_can_change_a_training_is_part_of_its_identity(method: str) -> None:
    own_needs = ["options.initial_experts_from=first_task"] if method == "llava_cmoe" else []
    own_needs += ["adapter.targets=[gate_proj,up_proj,down_proj]"]  # routers of whole blocks are for the FFN alone
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
