"""The page: gradio's widgets around ``LoadedCheckpoint.explain``. The only file that imports gradio."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from clmoe.demo.examples import Example
from clmoe.demo.panels import Asked, asked_panel, experts_panel, scores_panel
from clmoe.demo.stream import stream
from clmoe.errors import ClmoeError
from clmoe.evaluate.answer import Explanation, LoadedCheckpoint
from clmoe.experts.routing import RouterChoice

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is used; nothing may leave this machine

try:
    import gradio as gr
except ImportError as error:
    raise ClmoeError("the demo needs gradio: pip install 'clmoe[demo]'") from error

REMEMBERED = 8
STYLE = """
.clmoe { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.clmoe th, .clmoe td { border: 1px solid var(--border-color-primary); padding: 2px 6px; text-align: center; }
.clmoe th { font-weight: normal; white-space: nowrap; }
.scores td { position: relative; min-width: 9em; }
.scores .bar { position: absolute; inset: 2px auto 2px 0; background: #0b7285; opacity: .25; }
.scores span { position: relative; }
.scores .chosen th { background: #0b7285; color: white; }
.experts td { background: color-mix(in srgb, #0b7285 var(--share, 0%), transparent); min-width: 2.2em; }
.experts td.dark { color: white; }
.asked td, .asked th { text-align: left; }
.wide { overflow-x: auto; }
"""


def build_page(checkpoint: LoadedCheckpoint, title: str, examples: Sequence[Example]) -> gr.Blocks:
    """Widgets and what they do; ``launch`` serves it."""
    with gr.Blocks(title="clmoe demo", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# {title}\nLearned, in this order: {', '.join(checkpoint.learned)}.")
        asked = gr.State([])
        with gr.Row():
            with gr.Column(scale=2):
                image = gr.Image(
                    type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Image", height=240
                )
                question = gr.Textbox(label="Question", lines=3)
                router, task = _router_choice(checkpoint)
                button = gr.Button("Ask", variant="primary")
            with gr.Column(scale=3):
                with gr.Row():
                    answer = gr.Textbox(label="Answer", interactive=False)
                    expected = gr.Textbox(label="Expected answer", interactive=False, visible=bool(examples))
                gr.Markdown("### Task")
                scores = gr.HTML("<p>Nothing asked yet.</p>")
                gr.Markdown("### Experts")
                experts = gr.HTML("<p>Nothing asked yet.</p>")
        history = gr.HTML()
        if examples:
            _example_table(examples, [image, question, task, expected])
            gr.on([image.input, question.input], lambda: "", None, expected, api_visibility="private")

        def ask(*values: Any) -> Iterator[tuple[Any, ...]]:
            yield from _ask(checkpoint, *values)

        outputs = [answer, scores, experts, history, asked]
        gr.on([button.click, question.submit], ask, [image, question, router, task, asked], outputs)
    return page


def _router_choice(checkpoint: LoadedCheckpoint) -> tuple[gr.Radio, gr.Dropdown]:
    """How the task is chosen, and the task for the oracle; hidden where answers do not depend on it."""
    router = gr.Radio(
        list(get_args(RouterChoice)),
        value="located",
        label="Router",
        info="located: found from the question; oracle: picked by hand; last: the newest task; random: drawn",
        visible=checkpoint.finds_task,
    )
    task = gr.Dropdown(checkpoint.learned, value=checkpoint.learned[0], label="The question's task", visible=False)
    router.change(lambda chosen: gr.update(visible=chosen == "oracle"), router, task, api_visibility="private")
    return router, task


def _example_table(examples: Sequence[Example], inputs: list[gr.components.Component]) -> None:
    """Clicking a row fills in image, question, the oracle's task and the expected answer."""
    gr.Examples(
        [[e.image, e.question, e.task, e.answer] for e in examples],
        inputs,
        label="Examples: the first test questions of each task",
        examples_per_page=len(examples),
    )


def _ask(
    checkpoint: LoadedCheckpoint, image: str | None, question: str, router: RouterChoice, task: str, asked: list[Asked]
) -> Iterator[tuple[Any, ...]]:
    """Panels for every partial answer, in the order of the page's outputs."""
    if not question.strip():
        raise gr.Error("Write a question first.", print_exception=False)
    named = task if router == "oracle" else None
    try:
        for e in stream(
            lambda report: checkpoint.explain(image, question.strip(), router=router, task=named, watch=report)
        ):
            last: Explanation = e
            yield e.text, scores_panel(e), experts_panel(e, checkpoint.learned), gr.skip(), gr.skip()
    except ClmoeError as error:
        raise gr.Error(str(error), print_exception=False) from error
    asked = [*asked, Asked(question.strip(), router if checkpoint.finds_task else "", last.task, last.text)][
        -REMEMBERED:
    ]
    yield gr.skip(), gr.skip(), gr.skip(), asked_panel(asked), asked


def launch(page: gr.Blocks, port: int | None) -> str:
    """Serve the page to this machine only and return its address; ``page.block_thread()`` then waits.

    Raises:
        ClmoeError: the port is taken.
    """
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = page.queue(api_open=False).launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            theme=theme,
            css=STYLE,
        )
    except OSError as error:
        raise ClmoeError(f"--port {port} is taken: choose another, or leave it out for a free one") from error
    return address
