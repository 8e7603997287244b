"""``clmoe demo``: its panels, read back from HTML, and the page in a real browser; nothing leaves the machine."""

import importlib.util
import json
import shutil
import socket
import sys
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import clmoe
from clmoe import cli
from clmoe.benchmarks.base import Benchmark
from clmoe.evaluate.loaded import Explanation, RouterWeights
from tests.runs import Runs
from tests.support import TASKS

gradio = pytest.importorskip("gradio", reason="needs gradio (pip install 'clmoe[demo]')")

from clmoe.demo import asked_panel, experts_panel, read_examples, scores_panel, stream  # noqa: E402

LEARNED = ["sqa", "te<xt", "box"]
GROWN = [
    RouterWeights(0, "", [-1, -1, 0, 1, 2], [0.5, 0.25, 0.0, 0.25]),
    RouterWeights(1, "", [-1, -1, 0, 2], [0.9, 0.06, 0.04]),
]


def table(html: str) -> list[list[str]]:
    """The cells of the panel's table; parsing fails if names are not escaped."""
    root = ET.fromstring(f"<div>{html.replace('&nbsp;', '')}</div>")
    return [["".join(cell.itertext()).strip() for cell in row] for row in root.iter("tr")]


def test_scores_with_the_largest_in_bold() -> None:
    html = scores_panel(Explanation("2", "box", {"sqa": -4.0, "te<xt": 1.0, "box": -1.5}, []))
    assert table(html) == [["", "score"], ["sqa", "-4.00"], ["te<xt", "1.00"], ["box", "-1.50"]]
    assert [bold.text for bold in ET.fromstring(f"<div>{html.replace('&nbsp;', '')}</div>").iter("b")] == [
        "te<xt",
        "box",
    ]


def test_experts_stand_under_the_task_that_brought_them() -> None:
    assert table(experts_panel(Explanation("2", "te<xt", {}, GROWN), LEARNED)) == [
        ["", "before task 1", "sqa", "te<xt", "box"],
        ["", "1", "2", "1", "1", "1"],
        ["block 0", "50", "25", "0", "25", "0"],
        ["block 1", "90", "6", "4", "", "0"],
    ]
    shared = Explanation("2", "sqa", {}, [RouterWeights(3, "up_proj", [0, 0], [0.4, 0.6])])
    rows = [["", "shared by all tasks"], ["", "1", "2"], ["block 3 up_proj", "40", "60"]]
    assert table(experts_panel(shared, LEARNED)) == rows


def test_methods_without_scores_or_experts_and_the_list_of_answers() -> None:
    nothing = Explanation("2", None, {}, [])
    assert table(scores_panel(nothing)) == table(experts_panel(nothing, LEARNED)) == []
    asked = [("a < b?", "oracle", "sqa", "yes"), ("c?", "", "", "<no>")]
    assert table(asked_panel(asked))[1:] == [list(row) for row in reversed(asked)]


def test_the_first_test_questions_of_every_learned_task(mini: Benchmark, mini_yaml: Path) -> None:
    examples = read_examples(mini, ["side", "colour"], per_task=3)
    assert [example.task for example in examples] == ["colour"] * 3 + ["side"] * 3
    for task in ("colour", "side"):
        rows = json.loads((mini_yaml.parent / task / "test.json").read_text())[:3]
        mine = [(e.question, e.answer, e.image) for e in examples if e.task == task]
        images = mini_yaml.parent / task / "images"
        assert mine == [(row["text"], row["answer"], str(images / row["image"])) for row in rows]
    assert read_examples(mini, ["count"], per_task=12)[7].image is None


def test_reports_come_while_the_work_goes_on_and_its_error_comes_last() -> None:
    seen_first = threading.Event()

    def work(report: Callable[[int], None]) -> int:
        report(1)
        assert seen_first.wait(20), "the first report was held back until the end"
        report(2)
        raise ValueError("no more")

    items = stream(work)
    assert next(items) == 1
    seen_first.set()
    assert next(items) == 2
    with pytest.raises(ValueError, match="no more"):
        next(items)
    assert list(stream(lambda report: 3)) == [3]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
