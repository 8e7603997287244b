"""Which questions a page shows, and where their images come from."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from clmoe.report import samples
from clmoe.report.images import MISSING, UNREADABLE, Thumbnails, data_uri, image_folders
from clmoe.report.run import group_runs, read_run
from clmoe.report.samples import choose, count_outcomes, read_answers, sample_data
from tests.report.folders import make_run, predict

RIGHT, WRONG = ("x", 1.0), ("y", 0.0)
NAMES = [f"q{i}" for i in range(100)]


def answered(root: Path, label: str, seed: int, forgotten: list[str]) -> Path:
    """A run that got all questions of `count` right, and forgot some."""
    run = make_run(root, label, seed)
    predict(run, "count", "count", dict.fromkeys(NAMES, RIGHT))
    predict(run, "box", "count", {name: WRONG if name in forgotten else RIGHT for name in NAMES})
    return run


def test_forgotten_ones_come_first_and_each_label_has_its_turn(tmp_path: Path) -> None:
    rare = ["q90", "q91"]
    runs = [answered(tmp_path, "all", 0, NAMES), answered(tmp_path, "few", 0, []), answered(tmp_path, "few", 1, rare)]
    answers = read_answers(group_runs(runs))
    chosen = choose(answers, "count", 8)
    assert len(chosen) == len(set(chosen)) == 8
    assert set(rare) <= set(chosen)
    assert choose(answers, "count", 8) == chosen
    assert choose(answers[1:], "count", 200) and set(choose(answers[1:], "count", 200)) == set(NAMES)
    only_few = choose(answers[1:], "count", 8)
    assert set(rare) <= set(only_few) and len(only_few) == 8
    assert count_outcomes(answers, "few", "count") == {"kept": 198, "forgotten": 2, "gained": 0, "never": 0}
    assert count_outcomes(answers, "few", "box") == {}


def test_many_forgotten_leave_a_quarter_to_all(tmp_path: Path) -> None:
    half = NAMES[:50]
    chosen = choose(read_answers(group_runs([answered(tmp_path, "moe", 0, half)])), "count", 40)
    assert len(chosen) == 40
    assert 30 <= sum(name in half for name in chosen) < 40


def test_questions_asked_twice_come_before_those_asked_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0)
    predict(run, "count", "count", dict.fromkeys(NAMES[:5], RIGHT))  # evaluated with a limit
    predict(run, "box", "count", dict.fromkeys(NAMES, RIGHT))
    assert set(choose(read_answers(group_runs([run])), "count", 6)) > set(NAMES[:5])


def test_sample_data_of_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "LONGEST", 5)
    first, second = make_run(tmp_path, "moe", 0), make_run(tmp_path, "plain", 3)
    predict(first, "count", "count", {"a": ("yes", 1.0)})
    predict(first, "box", "count", {"a": ("far too long", 0.0)}, task="box")
    predict(second, "box", "count", {"a": ("no", 0.0), "b": ("no", 0.0)}, image=None)
    groups = group_runs([first, second])
    data = sample_data(groups, read_answers(groups), tmp_path)
    assert data["runs"] == [["moe", 0], ["plain", 3]]
    assert data["totals"] == {"colour_letter": [0, 0], "count": [2, 2], "box": [0, 0]}
    questions = {question["id"]: (number, question) for number, question in enumerate(data["questions"])}
    a, question = questions["a"]
    assert question == {
        "task": "count",
        "id": "a",
        "file": "a.png",
        "image": MISSING,
        "prompt": "ask a",
        "reference": "gold",
    }
    b, other = questions["b"]
    assert (other["file"], other["image"]) == (None, None)
    assert sorted(data["answers"], key=lambda row: row[:2]) == sorted(
        [
            [a, 0, ["yes", True], ["far t …", False], "box", "forgotten"],
            [a, 1, None, ["no", False], None, "unknown"],
            [b, 1, None, ["no", False], None, "unknown"],
        ],
        key=lambda row: row[:2],
    )


def picture(path: Path, size: tuple[int, int], colour: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def decoded(uri: str) -> Image.Image:
    kind, content = uri.split(",")
    assert kind == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_thumbnails_are_small_and_embedded_once(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (56, 40), "#102030")
    picture(tmp_path / "b.png", (56, 40), "#102030")
    picture(tmp_path / "wide.png", (1200, 300), "red")
    (tmp_path / "broken.png").write_bytes(b"GIF89a...")
    images = Thumbnails({"count": [tmp_path / "nowhere", tmp_path]})
    assert [images.add("count", name) for name in ("a.png", "b.png", "wide.png", "a.png")] == [0, 0, 1, 0]
    assert images.add("count", "gone.png") == MISSING
    assert images.add("box", "a.png") == MISSING
    assert images.add("count", "broken.png") == UNREADABLE
    outside = picture(tmp_path.parent / "outside.png", (5, 5), "red")
    picture(tmp_path / "C:" / "private.png", (5, 5), "red")
    for path in ("../outside.png", "a/../../outside.png", str(outside), "C:/private.png", "C:\\private.png"):
        assert images.add("count", path) == MISSING
    assert len(images.uris) == 2
    small = decoded(images.uris[0])
    assert small.size == (56, 40) and small.convert("RGB").getpixel((3, 3)) == (0x10, 0x20, 0x30)  # kept exactly
    assert decoded(images.uris[1]).size == (224, 56)
    assert data_uri(tmp_path / "a.png") == images.uris[0]


def test_image_folders_given_then_recorded_then_of_the_benchmark(tmp_path: Path) -> None:
    order = ["sqa", "gqa"]
    run = make_run(tmp_path, "moe", 0)
    info = json.loads((run / "run.json").read_text()) | {"order": order}
    (run / "run.json").write_text(json.dumps(info))
    (run / "matrix.csv").write_text("after,sqa,gqa\n")
    events = [
        {"event": "evaluated", "task": "sqa", "after": "sqa", "score": 1.0},  # of an older version
        {"event": "evaluated", "task": "gqa.oracle", "after": "gqa", "data": "/old/coin", "images": "deep/gqa"},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    runs = [read_run(run)]
    of_benchmark = Path(__file__).parents[2] / "playground/data/playground-coin"
    folders = image_folders(runs, None)
    assert folders["gqa"] == [Path("/old/coin/deep/gqa"), of_benchmark / "gqa/images"]
    assert folders["sqa"] == [of_benchmark / "sqa/images"]
    given = image_folders(runs, Path("/new"))
    assert given["gqa"] == [Path("/new/deep/gqa"), Path("/old/coin/deep/gqa"), Path("/new/gqa/images")]
    (run / "run.json").write_text(json.dumps(info | {"benchmark": "of-my-own"}))
    assert image_folders([read_run(run)], None)["gqa"] == [Path("/old/coin/deep/gqa")]
