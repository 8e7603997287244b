"""The page as text: it stands alone, nothing in it can run, and the same runs give the same bytes."""

import hashlib
import json
import re
from base64 import b64encode
from pathlib import Path

import numpy
import pytest
from PIL import Image

from clmoe.errors import ClmoeError
from clmoe.report.run import group_runs
from clmoe.report.write import write_report
from tests.report.folders import TASKS, make_run, predict

EVIL = "</script><script>window.stolen = 1</script><img src=x onerror='window.stolen = 1'>"


def page_of(runs: list[Path], output: Path, data: Path | None = None) -> str:
    (path,) = write_report(runs, output, ["html"], data)
    assert path == output / "report.html"
    return path.read_text(encoding="utf-8")


def embedded(page: str) -> dict[str, object]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def test_nothing_from_a_prediction_becomes_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0, benchmark=EVIL + "{{data}}")
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"label": EVIL}))
    predict(run, "box", "box", {EVIL: (EVIL, 1.0)}, prompt=EVIL, answer=EVIL, image=EVIL)
    page = page_of([run], tmp_path / "out")
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page
    (question,) = embedded(page)["samples"]["questions"]  # type: ignore[index]
    assert question["prompt"] == question["reference"] == EVIL  # and yet it is all there
    assert page.count("{{data}}") == 2  # the benchmark's name, in title and data, was not searched for marks again


def test_only_the_pages_own_script_and_style_may_run(tmp_path: Path) -> None:
    page = page_of([make_run(tmp_path, "moe", 0)], tmp_path / "out")
    match = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert match is not None
    directives = dict(part.strip().split(" ", 1) for part in match[1].split(";"))
    assert set(directives) == {"default-src", "img-src", "style-src", "script-src"}
    assert (directives["default-src"], directives["img-src"]) == ("'none'", "data:")
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        expected = b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert directives[f"{tag}-src"] == f"'sha256-{expected}'"
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert set(re.findall(r"https?://[\w./]*", page)) == {"http://www.w3.org/2000/svg"}  # a name, never loaded
    assert str(tmp_path) not in page


def test_same_bytes_again_and_no_pictures_beside_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0)
    predict(run, "box", "box", {"a": ("x", 1.0), "b": ("\ud800 half a character", 1.0)})
    assert page_of([run], tmp_path / "one") == page_of([run], tmp_path / "two")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["report.html"]


def test_pdf_pictures_stand_beside_the_png(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0)
    names = {path.name for path in write_report([run], tmp_path / "one", ["pdf", "tex"])}
    stems = ("matrix-moe-seed0", "forgetting")
    assert names == {"report.tex", *(stem + ending for stem in stems for ending in (".png", ".pdf"))}
    write_report([run], tmp_path / "two", ["pdf"])
    for stem in stems:
        content = (tmp_path / "one" / f"{stem}.pdf").read_bytes()
        assert content.startswith(b"%PDF") and b"/Type3" not in content
        assert content == (tmp_path / "two" / f"{stem}.pdf").read_bytes()


def test_a_large_comparison_stays_small(tmp_path: Path) -> None:
    """Eight tasks, seven methods, three seeds, photograph-like noise, which compresses worst, and long answers."""
    tasks = [f"task{i}" for i in range(8)]
    noise = numpy.random.default_rng(0)
    names = [f"q{i}" for i in range(40)]
    images = tmp_path / "data"
    images.mkdir()
    for name in names:
        Image.fromarray(noise.integers(0, 256, (336, 336, 3), dtype=numpy.uint8)).save(images / f"{name}.png")
    event = {"event": "evaluated", "after": tasks[-1], "seconds": 1.0, "data": str(tmp_path), "images": "data"}
    runs = []
    for label in range(7):
        for seed in range(3):
            run = make_run(tmp_path, f"method{label}", seed)
            info = json.loads((run / "run.json").read_text())
            (run / "run.json").write_text(json.dumps(info | {"order": tasks}))
            rows = [f"{after},{','.join(['50.123456789'] * 8)}" for after in tasks]
            (run / "matrix.csv").write_text("\n".join([f"after,{','.join(tasks)}", *rows]) + "\n")
            (run / "events.jsonl").write_text("".join(json.dumps(event | {"task": task}) + "\n" for task in tasks))
            for task in tasks:
                predict(run, task, task, dict.fromkeys(names, ("word " * 60, 1.0)))
                predict(run, tasks[-1], task, dict.fromkeys(names, ("other " * 60, 0.0)))
            runs.append(run)
    page = page_of(runs, tmp_path / "out")
    samples = embedded(page)["samples"]
    assert len(samples["questions"]) == 8 * 24 and len(samples["answers"]) == 8 * 24 * 21  # type: ignore[index]
    assert 24 <= len(samples["images"]) <= 40  # type: ignore[index]
    # 192 different images instead of 40 would add 152 of the largest:
    largest = max(map(len, samples["images"]))  # type: ignore[index]
    assert len(page) + 152 * largest < 15e6


def test_unknown_method_and_formats(tmp_path: Path) -> None:
    page = page_of([make_run(tmp_path, "moe", 0, method="not-here")], tmp_path / "out")
    assert embedded(page)["about"]["tasks"] == TASKS  # type: ignore[index]
    assert group_runs([tmp_path / "moe-0"])[0].runs[0].method == "not-here"
    with pytest.raises(ClmoeError, match="did you mean 'html'"):
        write_report([tmp_path / "moe-0"], tmp_path / "out", ["htm"])
