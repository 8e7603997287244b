"""What the page shows beside the answer, as HTML: every task's score, the experts' weights, what was asked before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from clmoe.evaluate.answer import Explanation, RouterWeights

EARLIEST = "before task 1"
Column = tuple[int, int]


@dataclass(frozen=True)
class Asked:
    """One line of the list of answers: how the task was chosen, the task, and what was said."""

    question: str
    router: str
    task: str | None
    text: str


def scores_panel(explanation: Explanation) -> str:
    """A row per task with a bar for each decider; the task whose routers answer is marked."""
    if not explanation.scores:
        return "<p>This method answers without looking for the task: every question takes the same way.</p>"
    first, *others = explanation.scores
    tasks = list(explanation.scores[first])
    rows = []
    for task in tasks:
        cells = "".join(_bar(task, scores) for scores in explanation.scores.values())
        mark = ' class="chosen"' if task == explanation.task else ""
        rows.append(f"<tr{mark}><th>{escape(task)}</th>{cells}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in (first, *others))
    winner = max(tasks, key=lambda task: explanation.scores[first][task])
    text = f"The locator (<b>{escape(first)}</b>) finds <b>{escape(winner)}</b>; "
    text += f"answered with the routers of <b>{escape(str(explanation.task))}</b>. The largest score wins."
    return f'<p>{text}</p><table class="clmoe scores"><tr><th>task</th>{head}</tr>{"".join(rows)}</table>'


def _bar(task: str, scores: dict[str, float]) -> str:
    """The score, over a bar that spans from the lowest task to the highest; the decider's winner is bold."""
    low, high = min(scores.values()), max(scores.values())
    width = 100 * (scores[task] - low) / (high - low) if high > low else 100
    number = f"{scores[task]:.2f}"
    number = f"<b>{number}</b>" if scores[task] == high else number
    return f'<td><div class="bar" style="width:{width:.0f}%"></div><span>{number}</span></td>'


def experts_panel(explanation: Explanation, learned: Sequence[str]) -> str:
    """Heat map: a row per router, a column per expert, in percent of the mean over the prompt's tokens."""
    if not explanation.routers:
        return "<p>This checkpoint has no experts: plain LoRA, the same for every token.</p>"
    columns = _columns(explanation.routers)
    strongest = max(weight for router in explanation.routers for weight in router.weights)
    rows = "".join(
        f"<tr><th>{escape(_router_name(router))}</th>{_cells(router, columns, strongest)}</tr>"
        for router in explanation.routers
    )
    text = "Weight of each expert in percent, mean over the prompt's tokens"
    if any(len(router.weights) < len(router.owners) for router in explanation.routers):
        text += "; · came after this task and is out of its routers' reach"
    head = _head(columns, learned)
    return f'<p>{text}.</p><div class="wide"><table class="clmoe experts">{head}{rows}</table></div>'


def _columns(routers: Sequence[RouterWeights]) -> list[Column]:
    """(owner, number within the owner) of all experts of any block: blocks may hold different ones."""
    return sorted({column for router in routers for column in _keys(router)})


def _keys(router: RouterWeights) -> list[Column]:
    return [(owner, router.owners[:k].count(owner)) for k, owner in enumerate(router.owners)]


def _head(columns: Sequence[Column], learned: Sequence[str]) -> str:
    owners = list(dict.fromkeys(owner for owner, _ in columns))
    names = ["shared by all tasks"] if len(owners) == 1 else [_owner_name(owner, learned) for owner in owners]
    spans = [sum(owner == other for other, _ in columns) for owner in owners]
    groups = "".join(f'<th colspan="{span}">{escape(name)}</th>' for name, span in zip(names, spans, strict=True))
    numbers = "".join(f"<th>{k + 1}</th>" for _, k in columns)
    return f"<tr><th>experts</th>{groups}</tr><tr><th></th>{numbers}</tr>"


def _owner_name(owner: int, learned: Sequence[str]) -> str:
    return EARLIEST if owner < 0 else learned[owner]


def _router_name(router: RouterWeights) -> str:
    return f"block {router.block} {router.linear}".strip()


def _cells(router: RouterWeights, columns: Sequence[Column], strongest: float) -> str:
    weights = dict(zip(_keys(router), router.weights, strict=False))
    present = set(_keys(router))
    cells = []
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
        f"<tr><td>{escape(a.question)}</td><td>{escape(a.router)}</td><td>{escape(a.task or '')}</td>"
        f"<td><b>{escape(a.text)}</b></td></tr>"
        for a in reversed(asked)
    )
    head = "<tr><th>question</th><th>router</th><th>task</th><th>answer</th></tr>"
    return f'<h3>Asked so far</h3><table class="clmoe asked">{head}{rows}</table>'
