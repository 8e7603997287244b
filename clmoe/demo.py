"""``clmoe demo``: ask a checkpoint about an image in the browser, and see the task, its score and the experts."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from html import escape
from itertools import zip_longest
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import pandas as pd

from clmoe.benchmarks.base import Benchmark, task_questions
from clmoe.errors import ClmoeError
from clmoe.evaluate.loaded import Explanation, LoadedCheckpoint
from clmoe.evaluate.scoring import shown_answer

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is used; nothing may leave this machine

try:
    import gradio as gr
except ImportError as error:
    raise ClmoeError("the demo needs gradio: pip install 'clmoe[demo]'") from error

T = TypeVar("T")
REMEMBERED = 8  # answers
OWN = "the checkpoint's"
COLOUR = "rgba(11, 114, 133, 0.35)"
STYLE = """
.scores, .experts, .asked { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.scores :is(th, td), .experts :is(th, td), .asked :is(th, td) { padding: 2px 6px; white-space: nowrap; }
.scores td { min-width: 9em; }
.wide { overflow-x: auto; }
"""


class Example(NamedTuple):
    """A test question and its expected answer."""

    image: str | None
    question: str
    task: str
    answer: str


def read_examples(benchmark: Benchmark, learned: Sequence[str], per_task: int = 2) -> list[Example]:
    """The first ``per_task`` test questions of every learned task.

    Raises ClmoeError if the benchmark holds none of the tasks, or a file is missing or malformed.
    """
    tasks = [task for task in benchmark.tasks if task.name in learned]
    if not tasks:
        raise ClmoeError(f"benchmark {benchmark.name} has none of the checkpoint's tasks ({', '.join(learned)})")
    examples = []
    for task in tasks:
        for question in task_questions(task)[:per_task]:
            image = None if question.image is None else str(task.image_root / question.image)
            examples.append(Example(image, question.text, task.name, shown_answer(question)))
    return examples


# ---- What the page shows beside the answer, as HTML


def scores_panel(explanation: Explanation) -> str:
    """A row per task: its score over a bar from the lowest to the highest; the task that was chosen is marked."""
    if not explanation.scores:
        return "<p>This method answers without looking for the task: every question takes the same path.</p>"
    frame = pd.DataFrame({"score": explanation.scores})
    table = frame.style.format("{:.2f}").format_index(escape="html")
    table = table.bar(color=COLOUR, align="left", vmin=frame["score"].min() - 0.01)  # a lone task has a bar, too
    table = table.highlight_max(props="font-weight: bold")
    table = table.map_index(lambda task: f"background: {COLOUR}" if task == explanation.task else "")
    text = f"The locator finds <b>{escape(frame['score'].idxmax())}</b>; answered as a question of "
    text += f"<b>{escape(str(explanation.task))}</b>. The largest score wins."
    return f"<p>{text}</p>" + table.to_html(table_attributes='class="scores"')


def experts_panel(explanation: Explanation, learned: Sequence[str]) -> str:
    """Heat map: a row per router, a column per expert, in percent of the mean over the prompt's tokens."""
    if not explanation.routers:
        return "<p>This checkpoint has no experts: plain LoRA, the same for every token.</p>"
    rows = {}
    for router in explanation.routers:
        # by owner and number within the owner: blocks may hold different experts, and later ones are out of reach
        keys = [(owner, router.owners[:k].count(owner) + 1) for k, owner in enumerate(router.owners)]
        shares = [100 * weight for weight in router.weights]
        rows[f"block {router.block} {router.linear}".strip()] = dict(zip_longest(keys, shares, fillvalue=0.0))
    frame = pd.DataFrame.from_dict(rows, orient="index").sort_index(axis=1)
    owners = {owner: learned[owner] if owner >= 0 else "before task 1" for owner, _ in frame}
    names = owners if len(owners) > 1 else dict.fromkeys(owners, "shared by all tasks")
    frame.columns = pd.MultiIndex.from_tuples([(names[owner], str(number)) for owner, number in frame])
    table = frame.style.format("{:.0f}", na_rep="").format_index(escape="html", axis=1)
    table = table.background_gradient("Blues", axis=None, vmin=0).highlight_null(props="background: none")
    text = "Weight of each expert in percent, mean over the prompt's tokens. Experts of tasks after the router's "
    text += "are out of its reach; blank ones are not in the block."
    return f"<p>{text}</p><div class='wide'>" + table.to_html(table_attributes='class="experts"') + "</div>"


def asked_panel(asked: Sequence[Sequence[str]]) -> str:
    """The answers so far (question, locator, task, answer), newest first, to compare locators."""
    frame = pd.DataFrame(asked[::-1], columns=["question", "locator", "task", "answer"])
    table = frame.style.hide().format(escape="html").to_html(table_attributes='class="asked"')
    return f"<h3>Asked so far</h3>{table}"


# ---- The page


def build_page(checkpoint: LoadedCheckpoint, title: str, examples: Sequence[Example]) -> gr.Blocks:
    """Widgets and what they do."""
    with gr.Blocks(title="clmoe demo", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# {title}\nLearned, in this order: {', '.join(checkpoint.learned)}.")
        asked = gr.State([])
        with gr.Row():
            with gr.Column(scale=2):
                image = gr.Image(
                    type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Image", height=240
                )
                question = gr.Textbox(label="Question", lines=3)
                locator, task = _locator_choice(checkpoint)
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
            label, rows = "Examples: the first test questions of each task", [list(example) for example in examples]
            gr.Examples(rows, [image, question, task, expected], label=label, examples_per_page=len(rows))
            gr.on([image.input, question.input], lambda: "", None, expected, api_visibility="private")

        inputs, outputs = [image, question, locator, task, asked], [answer, scores, experts, history, asked]
        gr.on([button.click, question.submit], partial(_ask, checkpoint), inputs, outputs)
    return page


def _locator_choice(checkpoint: LoadedCheckpoint) -> tuple[gr.Radio, gr.Dropdown]:
    """Who finds the task, and the task for the oracle; hidden for methods without parts."""
    locator = gr.Radio(
        [(OWN, ""), "oracle", "last", "random"],
        value="",
        label="Locator",
        info="oracle: the task is picked by hand; last: the newest one; random: drawn",
        visible=checkpoint.keeps_parts,
    )
    task = gr.Dropdown(checkpoint.learned, value=checkpoint.learned[0], label="The question's task", visible=False)
    locator.change(lambda chosen: gr.update(visible=chosen == "oracle"), locator, task, api_visibility="private")
    return locator, task


def _ask(
    checkpoint: LoadedCheckpoint, image: str | None, question: str, locator: str, task: str, asked: list[Any]
) -> Iterator[tuple[Any, ...]]:
    """Panels for every partial answer, in the order of the page's outputs."""
    if not question.strip():
        raise gr.Error("Write a question first.", print_exception=False)
    named = task if locator == "oracle" else None
    explain = partial(checkpoint.explain, image, question.strip(), locator=locator, task=named)
    try:
        for e in stream(lambda report: explain(watch=report)):
            last: Explanation = e
            yield e.text, scores_panel(e), experts_panel(e, checkpoint.learned), gr.skip(), gr.skip()
    except ClmoeError as error:
        raise gr.Error(str(error), print_exception=False) from error
    chosen = (locator or OWN) if last.task else ""
    asked = [*asked, (question.strip(), chosen, last.task or "", last.text)][-REMEMBERED:]
    yield gr.skip(), gr.skip(), gr.skip(), asked_panel(asked), asked


def launch(page: gr.Blocks, port: int | None) -> str:
    """Serve the page to this machine only and return its address. Raises ClmoeError if the port is taken."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = page.queue(api_open=False).launch(
            server_name="127.0.0.1", server_port=port, share=False, ssr_mode=False, quiet=True,
            prevent_thread_lock=True, footer_links=[], theme=theme, css=STYLE,
        )  # fmt: skip
    except (OSError, OverflowError) as error:  # the latter: no port has this number
        raise ClmoeError(
            f"--port {port} is taken or impossible: choose another, or leave it out for a free one"
        ) from error
    return address


def stream(work: Callable[[Callable[[T], None]], T]) -> Iterator[T]:
    """Everything that ``work(report)`` reports, as it comes, and then what it returns; its error is raised here."""
    queue: SimpleQueue[T | None] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, queue.put)
        future.add_done_callback(lambda done: queue.put(None))
        while (item := queue.get()) is not None:
            yield item
        yield future.result()
