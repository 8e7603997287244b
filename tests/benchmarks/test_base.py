"""Benchmark files: where data is looked for, task orders, errors that name the nearest valid choice, and limits."""

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from PIL import Image

from clmoe.benchmarks import base
from clmoe.benchmarks.base import COMPARABLE, Task, load_benchmark, sampled
from clmoe.benchmarks.check import check_benchmark
from clmoe.benchmarks.prepare import open_benchmark
from clmoe.config import load_config
from clmoe.data.records import Question
from clmoe.embedded import build
from clmoe.errors import ClmoeError
from clmoe.evaluate.run import check_questions
from clmoe.evaluate.scoring import check_scorer, gold_problem, score_answers
from clmoe.utils import paths

DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"


def task(name: str, **changes: Any) -> dict[str, Any]:
    files = {"train": f"{name}/train.json", "test": f"{name}/test.json", "images": "images"}
    entry = {"name": name, **files, "scorer": "exact", "max_new_tokens": 16, **changes}
    return {key: value for key, value in entry.items() if value is not ...}


def benchmark(**changes: Any) -> dict[str, Any]:
    tasks = [task("one"), task("two"), task("three")]
    data = {"name": "mine", "root": "data", "recipe": {"training": {"epochs": 1}}, "tasks": tasks, **changes}
    return {key: value for key, value in data.items() if value is not ...}


