"""Answers then and now: outcomes, which questions a page shows, and where their images come from."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from clmoe.errors import ClmoeError
from clmoe.report.answers import OUTCOMES, choose, explore, image_folders, read_answers, thumbnail
from clmoe.report.runs import group_runs, read_run
from tests.report.folders import make_run, predict

RIGHT, WRONG = ("x", 1.0), ("y", 0.0)
NAMES = [f"q{i}" for i in range(100)]


def outcomes(run: Path, task: str) -> dict[str, str | None]:
    found = read_answers(read_run(run), task)
    return dict(zip(found["question"], found["outcome"], strict=True)) if len(found) else {}


def answered(root: Path, label: str, seed: int, forgotten: list[str]) -> Path:
    """A run that answered all questions of `count` right at first and forgot some."""
    run = make_run(root, label, seed)
    predict(run, "count", "count", dict.fromkeys(NAMES, RIGHT))
    predict(run, "box", "count", {name: WRONG if name in forgotten else RIGHT for name in NAMES})
    return run


def test_every_outcome_where_half_a_point_is_right(tmp_path: Path) -> None:
    run, task = make_run(tmp_path, "moe", 0), "colour_letter"
    predict(run, task, task, {"a": ("x", 0.9), "b": ("x", 0.6), "c": ("x", 0.3), "d": ("x", 0)})
    later = {"a": ("x", 0.5), "b": ("y", 0.3), "c": ("y", 1), "d": ("y", 0.3), "e": ("y", 1)}
    predict(run, "box", task, later, task="count")
    predict(run, "count", task, dict.fromkeys(later, ("z", 1.0)))  # a stage in between does not count
    assert outcomes(run, task) == {"a": "kept", "b": "forgotten", "c": "learned later", "d": "never right", "e": None}
    row = read_answers(read_run(run), task).set_index("question").loc["b"]
    assert (row["then"], row["now"], row["prompt"], row["reference"]) == ("x", "y", "ask b", "gold")
    assert (row["then_right"], row["now_right"], row["located"], row["image"]) == (True, False, "count", "b.png")


def test_captions_are_scored_as_a_whole_and_neither_right_nor_wrong(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0)
    for after in ("count", "box"):
        predict(run, after, "count", {"a": ("a red mug", 1.2)})
        (run / f"predictions/{after}/count.json").write_text('{"parts": {"BLEU-1": 0.4, "CIDEr": 2.0}}')
    counts, shown = explore(group_runs([run]))
    assert counts.empty and shown[["then", "then_right", "now_right"]].values.tolist() == [["a red mug", None, None]]


@pytest.mark.parametrize(("locator", "ending"), [("", "nearest_mean"), ("there/mine.py", "mine")])
def test_a_run_that_was_measured_with_another_locator(locator: str, ending: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0)
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"locator": locator}))
    for after in ("count", "box"):
        predict(run, after, f"count.{ending}", {"a": RIGHT})
    assert outcomes(run, "count") == {"a": "kept"}
    predict(run, "box", "count", {"a": WRONG})  # the checkpoint's own locator counts wherever it was measured
    assert outcomes(run, "count") == {"a": None}


def test_answers_with_line_breaks_of_unicode_and_cells_never_finished(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0)
    path = run / "predictions/box/box.jsonl"
    predict(run, "box", "box", {"a": ("one", 1), "b": ("two", 1)})
    path.write_text(path.read_text().replace('"one"', '"o\u2028n\x85e"') + "\n", encoding="utf-8")
    assert outcomes(run, "box") == {"a": "kept", "b": "kept"}
    path.with_suffix(".json").unlink()
    assert outcomes(run, "box") == {}


@pytest.mark.parametrize(("field", "value"), [("text", 3), ("score", "1"), ("image", 1)])
def test_malformed_rows_are_named(tmp_path: Path, field: str, value: object) -> None:
    run = make_run(tmp_path, "moe", 0)
    path = run / "predictions/box/box.jsonl"
    predict(run, "box", "box", {"b": RIGHT}, **{field: value})
    for line, named in ((path.read_text(), f".*'{field}'"), ("{cut\n", "")):
        predict(run, "box", "box", {"a": RIGHT})
        path.write_text(path.read_text() + line)
        with pytest.raises(ClmoeError, match=rf"box\.jsonl, row 2: {named}"):
            read_answers(read_run(run), "box")


def test_counts_are_summed_over_seeds(tmp_path: Path) -> None:
    """Outcomes are summed over seeds; the last task's answers then and now are identical, so it is not counted."""
    runs = [make_run(tmp_path, label, seed) for label, seed in (("moe", 0), ("moe", 1), ("none", 0))]
    for run, later in zip(runs, (1.0, 0.0), strict=False):
        predict(run, "count", "count", {"a": RIGHT, "b": WRONG})
        predict(run, "box", "count", {"a": ("x", later), "b": RIGHT, "c": WRONG})
        predict(run, "box", "box", {"a": RIGHT})
    counts, shown = explore(group_runs(runs))
    assert list(counts.columns[2:]) == list(OUTCOMES.values())
    assert counts.values.tolist() == [["moe", "count", 1, 1, 2, 0]]
    assert dict(zip(shown["task"], shown["asked"], strict=True)) == {"count": 3, "box": 1} and len(shown) == 8


