"""The page in a browser: drawn without an error, its filters and downloads right, readable on a phone."""

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clmoe.report.write import write_report
from tests.report.folders import TASKS, block, layer, make_run, predict

sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine")
SWITCHES = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
EVIL = '<img src=x onerror="window.stolen = 1">, "said" <script>window.stolen = 1</script>'
# method and seed -> scores of the questions c0..c3 of task `count` right after it and at the end
SCORES = {
    ("moe", 0): ([1, 1, 0, 0], [1, 0, 1, 0]),
    ("moe", 1): ([1, 1, 1, 1], [0, 0, 0, 0]),
    ("plain", 0): ([1, 1, 1, 1], [1, 1, 1, 1]),
}


def full_run(root: Path, label: str, seed: int) -> Path:
    """A run with all that a page can show."""
    run = make_run(root, label, seed, 50.0 + seed, immediate=True)
    then, now = SCORES[label, seed]
    predict(run, "count", "count", {f"c{i}": (f"then {i}", float(score)) for i, score in enumerate(then)})
    predict(run, "box", "count", {f"c{i}": (EVIL, float(score)) for i, score in enumerate(now)}, task="box")
    predict(run, "box", "box", {f"b{i}": ("same", 1.0) for i in range(2)})
    located = [f"box,vae,{task},{task},4" for task in TASKS]
    (run / "locator.csv").write_text("\n".join(["after,decider,task,located,count", *located]) + "\n")
    (run / "parameters.csv").write_text("task,trainable,stored\n" + "".join(f"{task},90624,90624\n" for task in TASKS))
    plans = [{"task": "box", "blocks": {layer(i): block([0.5, 0.3, 0.2], 0.1, 1) for i in range(2)}}]
    (run / "expansion.json").write_text(json.dumps(plans))
    events = [{"event": "trained", "task": task, "phase": "trained", "seconds": 60.0} for task in TASKS]
    events[0]["peak_rss_mib"] = 321
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    runs = [full_run(root, label, seed) for label, seed in SCORES]
    images = root / "data/images"
    images.mkdir(parents=True)
    for i in range(3):  # the image of c3 is missing
        Image.new("RGB", (40, 40), (80 * i, 0, 0)).save(images / f"c{i}.png")
    place = {"event": "evaluated", "task": "count", "after": "count", "seconds": 1.0}
    with (runs[0] / "events.jsonl").open("a") as file:
        file.write(json.dumps(place | {"data": str(root / "data"), "images": "images"}) + "\n")
    (path,) = write_report(runs, root / "report", ["html"])
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{name}" for name in SWITCHES])
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, page_file: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page at the width given as parameter (1280); a console message, error or request ends the test."""
    width = getattr(request, "param", 1280)
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="light")
    opened = context.new_page()
    troubles: list[str] = []
    opened.on("console", lambda message: troubles.append(message.text))
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on(
        "request", lambda sent: None if sent.url.startswith(("file:", "data:", "blob:")) else troubles.append(sent.url)
    )
    opened.goto(page_file.as_uri())
    yield opened
    context.close()
    assert troubles == []


def counted(page: Any) -> tuple[int, int]:
    """Answers and questions that match, as the page says, checked against the rows that it draws."""
    words = page.locator("#samples-count").inner_text().split()
    answers, questions = int(words[0]), int(words[3])
    assert page.locator("#samples .answers tbody tr").count() == answers
    assert page.locator("#samples article").count() == questions
    return answers, questions


def choose(page: Any, **filters: str) -> tuple[int, int]:
    for name, value in filters.items():
        page.locator(f"#samples select[data-filter={name}]").select_option(value)
    return counted(page)


def downloaded(page: Any, name: str) -> list[dict[str, str]]:
    with page.expect_download() as waiting:
        page.locator(f"[data-csv={name}]").click()
    assert waiting.value.suggested_filename == f"{name}.csv"
    return list(csv.DictReader(io.StringIO(Path(waiting.value.path()).read_text(encoding="utf-8"))))


def test_every_figure_is_drawn_with_a_sentence_and_its_numbers(page: Any) -> None:
    names = page.evaluate("[...document.querySelectorAll('section[data-figure]')].map((s) => s.dataset.figure)")
    assert len(names) == 10
    for name in names:
        section = page.locator(f"section[data-figure={name}]")
        box = section.locator(".body").bounding_box()
        assert box is not None and box["height"] > 30 and box["width"] > 500, name
        assert len(section.locator(".lead").inner_text()) > 60, name
        assert downloaded(page, name), name
    assert page.locator("#curves svg polyline").count() == 2 * 3  # two methods, three tasks
    assert page.locator("nav a").count() == len(names) + 2
    assert "321 MiB RSS" in page.locator("#costs").inner_text()


def test_heat_maps_and_csv_hold_the_files_numbers(page: Any, page_file: Path) -> None:
    with (page_file.parents[1] / "moe-1/matrix.csv").open() as file:
        rows = {row.pop("after"): row for row in csv.DictReader(file)}
    page.locator("#matrices select").select_option("1")
    drawn = page.locator("#matrices .body table.heat")
    assert drawn.count() == 1  # plain has no seed 1
    cells = drawn.locator("tbody td").all_inner_texts()
    numbers = [rows[after][task] for after in TASKS for task in TASKS]
    assert cells == [f"{float(text):.0f}" if text else "·" for text in numbers]
    found = [row for row in downloaded(page, "matrices") if (row["label"], row["seeds"]) == ("moe", "1")]
    assert [(row["after"], row["task"]) for row in found] == [(after, task) for after in TASKS for task in TASKS]
    assert [float(row["score"] or -1) for row in found] == [float(text or -1) for text in numbers]
    page.locator("#matrices select").select_option("")
    assert page.locator("#matrices .body table.heat").count() == 2
    last = page.locator("#overview tbody tr", has_text="moe").locator("td").first.inner_text()
    assert last == "60.3 ± 0.5"  # of 60 and 60.67


def test_filters_count_right(page: Any) -> None:
    assert counted(page) == (12, 6)  # seed 0 of two methods, four questions of count and two of box
    tasks = [text.split(" · ")[0] for text in page.locator("#samples article .kicker").all_inner_texts()]
    assert tasks == ["count", "box", "count", "box", "count", "count"]
    assert choose(page, task="count") == (8, 4)
    assert choose(page, seed="") == (12, 4)
    assert choose(page, answers="forgotten") == (5, 4)
    assert choose(page, method="plain") == (0, 0)
    assert choose(page, method="moe", seed="0") == (1, 1)
    assert "ask c1" in page.locator("#samples article").inner_text()
    assert choose(page, answers="gained") == (1, 1)
    assert choose(page, answers="never") == (1, 1)
    assert "image file not found: c3.png" in page.locator("#samples article").inner_text()
    assert choose(page, task="", answers="kept") == (3, 3)
    rows = downloaded(page, "samples")
    assert {(row["label"], row["seed"], row["outcome"]) for row in rows} == {("moe", "0", "kept")}
    assert sorted(row["question_id"] for row in rows) == ["b0", "b1", "c0"]


def test_answers_are_text_and_pictures_are_shown(page: Any) -> None:
    choose(page, task="count")
    assert EVIL in page.locator("#samples").inner_text()
    assert page.evaluate("window.stolen") is None
    pictures = page.locator("#samples img")
    assert pictures.count() == 3
    assert [pictures.nth(i).evaluate("(i) => i.naturalWidth") for i in range(3)] == [40] * 3
    assert downloaded(page, "samples")[0]["at_end"] == EVIL


def test_theme_follows_the_system_and_the_button(page: Any) -> None:
    def shade() -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))

    for scheme, dark in (("light", False), ("dark", True), ("light", False)):
        page.emulate_media(color_scheme=scheme)
        assert (shade() < 150, shade() > 600) == (dark, not dark)
    page.locator("#theme").click()
    assert shade() < 150
    page.reload()
    assert shade() < 150, "the choice is kept"
    page.locator("#theme").click()
    page.emulate_media(color_scheme="dark")
    assert shade() > 600, "the choice goes before the system"


def test_methods_can_be_hidden_and_columns_sorted(page: Any) -> None:
    lines = page.locator("#curves g[data-label=moe]")
    assert lines.first.is_visible()
    page.locator("#curves button", has_text="moe").click()
    assert not lines.first.is_visible()
    assert page.locator("#curves g[data-label=plain]").first.is_visible()

    def order() -> list[str]:
        return [text.split("\n")[0] for text in page.locator("#overview tbody th").all_inner_texts()]

    page.locator("[data-sort=last]").click()
    assert order() == ["moe", "plain"]  # 60.3 and 60
    page.locator("[data-sort=last]").click()
    assert order() == ["plain", "moe"]


@pytest.mark.parametrize("page", [390, 1280], indirect=True)
def test_no_sideways_scrolling(page: Any) -> None:
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # nothing is cut off either: whatever is wider than the page scrolls in its own box
    wide = page.evaluate(
        """(width) => [...document.querySelectorAll("main *, header *")]
            .filter((node) => node.getBoundingClientRect().right > width + 1 && !node.closest(".scroll"))
            .map((node) => node.outerHTML)""",
        width,
    )
    assert wide == []
