"""What may follow what: lineage, successors, and the same command twice."""

import dataclasses
import json
from pathlib import Path

import pytest

from clmoe.config import Config, dump_config, load_config
from clmoe.errors import ClmoeError
from clmoe.train.checkpoint import seal
from clmoe.train.lineage import (
    Finished,
    Lineage,
    check_same_run,
    check_successor,
    read_checkpoint,
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
    (folder / "continual.json").write_text(json.dumps(lineage.as_json()))
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
        ((), "moelora", "another method"),
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
    with pytest.raises(ClmoeError, match="trained on benchmark mini, not other"):
        check_successor(parent, config(), "other", "count")


def test_a_learned_task_is_refused(tmp_path: Path) -> None:
    parent = write(tmp_path / "a", config(), ["colour", "count"])
    with pytest.raises(ClmoeError, match="has learned 'count' already"):
        check_successor(parent, config(), "mini", "count")
    check_successor(parent, config("evaluation.limit=2"), "mini", "side")


TASKS = ["colour", "count"]


def test_the_same_run_is_recognised(tmp_path: Path) -> None:
    parent = write(tmp_path / "a", config(), ["colour"])
    done = write(tmp_path / "b", config(), ["colour", "count"], parent.identity)
    check_same_run(
        done, config("label=other name", "evaluation.limit=5", "training.logging_steps=3"), "mini", parent, TASKS
    )


def test_other_settings_or_another_parent_are_refused(tmp_path: Path) -> None:
    parent = write(tmp_path / "a", config(), ["colour"])
    done = write(tmp_path / "b", config(), ["colour", "count"], parent.identity)
    with pytest.raises(ClmoeError, match=r"options\.gamma 0\.7 there, 0\.5 here"):
        check_same_run(done, config("options.gamma=0.5"), "mini", parent, TASKS)
    with pytest.raises(ClmoeError, match="was trained on benchmark mini, not twin"):
        check_same_run(done, config(), "twin", parent, TASKS)
    with pytest.raises(ClmoeError, match="continues another checkpoint"):
        check_same_run(done, config(), "mini", None, TASKS)
    with pytest.raises(ClmoeError, match="has learned colour, count, not colour, side"):
        check_same_run(done, config(), "mini", parent, ["colour", "side"])
    with pytest.raises(ClmoeError, match="continues another checkpoint"):
        check_same_run(done, config(), "mini", dataclasses.replace(parent, identity="0" * 64), TASKS)
