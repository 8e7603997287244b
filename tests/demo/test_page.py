"""``clmoe demo`` in a real browser: ask, and see answer, task and experts; nothing leaves the machine."""

import importlib.util
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import clmoe
from clmoe import cli
from tests.runs import Runs
from tests.support import TASKS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def served(
    runs: Runs, mini_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[tuple[str, list[Any]]]:
    """Address of ``clmoe demo`` on a CL-MoE checkpoint of two tasks, and every address that it connects to."""
    import gradio

    connected: list[Any] = []
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: connected.append(to) or connect(self, to))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda self: None)
    port = free_port()
    cli.main(["demo", str(runs.chain("clmoe")[1]), "--benchmark", str(mini_yaml), "--port", str(port)])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"clmoe on mini, after {TASKS[1]}: http://127.0.0.1:{port}/ (stop with Ctrl-C)"
    yield f"http://127.0.0.1:{port}/", connected
    gradio.close_all()


@pytest.fixture
def browser_page(served: tuple[str, list[Any]]) -> Iterator[Any]:
    """The page, loaded; ends with a look at what the browser complained about and asked others for."""
    from playwright.sync_api import sync_playwright

    address, connected = served
    complaints: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.get_by_role("button", name="Ask", exact=True).wait_for(timeout=30_000)
        yield page
        browser.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert {to[0] for to in connected if isinstance(to, tuple)} <= {"127.0.0.1"}


def ask(page: Any, answers: int) -> list[list[str]]:
    """Press the button and wait until that many answers are listed; the list, newest first."""
    page.get_by_role("button", name="Ask", exact=True).click()
    rows = page.locator("table.asked tr")
    rows.nth(answers).wait_for(timeout=30_000)
    return [row.locator("td").all_inner_texts() for row in rows.all()[1:]]


@needs_browser
def test_a_question_is_answered_and_explained(browser_page: Any, runs: Runs, mini_yaml: Path) -> None:
    """What the page shows is what ``clmoe.load`` answers in Python, for the located task and for the one picked."""
    page, loaded = browser_page, clmoe.load(runs.chain("clmoe")[1])
    image, question = (
        mini_yaml.parent / "colour" / "images" / "24.png",
        "Which colour is it?\nA. red\nB. green\nC. blue",
    )
    page.locator("tr.tr-body").first.click()
    page.wait_for_function("document.querySelector('textarea').value.startsWith('Which')")
    expected = loaded.explain(image, question)
    (row,) = ask(page, 1)
    assert row == [" ".join(question.split()), "located", expected.task, expected.text]
    assert page.get_by_label("Answer", exact=True).input_value() == expected.text
    assert page.get_by_label("Expected answer", exact=True).input_value() == "A"
    assert page.locator(".scores .chosen th").inner_text() == expected.task == TASKS[0]
    shown = [float(text) for text in page.locator(".scores span").all_inner_texts()]
    assert shown == [round(score, 2) for score in expected.scores["prototype"].values()]
    weights = [f"{100 * weight:.0f}" for router in expected.routers for weight in router.weights]
    assert page.locator(".experts td").all_inner_texts() == weights

    page.get_by_label("oracle").check()
    page.get_by_label("The question's task").click()
    page.get_by_role("option", name=TASKS[1]).click()
    newest, _ = ask(page, 2)
    assert newest[1:] == ["oracle", TASKS[1], loaded.answer(image, question, router="oracle", task=TASKS[1])]
    assert page.locator(".scores .chosen th").inner_text() == TASKS[1]


@needs_browser
def test_an_empty_question_is_refused_on_the_page(browser_page: Any) -> None:
    browser_page.get_by_role("button", name="Ask", exact=True).click()
    browser_page.get_by_text("Write a question first.").wait_for(timeout=30_000)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_without_gradio_the_error_says_what_to_install(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "clmoe.demo.page", raising=False)
    checkpoint = runs.chain("clmoe")[1]
    capsys.readouterr()
    error = refused(["demo", str(checkpoint)], capsys)
    assert error == "clmoe demo: the demo needs gradio: pip install 'clmoe[demo]'\n"


def test_a_folder_that_is_no_checkpoint_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a finished checkpoint" in refused(["demo", str(tmp_path)], capsys)


@needs_browser
def test_a_taken_port_is_refused(
    runs: Runs, mini_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = runs.chain("clmoe")[1]
    capsys.readouterr()
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        error = refused(["demo", str(checkpoint), "--benchmark", str(mini_yaml), "--port", port], capsys)
    assert f"--port {port} is taken" in error
