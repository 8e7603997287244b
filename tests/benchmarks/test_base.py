"""Benchmark files: where data is looked for, task orders, and errors that name the nearest valid choice."""

from __future__ import annotations

import textwrap
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml

from clmoe.benchmarks import base
from clmoe.benchmarks.base import Task, load_benchmark
from clmoe.config import load_config
from clmoe.errors import ClmoeError
from clmoe.evaluate.rules.scoring import check_scorer
from clmoe.utils import paths


def task(name: str, **changes: Any) -> dict[str, Any]:
    entry = {
        "name": name,
        "train": f"{name}/train.json",
        "test": f"{name}/test.json",
        "images": "images",
        "scorer": "exact",
        "max_new_tokens": 16,
    }
    return {key: value for key, value in (entry | changes).items() if value is not ...}


def benchmark(**changes: Any) -> dict[str, Any]:
    data = {
        "name": "mine",
        "root": "data",
        "recipe": {"epochs": 1},
        "tasks": [task("one"), task("two"), task("three")],
    }
    return {key: value for key, value in (data | changes).items() if value is not ...}


def write(path: Path, data: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return str(path)


def fill(root: Path) -> None:
    for name in ("one", "two", "three"):
        (root / name).mkdir(parents=True)
        (root / name / "train.json").write_text("[]")
        (root / name / "test.json").write_text("[]")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the built-in benchmarks 'mine' and 'other'; the current folder is another one."""
    root = tmp_path / "checkout"
    write(root / "configs" / "benchmarks" / "mine.yaml", benchmark())
    write(
        root / "configs" / "benchmarks" / "other.yaml",
        benchmark(name="other", root="more", prepare="playground"),
    )
    monkeypatch.setattr(paths, "__file__", str(root / "clmoe" / "system" / "paths.py"))
    monkeypatch.delenv(base.ROOT_VARIABLE, raising=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return root


def test_a_built_in_benchmark(checkout: Path) -> None:
    fill(checkout / "data")
    loaded = load_benchmark("mine")
    assert (loaded.name, loaded.root, loaded.recipe) == ("mine", checkout / "data", {"epochs": 1})
    assert loaded.prepare is None
    assert [task.name for task in loaded.tasks] == ["one", "two", "three"]
    assert loaded.task("two") == Task(
        name="two",
        train=checkout / "data/two/train.json",
        test=checkout / "data/two/test.json",
        image_root=checkout / "data/images",
        scorer="exact",
        max_new_tokens=16,
    )
    assert load_benchmark(str(checkout / "configs" / "benchmarks" / "mine.yaml")) == loaded


def test_known_names_and_the_nearest_one(checkout: Path) -> None:
    with pytest.raises(ClmoeError, match=r"unknown benchmark 'othr'. Did you mean 'other'\? Known: mine, other"):
        load_benchmark("othr")
    with pytest.raises(ClmoeError, match=r"none\.yaml: no such file"):
        load_benchmark("none.yaml")


def test_a_users_own_file_counts_from_its_own_folder(checkout: Path, tmp_path: Path) -> None:
    fill(tmp_path / "project" / "data")
    path = write(tmp_path / "project" / "any-name.yaml", benchmark())
    assert load_benchmark(path).root == tmp_path / "project" / "data"
    assert load_benchmark("../project/any-name.yaml").task("one").train.is_file()
    absolute = write(tmp_path / "far" / "b.yml", benchmark(root=str(tmp_path / "project" / "data")))
    assert load_benchmark(absolute).root == tmp_path / "project" / "data"


def test_argument_and_environment_override_the_root(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "by-variable")
    fill(tmp_path / "elsewhere" / "by-argument")
    monkeypatch.setenv(base.ROOT_VARIABLE, str(tmp_path / "by-variable"))
    assert load_benchmark("mine").root == tmp_path / "by-variable"
    given = load_benchmark("mine", Path("by-argument"))
    assert given.root == tmp_path / "elsewhere" / "by-argument"
    assert given.task("one").image_root == tmp_path / "elsewhere" / "by-argument" / "images"
    monkeypatch.setenv(base.ROOT_VARIABLE, "")
    assert load_benchmark("mine", check_files=False).root == checkout / "data"


def test_without_a_checkout_the_current_folder_counts(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "__file__", "/nowhere/site-packages/clmoe/utils/paths.py")
    with pytest.raises(ClmoeError, match="no folder configs/benchmarks found; run from the clmoe checkout"):
        load_benchmark("mine")
    monkeypatch.chdir(checkout)
    assert paths.repository_root() == checkout


def test_missing_files_name_task_field_and_path(checkout: Path) -> None:
    with pytest.raises(ClmoeError, match=r"task 'one', field 'train': no file .*data/one/train\.json \(5 more"):
        load_benchmark("mine")
    fill(checkout / "data")
    (checkout / "data" / "two" / "test.json").unlink()
    with pytest.raises(ClmoeError, match=r"mine\.yaml: task 'two', field 'test': no file .*two/test\.json; put"):
        load_benchmark("mine")
    unchecked = load_benchmark("mine", check_files=False)
    assert unchecked.missing_files() == [("two", "test", checkout / "data" / "two" / "test.json")]


def test_data_that_a_builder_makes_may_be_absent_but_not_incomplete(checkout: Path) -> None:
    loaded = load_benchmark("other")
    assert loaded.prepare == "playground"
    assert not loaded.root.exists()
    fill(loaded.root)
    (loaded.root / "one" / "train.json").unlink()
    with pytest.raises(ClmoeError, match=r"field 'train': no file .*; run `clmoe data prepare other`"):
        load_benchmark("other")


def test_orders(checkout: Path) -> None:
    loaded = load_benchmark("mine", check_files=False)
    assert loaded.order("norm", 0) == ["one", "two", "three"]
    assert loaded.order("rev", 0) == ["three", "two", "one"]
    assert loaded.order("three, one", 0) == ["three", "one"]
    assert loaded.order("two", 0) == ["two"]
    # The fixed list guards runs already made: an order must not change with a version of Python or clmoe.
    assert [loaded.order("rand", seed) for seed in range(3)] == RANDOM_ORDERS
    drawn = {tuple(loaded.order("rand", seed)) for seed in range(100)}
    assert drawn == set(permutations(["one", "two", "three"]))


# From `printf "SEED:NAME" | sha256sum`, sorted.
RANDOM_ORDERS = [["two", "three", "one"], ["three", "one", "two"], ["three", "one", "two"]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("one,thre", r"benchmark mine: unknown task 'thre'. Did you mean 'three'\? Known: one, three, two"),
        ("reverse", "unknown task 'reverse'"),
        ("one,two,one", "task 'one' is listed more than once"),
        ("one,,two", "unknown task ''"),
        ("", "unknown task ''"),
    ],
)
def test_bad_orders(spec: str, message: str, checkout: Path) -> None:
    with pytest.raises(ClmoeError, match=message):
        load_benchmark("mine", check_files=False).order(spec, 0)


BAD = {
    "broken": ("name: [", r"mine\.yaml: cannot be read as YAML: .*line 1"),
    "list": ("- a", r"mine\.yaml: expected a mapping"),
    "key": (benchmark(taskz=[]), r"unknown key 'taskz'. Did you mean 'tasks'\?"),
    "task key": (
        benchmark(tasks=[task("one", image="x")]),
        r"tasks\[0\]: unknown key 'image'. Did you mean 'images'",
    ),
    "no name": (benchmark(name=...), "field 'name': expected some text, the field is missing"),
    "other name": (
        benchmark(name="yours"),
        "field 'name': expected 'mine', as the file is called, found 'yours'",
    ),
    "root": (benchmark(root=3), "field 'root': expected some text, found 3"),
    "recipe": (benchmark(recipe=[1]), r"field 'recipe': expected a mapping, found \[1\]"),
    "prepare": (benchmark(prepare=None), "field 'prepare': expected some text, found None"),
    "no tasks": (benchmark(tasks=...), "field 'tasks': expected a list of tasks, found None"),
    "empty tasks": (benchmark(tasks=[]), "field 'tasks': expected a list of tasks"),
    "task type": (benchmark(tasks=["one"]), r"tasks\[0\]: expected a mapping"),
    "same task": (benchmark(tasks=[task("a"), task("a")]), r"tasks\[1\]: field 'name': 'a' is used twice"),
    "reserved": (benchmark(tasks=[task("rand")]), "field 'name': 'rand' is reserved"),
    "comma": (benchmark(tasks=[task("a,b")]), "field 'name': 'a,b' is reserved or not made of letters"),
    "climbing": (benchmark(tasks=[task("../a")]), "field 'name': '../a' is reserved or not made of letters"),
    "no train": (benchmark(tasks=[task("a", train=...)]), r"tasks\[0\]: field 'train': expected some text"),
    "limit": (
        benchmark(tasks=[task("a", max_new_tokens=0)]),
        "field 'max_new_tokens': expected a whole number >= 1",
    ),
    "limit type": (
        benchmark(tasks=[task("a", max_new_tokens=True)]),
        "expected a whole number >= 1, found True",
    ),
    "sources": (benchmark(sources={"a": 3}), "field 'sources': expected a mapping from files to text"),
    "passes": (benchmark(tasks=[task("a", passes=0)]), "field 'passes': expected a whole number >= 1, found 0"),
    "suffix": (benchmark(tasks=[task("a", suffix=" ")]), "field 'suffix': expected some text, found ' '"),
    "gold": (benchmark(tasks=[task("a", gold="x")]), "field 'gold': expected a mapping with reader and files"),
    "reader": (
        benchmark(tasks=[task("a", gold={"reader": "gqaa", "files": ["x"]})]),
        r"field 'gold': unknown reader 'gqaa'. Did you mean 'gqa'\?",
    ),
    "gold files": (
        benchmark(tasks=[task("a", gold={"reader": "scienceqa", "files": ["x"]})]),
        r"reader 'scienceqa' takes a list of files \(problems.json, pid_splits.json\), found \['x'\]",
    ),
    "scorer": (
        benchmark(tasks=[task("a", scorer=["x"])]),
        r"field 'scorer': expected some text, found \['x'\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, checkout: Path) -> None:
    data, message = BAD[case]
    write(checkout / "configs" / "benchmarks" / "mine.yaml", data)
    with pytest.raises(ClmoeError, match=message):
        load_benchmark("mine")


def test_a_note_is_kept(checkout: Path) -> None:
    write(
        checkout / "configs" / "benchmarks" / "mine.yaml",
        benchmark(tasks=[task("one", note="no images needed")]),
    )
    assert load_benchmark("mine", check_files=False).task("one").note == "no images needed"


def test_gold_files_are_required_and_sources_are_found_by_the_longest_folder(checkout: Path) -> None:
    gold = {"reader": "gqa", "files": ["more/gold.json"]}
    places = {"more": "https://a", "more/gold.json": "https://b", "one": "https://c"}
    write(checkout / "configs" / "benchmarks" / "mine.yaml", benchmark(tasks=[task("one", gold=gold)], sources=places))
    fill(checkout / "data")
    with pytest.raises(
        ClmoeError, match=r"task 'one', field 'gold': no file .*more/gold\.json; .*It comes from https://b"
    ):
        load_benchmark("mine")
    loaded = load_benchmark("mine", check_files=False)
    assert loaded.missing_files() == [("one", "gold", checkout / "data/more/gold.json")]
    found = [loaded.source(checkout / "data" / name) for name in ("more/x", "more/gold.json", "moreover/x", "one")]
    assert found == ["https://a", "https://b", None, "https://c"]
    assert loaded.source(Path("/elsewhere")) is None


def test_the_example_of_the_docstring_loads(tmp_path: Path) -> None:
    example = str(base.__doc__).partition("::\n")[2].partition("\nThe data folder")[0]
    path = write(tmp_path / "my-benchmark.yaml", textwrap.dedent(example))
    loaded = load_benchmark(path, check_files=False)
    assert load_config("lora", loaded.recipe, []).training.epochs == 1
    (digits,) = loaded.tasks
    check_scorer(digits.scorer)
    assert digits.gold is not None and digits.passes == 3
