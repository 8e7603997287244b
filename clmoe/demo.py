"""``clmoe demo``: ask a checkpoint about an image in the browser, and see the task, its score and the experts."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from queue import SimpleQueue
from typing import Any, TypeVar

from clmoe.benchmarks.base import Benchmark, task_questions
from clmoe.errors import ClmoeError
from clmoe.evaluate.answer import Explanation, LoadedCheckpoint, RouterWeights
from clmoe.evaluate.rules.base import shown_answer

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is used; nothing may leave this machine

try:
    import gradio as gr
except ImportError as error:
    raise ClmoeError("the demo needs gradio: pip install 'clmoe[demo]'") from error

T = TypeVar("T")
REMEMBERED = 8
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
.wide { overflow-x: auto; }
"""


@dataclass(frozen=True)
class Example:
    """A test question: its task, the path of its image, its text, and the expected answer."""

    task: str
    image: str | None
    question: str
    answer: str


@dataclass(frozen=True)
class Asked:
    """One line of the list of answers: how the task was chosen, the task, and what was said."""

    question: str
    locator: str
    task: str | None
    text: str


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
            examples.append(Example(task.name, image, question.text, shown_answer(question)))
    return examples


# ---- What the page shows beside the answer, as HTML


def scores_panel(explanation: Explanation) -> str:
    """A row per task with a bar; the task that the question was taken for is marked."""
    if not explanation.scores:
        return "<p>This method answers without looking for the task: every question takes the same way.</p>"
    scores, rows = explanation.scores, []
    for task in scores:
        mark = ' class="chosen"' if task == explanation.task else ""
        rows.append(f"<tr{mark}><th>{escape(task)}</th>{_bar(task, scores)}</tr>")
    winner = max(scores, key=lambda task: scores[task])
    text = f"The locator finds <b>{escape(winner)}</b>; "
    text += f"answered as a question of <b>{escape(str(explanation.task))}</b>. The largest score wins."
    return f'<p>{text}</p><table class="clmoe scores"><tr><th>task</th><th>score</th></tr>{"".join(rows)}</table>'


def _bar(task: str, scores: dict[str, float]) -> str:
    """The score, over a bar that spans from the lowest task to the highest; the winner's is bold."""
    low, high = min(scores.values()), max(scores.values())
    width = 100 * (scores[task] - low) / (high - low) if high > low else 100
    number = f"{scores[task]:.2f}"
    number = f"<b>{number}</b>" if scores[task] == high else number
    return f'<td><div class="bar" style="width:{width:.0f}%"></div><span>{number}</span></td>'


def experts_panel(explanation: Explanation, learned: Sequence[str]) -> str:
    """Heat map: a row per router, a column per expert, in percent of the mean over the prompt's tokens."""
    if not explanation.routers:
        return "<p>This checkpoint has no experts: plain LoRA, the same for every token.</p>"
    routers = explanation.routers
    columns = sorted({column for router in routers for column in _keys(router)})
    strongest = max(weight for router in routers for weight in router.weights)
    owners = list(dict.fromkeys(owner for owner, _ in columns))
    names = ["before task 1" if owner < 0 else learned[owner] for owner in owners]
    names = names if len(owners) > 1 else ["shared by all tasks"]
    spans = [sum(owner == other for other, _ in columns) for owner in owners]
    rows = ["<th>experts</th>"]
    rows[0] += "".join(f'<th colspan="{n}">{escape(name)}</th>' for name, n in zip(names, spans, strict=True))
    rows.append("<th></th>" + "".join(f"<th>{k + 1}</th>" for _, k in columns))
    for router in routers:
        name = f"block {router.block} {router.linear}".strip()
        rows.append(f"<th>{escape(name)}</th>{_cells(router, columns, strongest)}")
    text = "Weight of each expert in percent, mean over the prompt's tokens"
    if any(len(router.weights) < len(router.owners) for router in routers):
        text += "; · came after this task and is out of its routers' reach"
    table = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<p>{text}.</p><div class="wide"><table class="clmoe experts">{table}</table></div>'


def _keys(router: RouterWeights) -> list[tuple[int, int]]:
    """(owner, number within the owner) of the experts of a router's block: blocks may hold different ones."""
    return [(owner, router.owners[:k].count(owner)) for k, owner in enumerate(router.owners)]


def _cells(router: RouterWeights, columns: Sequence[tuple[int, int]], strongest: float) -> str:
    present, cells = _keys(router), []
    weights = dict(zip(present, router.weights, strict=False))
    for column in columns:
        if column not in weights:
            cells.append(f"<td>{'·' if column in present else ''}</td>")
            continue
        share = 100 * weights[column] / strongest
        dark = ' class="dark"' if share > 55 else ""
        cells.append(f'<td{dark} style="--share:{share:.0f}%">{100 * weights[column]:.0f}</td>')
    return "".join(cells)


def asked_panel(asked: Sequence[Asked]) -> str:
    """The answers so far, newest first, to compare routers."""
    if not asked:
        return ""
    rows = "".join(
        f"<tr><td>{escape(a.question)}</td><td>{escape(a.locator)}</td><td>{escape(a.task or '')}</td>"
        f"<td><b>{escape(a.text)}</b></td></tr>"
        for a in reversed(asked)
    )
    head = "<tr><th>question</th><th>locator</th><th>task</th><th>answer</th></tr>"
    return f'<h3>Asked so far</h3><table class="clmoe asked">{head}{rows}</table>'


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
            rows = [[e.image, e.question, e.task, e.answer] for e in examples]
            label = "Examples: the first test questions of each task"
            gr.Examples(rows, [image, question, task, expected], label=label, examples_per_page=len(rows))
            gr.on([image.input, question.input], lambda: "", None, expected, api_visibility="private")

        def ask(*values: Any) -> Iterator[tuple[Any, ...]]:
            yield from _ask(checkpoint, *values)

        outputs = [answer, scores, experts, history, asked]
        gr.on([button.click, question.submit], ask, [image, question, locator, task, asked], outputs)
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
    checkpoint: LoadedCheckpoint, image: str | None, question: str, locator: str, task: str, asked: list[Asked]
) -> Iterator[tuple[Any, ...]]:
    """Panels for every partial answer, in the order of the page's outputs."""
    if not question.strip():
        raise gr.Error("Write a question first.", print_exception=False)
    named = task if locator == "oracle" else None
    try:
        for e in stream(
            lambda report: checkpoint.explain(image, question.strip(), locator=locator, task=named, watch=report)
        ):
            last: Explanation = e
            yield e.text, scores_panel(e), experts_panel(e, checkpoint.learned), gr.skip(), gr.skip()
    except ClmoeError as error:
        raise gr.Error(str(error), print_exception=False) from error
    chosen = (locator or OWN) if checkpoint.keeps_parts else ""
    asked = [*asked, Asked(question.strip(), chosen, last.task, last.text)][-REMEMBERED:]
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
