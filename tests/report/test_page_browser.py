"""The page in a browser: no errors or requests, readable on a phone and in the dark, with filters that count right."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from clmoe.report.page import write_report
from tests.report.folders import TASKS, block, layer, make_run, predict, write, write_expansion

sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine")
SWITCHES = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
EVIL = '<img src=x onerror="window.stolen = 1">, "said" <script>window.stolen = 1</script>'
MOE = "moe_with_a_rather_long_name"
# method and seed -> scores of the questions c0..c3 of task `count` right after it and at the end
SCORES = {(MOE, 0): ([1, 1, 0, 0], [1, 0, 1, 0]), (MOE, 1): ([1] * 4, [0] * 4), ("plain", 0): ([1] * 4, [1] * 4)}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of three runs with everything that a page can show."""
    root = tmp_path_factory.mktemp("runs")
    for i in range(3):  # the image of c3 is missing
        Image.new("RGB", (40, 40), (80 * i, 0, 0)).save(root / f"c{i}.png")
    runs = []
    for (label, seed), (then, now) in SCORES.items():
        run = make_run(root, label, seed, 50.0 + seed, immediate=True)
        predict(run, "count", "count", {f"c{i}": (f"then {i}", float(score)) for i, score in enumerate(then)})
        predict(run, "box", "count", {f"c{i}": (EVIL, float(score)) for i, score in enumerate(now)}, task="box")
        predict(run, "box", "box", {f"b{i}": ("same" * 40, 1.0) for i in range(2)})
        located = [f"box,vae,{task},{task},4" for task in TASKS]
        write(run / "locator.csv", "after,locator,task,located,count", *located)
        write(run / "parameters.csv", "task,trainable,stored", *(f"{task},90624,90624" for task in TASKS))
        write_expansion(run, [{}, {layer(i): block([0.05] * 16, 0.01, 1) for i in range(2)}])
        write(run / "events.jsonl", f'{{"event": "evaluated", "task": "count", "data": "{root}", "images": ""}}')
        runs.append(run)
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
    """The page at the width given as parameter (default 1280); a console message, error or request fails the test."""
    width = getattr(request, "param", 1280)
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="light")
    opened, troubles = context.new_page(), []
    opened.on("console", lambda message: troubles.append(message.text))
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("request", lambda sent: None if sent.url.startswith(("file:", "data:")) else troubles.append(sent.url))
    opened.goto(page_file.as_uri())
    yield opened
    context.close()
    assert troubles == []


def choose(page: Any, **filters: str) -> tuple[int, int]:
    """Set filters; return how many answers and questions the page says match, after counting those that it shows."""
    for name, value in filters.items():
        page.locator(f"select[name={name}]").select_option(value)
    words = page.locator("#matches").inner_text().split()
    found = int(words[0]), int(words[3])
    assert page.locator("article tbody tr:visible").count() == found[0]
    assert page.locator("article:visible").count() == found[1]
    return found


def test_filters_count_right_and_can_be_reached_by_keyboard(page: Any) -> None:
    assert choose(page) == (12, 6)  # seed 0 of two methods, four questions of count and two of box
    assert choose(page, task="count") == (8, 4)
    assert choose(page, seed="") == (12, 4)
    assert choose(page, outcome="forgotten") == (5, 4)
    assert choose(page, method="plain") == (0, 0)
    assert choose(page, method=MOE, seed="0") == (1, 1)
    assert "ask c1" in page.locator("article:visible").inner_text()
    assert choose(page, outcome="never right") == (1, 1)
    assert "image file not found: c3.png" in page.locator("article:visible").inner_text()
    page.locator("select[name=outcome]").focus()
    page.keyboard.press("ArrowUp")
    assert choose(page) == (1, 1) and "ask c2" in page.locator("article:visible").inner_text()  # learned later


def test_answers_are_text_and_pictures_are_shown(page: Any) -> None:
    assert EVIL in page.locator("#samples").inner_text() and page.evaluate("window.stolen") is None
    widths = page.locator("#samples img").evaluate_all("(images) => images.map((image) => image.naturalWidth)")
    assert widths == [40] * 3


def test_dark_and_light_follow_the_system_down_to_the_figures(page: Any) -> None:
    shades = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for selector, part in (("#matrices", "backgroundColor"), ("#forgetting svg text", "fill")):
            colour = page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{part}")
            shades.append(sum(map(int, colour[4:-1].split(","))))
    assert shades[0] > 600 and shades[1] < 150 and shades[2] < 150 and shades[3] > 600


def test_a_figure_is_saved_as_the_page_shows_it(page: Any, tmp_path: Path) -> None:
    figure = page.locator("#comparison figure, #report figure").first
    for button, ending in zip(figure.locator(".export button").all(), ("svg", "png"), strict=True):
        with page.expect_download() as download:
            button.click()
        assert download.value.suggested_filename == f"comparison.{ending}"
        download.value.save_as(tmp_path / f"figure.{ending}")
    root = ElementTree.parse(tmp_path / "figure.svg").getroot()
    assert MOE[:21] in "".join(root.itertext()) and "var(" not in (tmp_path / "figure.svg").read_text()
    with Image.open(tmp_path / "figure.png") as image:
        assert (
            image.width == pytest.approx(4 * float(root.get("width", "0")), abs=4) and len(image.getcolors(2**24)) > 9
        )


@pytest.mark.parametrize("page", [390, 1280], indirect=True)
def test_nothing_is_wider_than_the_page(page: Any) -> None:
    """Nothing makes the page scroll sideways, and nothing is cut off: whatever is wider scrolls in its own box."""
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    cut = """[...document.querySelectorAll("main *, header *")].filter((node) => !node.closest(".scroll")
        && node.getBoundingClientRect().right > innerWidth + 1).map((node) => node.outerHTML)"""
    assert page.evaluate(cut) == []


@pytest.mark.parametrize("page", [1280], indirect=True)
def test_the_scores_fit_the_page(page: Any) -> None:
    """All nine metrics of two seeds with a long name fit without scrolling, above the table of what a row keeps."""
    scores, spent = page.locator("#report > .scroll").all()[:2]
    assert scores.locator("thead th").count() == 10 and "What a row keeps and computes" in spent.inner_text()
    assert scores.evaluate("(box) => box.scrollWidth <= box.clientWidth")


def test_without_script_all_answers_are_there(browser: Any, page_file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(page_file.as_uri())
    assert opened.locator("article").count() == 6 and not opened.locator(".filters").is_visible()
    context.close()