def test_forgotten_ones_come_first_and_each_label_has_its_turn(tmp_path: Path) -> None:
    rare, half = ["q90", "q91"], NAMES[:50]
    kinds = (("all", 0, NAMES), ("few", 0, []), ("few", 1, rare), ("half", 0, half))
    folders = [answered(tmp_path, *kind) for kind in kinds]
    _, everything = explore(group_runs(folders[:3]), 200)
    assert set(choose(everything, 200)) == set(NAMES)
    chosen = choose(everything, 8)
    assert len(chosen) == len(set(chosen)) == 8 and set(rare) <= set(chosen)
    assert choose(everything.sample(frac=1, random_state=0), 8) == chosen  # only the names decide
    only_few = choose(everything[everything["label"] == "few"], 8)
    assert set(rare) <= set(only_few) and len(only_few) == 8
    chosen = choose(read_answers(read_run(folders[3]), "count"), 40)
    assert len(chosen) == 40 and 30 <= sum(name in half for name in chosen) < 40  # a quarter is drawn from all
    predict(folders[3], "count", "count", dict.fromkeys(NAMES[:5], RIGHT))
    assert set(choose(read_answers(read_run(folders[3]), "count"), 6)) > set(NAMES[:5])  # those asked twice first


def test_thumbnails_are_small_and_stay_in_their_folder(tmp_path: Path) -> None:
    for name, size in (
        ("a.png", (56, 40)),
        ("wide.png", (1200, 300)),
        ("../outside.png", (5, 5)),
        ("C:/x.png", (5, 5)),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", size, "#102030").save(tmp_path / name)
    for name, size in (("a.png", (56, 40)), ("wide.png", (224, 56))):
        uri, problem = thumbnail(name, [tmp_path / "nowhere", tmp_path])
        assert problem == "" and uri is not None and uri.startswith("data:image/webp;base64,")
        small = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
        assert small.size == size
        assert name != "a.png" or small.convert("RGB").getpixel((3, 3)) == (0x10, 0x20, 0x30)  # kept exactly
    (tmp_path / "broken.png").write_bytes(b"GIF89a...")
    outside = str(tmp_path.parent / "outside.png")
    for name in ("gone.png", "broken.png", "../outside.png", "a/../../outside.png", outside, "C:/x.png", "C:\\x.png"):
        uri, problem = thumbnail(name, [tmp_path])
        assert uri is None and problem


def test_image_folders_as_recorded_or_below_the_folder_given(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0)
    events = [
        {"event": "evaluated", "task": "count", "after": "count", "score": 1.0},  # from an older version
        {"event": "evaluated", "task": "box.oracle", "after": "box", "data": "/old/coin", "images": "deep/box"},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    groups = group_runs([run])
    assert image_folders(groups, None) == {"colour_letter": [], "count": [], "box": [Path("/old/coin/deep/box")]}
    assert image_folders(groups, Path("/new"))["box"] == [Path("/new/deep/box"), Path("/old/coin/deep/box")]
