"""``clmoe demo``: ask a checkpoint about an image in the browser, and see the task, its score and the experts."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from html import escape
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from clmoe.benchmarks.base import Benchmark, task_questions
from clmoe.errors import ClmoeError
from clmoe.evaluate.answer import Explanation, LoadedCheckpoint
from clmoe.evaluate.rules.scoring import shown_answer

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is used; nothing may leave this machine

try:
    import gradio as gr
except ImportError as error:
    raise ClmoeError("the demo needs gradio: pip install 'clmoe[demo]'") from error

T = TypeVar("T")
REMEMBERED = 8  # answers
OWN = "the checkpoint's"
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
.asked td:last-child { font-weight: bold; }
.wide { overflow-x: auto; }
"""


class Example(NamedTuple):
    """A test question with its expected answer; `image` is a path."""

    image: str | None
    question: str
    task: str
    answer: str


def read_examples(benchmark: Benchmark, learned: Sequence[str], per_task: int = 2) -> list[Example]:
    """The first ``per_task`` test questions of every learned task.

    Raises:
        ClmoeError: the benchmark holds none of the tasks, or a file is missing or malformed.
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
        return "<p>This method answers without looking for the task: every question takes the same way.</p>"
    low, high = min(explanation.scores.values()), max(explanation.scores.values())
    rows = ""
    for task, score in explanation.scores.items():
        mark = ' class="chosen"' if task == explanation.task else ""
        width = 100 * (score - low) / (high - low) if high > low else 100
        number = f"<b>{score:.2f}</b>" if score == high else f"{score:.2f}"
        cell = f'<div class="bar" style="width:{width:.0f}%"></div><span>{number}</span>'
        rows += f"<tr{mark}><th>{escape(task)}</th><td>{cell}</td></tr>"
    winner = max(explanation.scores, key=explanation.scores.__getitem__)
    text = f"The locator finds <b>{escape(winner)}</b>; "
    text += f"answered as a question of <b>{escape(str(explanation.task))}</b>. The largest score wins."
    return f'<p>{text}</p><table class="clmoe scores"><tr><th>task</th><th>score</th></tr>{rows}</table>'


def experts_panel(explanation: Explanation, learned: Sequence[str]) -> str:
    """Heat map: a row per router, a column per expert, in percent of the mean over the prompt's tokens."""
    if not explanation.routers:
        return "<p>This checkpoint has no experts: plain LoRA, the same for every token.</p>"
    # (owner, number within the owner) of every expert: the blocks may hold different ones
    keys = [[(o, r.owners[:k].count(o)) for k, o in enumerate(r.owners)] for r in explanation.routers]
    columns = sorted({key for present in keys for key in present})
    strongest = max(weight for router in explanation.routers for weight in router.weights)
    owners = Counter(owner for owner, _ in columns)
    names = ["before task 1" if owner < 0 else learned[owner] for owner in owners]
    names = names if len(owners) > 1 else ["shared by all tasks"]
    spans = zip(names, owners.values(), strict=True)
    rows = ["<th>experts</th>" + "".join(f'<th colspan="{n}">{escape(name)}</th>' for name, n in spans)]
    rows.append("<th></th>" + "".join(f"<th>{k + 1}</th>" for _, k in columns))
    for router, present in zip(explanation.routers, keys, strict=True):
        weights = dict(zip(present, router.weights, strict=False))
        row = f"<th>{escape(f'block {router.block} {router.linear}'.strip())}</th>"
        for column in columns:
            if column in weights:
                share = 100 * weights[column] / strongest
                dark = ' class="dark"' if share > 55 else ""
                row += f'<td{dark} style="--share:{share:.0f}%">{100 * weights[column]:.0f}</td>'
            else:
                row += f"<td>{'·' if column in present else ''}</td>"
        rows.append(row)
    text = "Weight of each expert in percent, mean over the prompt's tokens"
    if any(len(router.weights) < len(router.owners) for router in explanation.routers):
        text += "; · came after this task and is out of its routers' reach"
    table = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<p>{text}.</p><div class="wide"><table class="clmoe experts">{table}</table></div>'


def asked_panel(asked: Sequence[Sequence[str]]) -> str:
    """The answers so far (question, locator, task, answer), newest first, to compare locators."""
    rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in reversed(asked)]
    head = "<th>question</th><th>locator</th><th>task</th><th>answer</th>"
    table = "".join(f"<tr>{row}</tr>" for row in (head, *rows))
    return f'<h3>Asked so far</h3><table class="clmoe asked">{table}</table>'


# ---- The page


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
    chosen = (locator or OWN) if checkpoint.keeps_parts else ""
    asked = [*asked, (question.strip(), chosen, last.task or "", last.text)][-REMEMBERED:]
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


def stream(work: Callable[[Callable[[T], None]], T]) -> Iterator[T]:
    """Everything that ``work(report)`` reports, as it comes, and then what it returns; its error is raised here."""
    queue: SimpleQueue[T | None] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, queue.put)
        future.add_done_callback(lambda done: queue.put(None))
        while (item := queue.get()) is not None:
            yield item
        yield future.result()
