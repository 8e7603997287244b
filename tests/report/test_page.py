"""The report page as text: it stands alone, no text of a run can become code, and it holds the numbers it shows."""

import csv
import hashlib
import io
import re
from base64 import b64decode, b64encode
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clmoe import cli
from clmoe.report.page import write_report
from tests.report.folders import TASKS, block, layer, make_run, predict, write, write_expansion

EVIL = "</script><script>window.stolen = 1</script><img src=x onerror='window.stolen = 1'>{{ 7 * 7 }}"


def page_of(runs: list[Path], output: Path) -> str:
    (path,) = write_report(runs, output, ["html"])
    assert path == output / "report.html"
    return path.read_text(encoding="utf-8")


def tags_of(page: str) -> list[tuple[str, dict[str, str]]]:
    """Every element with its attributes."""
    found, parser = [], HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.append((tag, {name: value or "" for name, value in attrs}))
    parser.feed(page)
    return found


def test_nothing_from_a_run_becomes_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0, benchmark=EVIL)
    write(run / "run.json", (run / "run.json").read_text().replace('"moe"', f'"{EVIL}"'))
    predict(run, "box", "box", {EVIL: (EVIL, 1.0)}, prompt=EVIL, answer=EVIL, image=EVIL)
    page = page_of([run], tmp_path / "out")
    tags = [tag for tag, _ in tags_of(page)]
    assert (tags.count("script"), tags.count("img"), tags.count("article")) == (1, 0, 1)
    assert not [attrs for _, attrs in tags_of(page) if any(name.startswith("on") for name in attrs)]
    assert page.count("49") == page.replace("{{ 7", "").count("49") and EVIL in unescape(page)


def test_only_the_pages_own_script_may_run_and_nothing_is_loaded(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0)
    predict(run, "box", "box", {"a": ("x", 1.0)})
    page = page_of([run], tmp_path / "out")
    (content,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    policy = dict(part.strip().split(" ", 1) for part in unescape(content).split(";"))
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    only = {"default-src": "'none'", "img-src": "data:", "script-src": f"'sha256-{digest}'"}
    assert policy == only | {"style-src": "'unsafe-inline'"}
    links = [attrs.get(name, "") for _, attrs in tags_of(page) for name in ("src", "href", "xlink:href")]
    assert all(link.startswith(("data:", "#")) for link in links if link)
    assert set(re.findall(r"https?://[\w./]*", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "url(" not in page.replace("url(#", "") and str(tmp_path) not in page


def test_same_bytes_again_and_half_a_character_does_no_harm(tmp_path: Path) -> None:
    run = make_run(tmp_path, "moe", 0)
    predict(run, "box", "box", {"a": ("x", 1.0), "b": ("\ud800 half a character", 1.0)})
    assert page_of([run], tmp_path / "one") == page_of([run], tmp_path / "two")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["report.html"]


@pytest.mark.slow
def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    def sections(output: str) -> list[str]:
        return re.findall(r'<section id="(\w+)"', page_of([run], tmp_path / output))

    run = make_run(tmp_path, "moe", 0)
    bare = ["report", "tasks", "matrices", "forgetting"]
    assert sections("bare") == [*bare, "terms"]
    step = '{"event": "step", "task": "box", "step": 10, "loss": 1.0}'
    write(run / "events.jsonl", step, '{"event": "trained", "task": "box", "phase": "probe"}')
    assert sections("probed") == [*bare, "terms"], "the task itself was too short to log a loss"
    (run / "events.jsonl").unlink()
    write(run / "parameters.csv", "task,trainable,stored", "count,7,7")
    write(run / "general.csv", "after,before", "zero_shot,80", "box,60")
    write(run / "locator.csv", "after,locator,task,located,count", "box,vae,count,count,7")
    write_expansion(run, [{layer(0): block([0.5, 0.5], 0.1, 1)}])
    for after in ("count", "box"):
        predict(run, after, "count", {"a": ("x", 1.0)})
    full = [*bare, "general", "answers", "formats", "locator", "experts", "usage", "parameters", "samples", "terms"]
    assert sections("full") == full
    for unfinished in (["colour_letter,80,,"], []):
        write(run / "matrix.csv", "after,colour_letter,count,box", *unfinished)
        assert sections("unfinished") == [name for name in full if unfinished or name not in ("matrices", "forgetting")]
        write_report([run], tmp_path / "files", ["md", "csv", "tex"])


def test_every_figure_offers_its_numbers_and_says_what_it_shows(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, label, seed) for label in ("a", "b") for seed in (0, 1)]
    write_report(runs, tmp_path / "out", ["csv", "html"])
    tags = tags_of((tmp_path / "out/report.html").read_text())
    downloads = {attrs["download"]: attrs["href"] for _, attrs in tags if "download" in attrs}
    assert list(downloads) == ["report.csv", "tasks.csv", "matrices.csv", "forgetting.csv"]
    for name, uri in downloads.items():
        assert b64decode(uri.partition("base64,")[2]) == (tmp_path / "out" / name).read_bytes()
    rows = list(csv.DictReader((tmp_path / "out/report.csv").open()))
    assert [(row["label"], row["seed"], float(row["last"]), row["bwt_known"]) for row in rows][:1] == [
        ("a", "0", 60, "")
    ]
    drawn = [attrs["aria-label"] for tag, attrs in tags if tag == "svg"]
    assert len(drawn) == 1 + 2 + 3  # comparison, a matrix per label, a curve per task
    assert all(any(task in text for task in TASKS) for text in drawn[1:]) and "a: " in drawn[0]
    headings = [tag for tag, _ in tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == "h1" and set(headings) == {"h1", "h2"}


def test_sample_answers_as_csv(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "moe", 0), make_run(tmp_path, "plain", 3)]
    predict(runs[0], "count", "count", {"a": ("yes", 1.0)})
    predict(runs[0], "box", "count", {"a": ("n" * 2000, 0.0)}, task="box")
    predict(runs[1], "box", "count", {"b": ("", 0.0)}, image=None)
    page = page_of(runs, tmp_path / "out")
    (uri,) = [attrs["href"] for _, attrs in tags_of(page) if attrs.get("download") == "samples.csv"]
    rows = list(csv.DictReader(io.StringIO(b64decode(uri.partition("base64,")[2]).decode())))
    a, b = sorted(rows, key=lambda row: row["question"])
    assert (a["now"], a["outcome"]) == ("n" * 1000 + " …", "forgotten")
    assert (b["label"], b["then"], b["outcome"]) == ("plain", "", "")
    assert "image file not found: a.png" in page and "no image" in page and "2 of the 2 test questions" in page


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, "moe", 0)
    for folder, options in ((run / "report", []), (tmp_path / "out", ["--output", str(tmp_path / "out")])):
        cli.main(["report", str(run), "--format", "csv", *options])
        text = capsys.readouterr().out
        assert (folder / "report.csv").is_file() and f"{folder}: report.csv" in text and "60.00" in text
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for output in (run, run / "predictions", run / "predictions" / "report"):
        with pytest.raises(SystemExit):
            cli.main(["report", str(run), "--output", str(output)])
        assert str(run) in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    other = make_run(tmp_path / "deeper", "plain", 0)
    cli.main(["report", str(run), str(other), "--format", "csv"])
    assert (tmp_path / "report" / "report.csv").is_file(), "beside the runs, in none of them"
    capsys.readouterr()
    cli.main(["report", str(run), "--json"])
    assert '"last": 60.0' in capsys.readouterr().out