needs_browser = pytest.mark.skipif(
    not CHROMIUM or importlib.util.find_spec("playwright") is None, reason="needs playwright and chromium"
)


@pytest.fixture
def browser_page(
    runs: Runs, mini_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Any]:
    """The page of a CL-MoE checkpoint. At the end, no browser error and no connection to another machine is allowed."""
    from playwright.sync_api import sync_playwright

    complaints, asked, connected = [], [], []
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: connected.append(to) or connect(self, to))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda self: None)
    cli.main(["demo", str(runs.chain("clmoe")[1]), "--benchmark", str(mini_yaml)])
    address = next(word for word in capsys.readouterr().out.split() if word.startswith("http://127.0.0.1:"))
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS])
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.get_by_role("button", name="Ask", exact=True).wait_for(timeout=30_000)
        yield page
        browser.close()
    gradio.close_all()
    assert complaints == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert {to[0] for to in connected if isinstance(to, tuple)} <= {"127.0.0.1"}


def ask(page: Any, answers: int) -> list[list[str]]:
    """Press the button, wait until that many answers are listed, and return the list, newest first."""
    page.get_by_role("button", name="Ask", exact=True).click()
    rows = page.locator("table.asked tr")
    rows.nth(answers).wait_for(timeout=30_000)
    return [row.locator("td").all_inner_texts() for row in rows.all()[1:]]


@needs_browser
def test_a_question_is_answered_and_explained(browser_page: Any, runs: Runs, mini_yaml: Path) -> None:
    """Oracle: what ``clmoe.load`` answers in Python, for the task that is located and for the one that is picked."""
    page, loaded = browser_page, clmoe.load(runs.chain("clmoe")[1])
    image, question = mini_yaml.parent / "colour/images/24.png", "Which colour is it?\nA. red\nB. green\nC. blue"
    page.locator("tr.tr-body").first.click()
    page.wait_for_function("document.querySelector('textarea').value.startsWith('Which')")
    expected = loaded.explain(image, question)
    (row,) = ask(page, 1)
    assert row == [" ".join(question.split()), "the checkpoint's", expected.task, expected.text]
    assert page.get_by_label("Answer", exact=True).input_value() == expected.text
    assert page.get_by_label("Expected answer", exact=True).input_value() == "A"
    assert page.locator("p:has-text('The locator finds') b").all_inner_texts() == [expected.task] * 2 == [TASKS[0]] * 2
    shown = [float(text) for text in page.locator(".scores td").all_inner_texts()]
    assert shown == [round(score, 2) for score in expected.scores.values()]
    weights = [f"{100 * weight:.0f}" for router in expected.routers for weight in router.weights]
    assert page.locator(".experts td").all_inner_texts() == weights

    page.get_by_label("oracle").check()
    page.get_by_label("The question's task").click()
    page.get_by_role("option", name=TASKS[1]).click()
    newest, _ = ask(page, 2)
    assert newest[1:] == ["oracle", TASKS[1], loaded.answer(image, question, locator="oracle", task=TASKS[1])]
    assert page.locator("p:has-text('The locator finds') b").last.inner_text() == TASKS[1]
    page.get_by_label("Question", exact=True).fill(" ")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("Write a question first.").wait_for(timeout=30_000)


@pytest.mark.parametrize("why", ["port", "gradio", "checkpoint"])
def test_what_is_refused(
    why: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A taken port, a machine without gradio, or a folder that is no checkpoint gives one line that names the cause."""
    checkpoint = tmp_path if why == "checkpoint" else runs.chain("clmoe")[1]
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        if why == "gradio":
            monkeypatch.setitem(sys.modules, "gradio", None)
            monkeypatch.delitem(sys.modules, "clmoe.demo")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(["demo", str(checkpoint), "--benchmark", str(runs.benchmark), "--port", port])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert {"port": port, "gradio": "clmoe[demo]", "checkpoint": str(tmp_path)}[why] in error
