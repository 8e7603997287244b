"""`clmoe data check` and what it shares with a run: rows, images, answers and outputs of a user's own benchmark."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from clmoe import cli
from clmoe.benchmarks.base import load_benchmark
from clmoe.errors import ClmoeError
from clmoe.evaluate.run import check_tasks
from clmoe.utils.paths import check_target

Edit = Callable[[Any], Any]


@pytest.fixture
def own(mini_yaml: Path, tmp_path: Path) -> Path:
    """A copy of the miniature benchmark; its task 'colour' has 24 training rows and 12 questions."""
    folder = tmp_path / "own"
    shutil.copytree(mini_yaml.parent, folder)
    edit(folder / "mini.yaml", lambda values: values.update(root="."))
    return folder


def edit(path: Path, change: Edit) -> None:
    """Change a JSON or YAML file."""
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values) if path.suffix == ".yaml" else json.dumps(values))


@pytest.fixture
def check(own: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command and returns what it prints; with ``bad=True``, on stderr and with exit code 2."""

    def run(*options: object, bad: bool = False) -> str:
        arguments = ["data", "check", str(own / "mini.yaml"), "--base", str(tiny_folder), *map(str, options)]
        if not bad:
            cli.main(arguments)
            return capsys.readouterr().out
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
        return capsys.readouterr().err

    return run


def without_image(row: dict[str, Any]) -> None:
    del row["image"]
    row["conversations"][0]["value"] = "What?"


def test_answers_are_counted_and_questions_of_training_found(own: Path, check: Callable[..., str]) -> None:
    train = json.loads((own / "colour/train.json").read_text())
    question = train[5]["conversations"][0]["value"].removeprefix("<image>\n")
    edit(own / "colour/test.json", lambda rows: rows[3].update(image="5.png", text=question, answer="B"))
    out = check("--order", "colour")
    (answers,) = [line for line in out.splitlines() if "test answers" in line]
    counts = [json.loads((own / "colour/test.json").read_text())[n]["answer"] for n in range(12)]
    assert f"'B' {counts.count('B')}" in answers and f"{100 * counts.count('B') / 12:.1f} %" in answers
    (shared,) = [line for line in out.splitlines() if "same image" in line]
    assert "colour: 1 of 12" in shared and "colour-27" in shared
    assert "count: " not in out, "other tasks are not asked for"


def test_part_of_a_benchmark_is_enough(own: Path, check: Callable[..., str]) -> None:
    for name in ("count", "side"):
        shutil.rmtree(own / name)
    assert " 0 bad" in check("--order", "colour")
    assert "task 'count', field 'train'" in check(bad=True)