def write(path: Path, data: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return str(path)


def fill(root: Path, *names: str) -> None:
    for name in names or ("one", "two", "three"):
        for part in ("train", "test"):
            write(root / name / f"{part}.json", "[]")


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the built-in benchmarks 'mine' and 'other'; the current folder is another one, 'elsewhere'."""
    folder = tmp_path / "checkout" / "configs" / "benchmarks"
    # The process reads the words once, for later tests too.
    write(folder.parent / "words.yaml", (paths.shipped_root() / "configs" / "words.yaml").read_text(encoding="utf-8"))
    write(folder / "mine.yaml", benchmark())
    write(folder / "other.yaml", benchmark(name="other", root="more", prepare="playground"))
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "checkout" / "clmoe" / "utils" / "paths.py"))
    monkeypatch.delenv(base.ROOT_VARIABLE, raising=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


@pytest.fixture
def data(shipped: Path) -> Path:
    """The data folder of 'mine', which does not exist yet."""
    return Path.cwd() / "data"


def test_a_built_in_benchmark_counts_from_the_current_folder(shipped: Path, data: Path) -> None:
    fill(data)
    loaded = load_benchmark("mine")
    recipe = {"training": {"epochs": 1}, "comparable": COMPARABLE}
    assert (loaded.name, loaded.root, loaded.recipe, loaded.prepare) == ("mine", data, recipe, None)
    assert [task.name for task in loaded.tasks] == ["one", "two", "three"]
    two = data / "two"
    assert loaded.task("two") == Task("two", two / "train.json", two / "test.json", data / "images", "exact", 16)
    assert load_benchmark(str(shipped / "mine.yaml")) == loaded


def test_a_users_own_file_counts_from_its_own_folder(shipped: Path, tmp_path: Path) -> None:
    data = tmp_path / "project" / "data"
    fill(data)
    write(tmp_path / "project" / "any-name.yaml", benchmark())
    absolute = write(tmp_path / "far" / "b.yml", benchmark(root=str(data)))
    assert load_benchmark("../project/any-name.yaml").root == load_benchmark(absolute).root == data
    with pytest.raises(ClmoeError, match=r"none\.yaml: no such file"):
        load_benchmark("none.yaml")


def test_argument_and_environment_override_the_root(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "by-variable")
    fill(tmp_path / "elsewhere" / "by-argument")
    own = write(tmp_path / "project" / "any-name.yaml", benchmark())
    monkeypatch.setenv(base.ROOT_VARIABLE, str(tmp_path / "by-variable"))
    for name in ("mine", own):
        assert load_benchmark(name).root == tmp_path / "by-variable"
        given = load_benchmark(name, Path("by-argument"))
        assert given.root == tmp_path / "elsewhere" / "by-argument"
        assert given.task("one").image_root == given.root / "images"
    monkeypatch.setenv(base.ROOT_VARIABLE, "")
    assert load_benchmark("mine", check_files=False).root == data


def test_missing_files_name_task_field_and_path(data: Path) -> None:
    with pytest.raises(ClmoeError, match=rf"mine.* 'one'.* 'train'.*{data}/one/train\.json.*\(5 "):
        load_benchmark("mine")
    fill(data)
    (data / "two" / "test.json").unlink()
    assert open_benchmark("mine", tasks=["three", "one"]) == load_benchmark("mine", check_files=False)
    for tasks in (None, ["one", "two"]):
        with pytest.raises(ClmoeError, match=rf"mine.* 'two'.* 'test'.*{data}/two/test\.json"):
            open_benchmark("mine", tasks=tasks)


def test_opening_draws_the_embedded_benchmark_into_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ROWS", {"train": 4, "test": 4})
    monkeypatch.chdir(tmp_path)
    opened = open_benchmark("playground-coin")
    assert opened.root == tmp_path / "playground" / "data" / "playground-coin"
    assert opened == load_benchmark("playground-coin")
    assert [path.name for path in tmp_path.iterdir()] == ["playground"]
    (opened.root / build.MARKER).write_text("{}")  # as if drawn by another version, with other files
    (opened.root / "sqa" / "train.json").unlink()
    assert open_benchmark("playground-coin").missing_files() == []


def test_orders(shipped: Path) -> None:
    loaded = load_benchmark("mine", check_files=False)
    assert loaded.order("norm", 0) == ["one", "two", "three"]
    assert loaded.order("rev", 0) == ["three", "two", "one"]
    assert loaded.order("three, one", 0) == ["three", "one"]
    # An order must not change with the version of Python or clmoe: names sorted by `printf "SEED:NAME" | sha256sum`.
    expected = [["two", "three", "one"], ["three", "one", "two"], ["three", "one", "two"]]
    assert [loaded.order("rand", seed) for seed in range(3)] == expected
    drawn = {tuple(loaded.order("rand", seed)) for seed in range(100)}
    assert drawn == set(permutations(["one", "two", "three"]))


@pytest.mark.parametrize(("spec", "named"), [("one,thre", "'thre'.*'three'"), ("one,two,one", "'one'"), ("", "''")])
def test_bad_orders(spec: str, named: str, shipped: Path) -> None:
    with pytest.raises(ClmoeError, match=named):
        load_benchmark("mine", check_files=False).order(spec, 0)


TWO_FILES = {"reader": "scienceqa", "files": ["x"]}
BAD = {  # what the message must name besides the file
    "key": (benchmark(tasks=[task("one", image="x")]), r"tasks\[0\].*'image'.*'images'"),
    "no tasks": (benchmark(tasks=...), r"\.tasks"),
    "no train": (benchmark(tasks=[task("a", train=...)]), r"tasks\[0\]\.train"),
    "same task": (benchmark(tasks=[task("a"), task("a")]), r"tasks\[1\]\.name.*'a'"),
    "reserved": (benchmark(tasks=[task("rand")]), r"tasks\[0\]\.name.*'rand'"),
    "climbing": (benchmark(tasks=[task("../a")]), r"tasks\[0\]\.name.*'\.\./a'"),
    "no limit": (
        benchmark(tasks=[task("a", max_new_tokens=...)]),
        r"tasks\[0\]\.max_new_tokens.*`.*: \d+`",
    ),
    "limit": (benchmark(tasks=[task("a", max_new_tokens=-1)]), r"tasks\[0\]\.max_new_tokens.*-1"),
    "passes": (benchmark(tasks=[task("a", passes=0)]), r"tasks\[0\]\.passes.*0"),
    "no raw file": (benchmark(tasks=[task("a", raw={"train": ["x"]})]), r"tasks\[0\]\.raw\.test.*`test: \["),
    "reader": (benchmark(tasks=[task("a", gold={"reader": "gqaa", "files": ["x"]})]), r"\.gold.*'gqaa'.*'gqa'"),
    "same set": (benchmark(general=[task("two", train=...)]), r"general\[0\]\.name.*'two'"),
    "trained set": (benchmark(general=[task("before")]), r"general\[0\].*'train'"),
    "no test": (benchmark(general=[task("before", train=..., test=...)]), r"general\[0\]\.test"),
    "gold files": (benchmark(tasks=[task("a", gold=TWO_FILES)]), r"\.gold\.files.*'scienceqa'.*pid_splits.*\['x'\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, shipped: Path) -> None:
    content, named = BAD[case]
    path = write(shipped / "mine.yaml", content)
    with pytest.raises(ClmoeError, match=rf"{path}.*{named}"):
        load_benchmark("mine")


def test_a_set_of_general_ability_is_needed_and_asked_where_the_recipe_does_not_turn_it_off(
    shipped: Path, data: Path
) -> None:
    fill(data)
    lora = str(DOCS.parents[1] / "configs" / "methods" / "lora.yaml")
    for number, recipe in enumerate(({}, {"evaluation": {"general": False, "limit": 7}})):
        before = [task("before", train=...)]
        write(shipped / "mine.yaml", benchmark(general=before, recipe={"training": {"epochs": 1}, **recipe}))
        loaded = load_benchmark("mine", check_files=False)
        evaluation = load_config(lora, loaded.recipe, []).evaluation
        assert (evaluation.general, evaluation.limit) == ((True, None), (False, 7))[number]
        assert load_config(lora, loaded.recipe, ["evaluation.general=true"]).evaluation.general
        assert [one.name for one in loaded.tasks] == loaded.order("norm", 0) == ["one", "two", "three"]
        assert [one.name for one in loaded.sets()] == [*loaded.order("norm", 0), *(() if number else ("before",))]
        assert loaded.missing_files(["one"]) == []
        assert "'before', field 'test'" in loaded.missing_files(["one", "before"])[0]
        assert data / "before" / "test.json" in loaded.inputs
        with pytest.raises(ClmoeError, match="'before'"):
            loaded.order("one,before", 0)
    assert open_benchmark("mine").general == loaded.general, "its file is not needed"


POPE = [("a.png", "Is there a dog in the image?", "yes"), ("a.png", "Is there a cat in the image?", "no")]


def test_popes_lines_and_mmes_table_are_read(tmp_path: Path) -> None:
    """The files are as published: POPE has a `label`, and MME has images in its rows and repeats question ids."""
    (tmp_path / "coco").mkdir()
    picture = Image.new("RGB", (4, 4), "red")
    picture.save(tmp_path / "coco" / "a.png")
    encoded = {"bytes": (tmp_path / "coco" / "a.png").read_bytes(), "path": None}
    lines = [{"question_id": n, "image": i, "text": q, "label": a} for n, (i, q, a) in enumerate(POPE, 1)]
    write(tmp_path / "pope.json", "\n".join(map(json.dumps, lines)))
    (tmp_path / "pope.json").rename(tmp_path / "pope.jsonl")
    table = {"question_id": "x.png", "image": encoded, "category": "existence"}
    rows = [table | {"question": q, "answer": a.capitalize()} for _, q, a in POPE]
    Dataset.from_list(rows).to_parquet(tmp_path / "mme.parquet")
    page = (DOCS.parent / "add-your-data.md").read_text()
    sets = yaml.safe_load(page.partition("```yaml\ngeneral:")[2].partition("```")[0].join(["general:", ""]))["general"]
    assert [entry["scorer"] for entry in sets] == ["pope", "mme"]
    places = ({"images": "coco", "test": ["pope.jsonl"]}, {"images": "mme", "test": ["mme.parquet"]})
    for entry, place in zip(sets, places, strict=True):
        entry["images"] = place["images"]
        entry["raw"]["test"] = place["test"]
    path = write(tmp_path / "b.yaml", benchmark(root=str(tmp_path), general=sets))
    fill(tmp_path, "one")
    opened = open_benchmark(path, tasks=["one", "pope", "mme"])
    for entry in opened.general:
        questions = check_questions(opened, [entry.name], images=True)
        assert [question.answer.lower() for question in questions] == ["yes", "no"]
        assert len({question.image for question in questions}) == 1
        assert score_answers(entry.scorer, ["Yes", "No"], questions).score == 1.0
    assert not check_benchmark(opened, gold_problem, ["pope", "mme"]).bad


def test_gold_files_are_required_and_sources_are_found_by_the_longest_folder(shipped: Path, data: Path) -> None:
    gold = {"reader": "gqa", "files": ["more/gold.json"]}
    places = {"more": "https://a", "more/gold.json": "https://b", "one": "https://c"}
    write(shipped / "mine.yaml", benchmark(tasks=[task("one", gold=gold)], sources=places))
    fill(data)
    with pytest.raises(ClmoeError, match=rf"'one'.*'gold'.*{data}/more/gold\.json.*https://b"):
        load_benchmark("mine")
    loaded = load_benchmark("mine", check_files=False)
    found = [loaded.source(data / name) for name in ("more/x", "more/gold.json", "moreover/x", "one")]
    assert found == ["https://a", "https://b", None, "https://c"]
    assert loaded.source(Path("/elsewhere")) is None


def test_the_example_of_the_documentation_loads(tmp_path: Path) -> None:
    example = DOCS.read_text().partition("## The YAML")[2].partition("```yaml\n")[2].partition("```")[0]
    loaded = load_benchmark(write(tmp_path / "my-benchmark.yaml", example), check_files=False)
    assert load_config("lora", loaded.recipe, []).training.epochs == 1
    (colours,) = loaded.tasks
    check_scorer(colours.scorer)
    assert colours.gold is not None and colours.passes == 2 and colours.suffix
    assert loaded.source(colours.train) == "https://example.org/colours.zip"


def test_a_sample_stands_for_a_file_that_is_ordered_by_kind_and_depends_on_its_length_alone() -> None:
    questions = [Question(f"{row:04}", None, "easy" if row < 500 else "hard", "x", {}) for row in range(1000)]
    few, more = sampled(questions, 100), sampled(questions, 200)
    # a frozen model that knows the easy half must not seem to forget it: a half ± 4 standard errors of 5 points
    assert 30 < sum(question.text == "easy" for question in few) < 70
    assert len(few) == 100 and {question.question_id for question in few} < {q.question_id for q in more}
    assert few == sorted(few, key=lambda question: question.question_id)
    others = [Question(f"other {row}", "a.jpg", "text", "y", {}) for row in range(1000)]
    assert sampled(others, 100) == [others[int(question.question_id)] for question in few]
    assert sampled(others, None) == sampled(others, 1000) == sampled(others, 2000) == others