@pytest.mark.slow
def test_one_task_can_be_run_and_evaluated_where_only_its_files_are(
    own: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("count", "side"):
        shutil.rmtree(own / name)
    edit(own / "colour/train.json", lambda rows: [row.update(source="web") for row in rows[:3]])
    order = ["--order", "colour", "--output", str(tmp_path / "run")]
    cli.main(["run", "lora", str(own / "mini.yaml"), "--base", str(tiny_folder), *order, "training.steps=1"])
    assert "colour: 3 of 24 rows hold the key 'source'" in capsys.readouterr().err
    checkpoint = tmp_path / "run/01_colour"
    cli.main(["eval", "--checkpoint", str(checkpoint), "--benchmark", str(own / "mini.yaml"), *order])
    assert "after colour" in capsys.readouterr().out


def test_odd_rows_are_counted_and_a_mixture_needs_a_word(own: Path, check: Callable[..., str]) -> None:
    edit(own / "colour/train.json", lambda rows: [row.update(source="web") for row in rows[:3]])
    edit(own / "colour/train.json", lambda rows: [without_image(row) for row in rows[6:10]])
    error = check("--order", "colour", bad=True)
    assert "train.json: 3 of 24 rows hold the key 'source'" in error
    assert "train.json: 4 of 24 rows (6-9), field 'image'" in error and "text_rows" in error
    edit(own / "mini.yaml", lambda values: values["tasks"][0].update(text_rows=True))
    assert "4 of 24 rows have no image (6-9)" in check("--order", "colour")


def test_records_that_the_maximum_length_cuts_are_named(own: Path, check: Callable[..., str]) -> None:
    def lengthen(rows: Any) -> None:
        for row in rows[2:5]:
            row["conversations"][0]["value"] = "<image>\n" + "is it " * 2000
        rows[7]["conversations"][1]["value"] = "yes " * 2000

    edit(own / "colour/train.json", lengthen)
    error = check("--order", "colour", bad=True)
    assert "clmoe data: 3 bad" in error
    assert "train.json: 3 rows (2-4), field 'conversations'" in error
    assert "1 of 24 rows lose answer tokens at the maximum length (7)" in error


@pytest.mark.parametrize("recipe", [{"training": {"lr": 1}}, {"methods": {"lora": {"adapter": {"rang": 2}}}}])
def test_a_recipe_with_an_unknown_key_is_bad(recipe: dict[str, Any], own: Path, check: Callable[..., str]) -> None:
    edit(own / "mini.yaml", lambda values: values.update(recipe=recipe))
    error = check(bad=True)
    assert "recipe" in error and ("'lr'" in error or "'rang'" in error)


def test_an_unknown_scorer_names_its_task(own: Path, check: Callable[..., str]) -> None:
    edit(own / "mini.yaml", lambda values: values["tasks"][1].update(scorer="iuo"))
    assert "task 'count', field 'scorer'" in check(bad=True)
    with pytest.raises(ClmoeError, match=r"'count'.*'scorer'.*'iou'"):
        check_tasks(load_benchmark(str(own / "mini.yaml")), ["colour", "count"])


INPUTS = ["mini.yaml", "colour/train.json", "side/test.json", "side/images/3.png", "colour", "count/images", "link"]


@pytest.mark.parametrize("name", [*INPUTS, "side/test.json/bad.txt"])
def test_no_list_of_bad_rows_is_written_over_data_or_found_unwritable_afterwards(
    name: str, own: Path, check: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(own / "colour/train.json", lambda rows: rows[0].pop("id"))
    (own / "link").hardlink_to(own / "count/train.json")
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    monkeypatch.setattr("clmoe.commands.check_benchmark", lambda *_: pytest.fail("the work began"))
    error = check("--bad", own / name, bad=True)
    assert "--bad" in error and str(own / name) in error
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before


def test_targets(tmp_path: Path) -> None:
    """A folder beside, below or around inputs may be written; an input, its folder, a base or a checkpoint may not."""
    (tmp_path / "base/sub").mkdir(parents=True)
    (tmp_path / "run/01_a").mkdir(parents=True)
    (tmp_path / "run/01_a/manifest.json").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.json").touch()
    read = {"files": [tmp_path / "data/train.json"], "folders": [tmp_path / "base"]}
    for name in ("run", "data/new/run", "."):
        check_target("--output", tmp_path / name, **read)
    for name in ("data", "base", "base/sub/x", "run/01_a/x", "data/train.json/x", "data/train.json"):
        with pytest.raises(ClmoeError, match=f"--output {tmp_path / name}"):
            check_target("--output", tmp_path / name, **read)


def test_commands_try_their_output_first(
    own: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark, base = str(own / "mini.yaml"), str(tiny_folder)
    (tmp_path / "file").touch()
    outputs = {
        ("run", "lora", benchmark, "--base", base): [own / "colour", tiny_folder / "run", tmp_path / "file/x"],
        ("train", "--config", "lora", "--benchmark", benchmark, "--base", base, "--task", "colour"): [own / "colour"],
        ("eval", "--checkpoint", "base", "--benchmark", benchmark, "--base", base): [own / "side/images", tiny_folder],
    }
    before = sorted(tmp_path.rglob("*")), sorted(tiny_folder.rglob("*"))
    for line, targets in outputs.items():
        for target in targets:
            with pytest.raises(SystemExit, match="2"):
                cli.main([*line, "--output", str(target)])
            assert str(target) in capsys.readouterr().err
    assert (sorted(tmp_path.rglob("*")), sorted(tiny_folder.rglob("*"))) == before
