"""How much of what was forgotten is only the form of the answer, and whose words the answers use (docs/metrics.md)."""

import re
from collections.abc import Sequence

import pandas as pd

from clmoe.evaluate.rules import normalise, parse_box, parse_letter
from clmoe.report.answers import read_answers
from clmoe.report.runs import Group, Run

_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s+(\S.*?)\s*$", re.MULTILINE)
_BOX = "[x1, y1, x2, y2]"


def formats_frame(groups: Sequence[Group]) -> pd.DataFrame:
    """label, seed, task, and in percent, NaN where not measured, over the questions that were asked both times.

    last, last_any_form: mean score at the end, and with answers counted as right that are right but for their form;
    forgotten, forgotten_any_form: the same scores right after training less those at the end, for all but the last
    task; foreign: answers at the end that only another task expects. Tasks that are scored as a whole have no row.
    """
    rows = []
    for run in (run for group in groups for run in group.runs):
        answers = {task: _judged(run, task) for task in run.order}
        words = {
            task: {_kind(one) for text in frame["reference"] for one in text.split(" | ")}
            for task, frame in answers.items()
        }
        for task, frame in ((task, frame) for task, frame in answers.items() if len(frame)):
            others = set().union(*(own for other, own in words.items() if other != task)) - words[task]
            now, then = (_scores(frame, when) for when in ("now", "then"))
            lost = (then - now) if task != run.order[-1] else now * float("nan")
            row = {"label": run.label, "seed": run.seed, "task": task}
            row |= {"last": now["score"], "last_any_form": now["any_form"]}
            row |= {"forgotten": lost["score"], "forgotten_any_form": lost["any_form"]}
            foreign = [_kind(text) in others for text in frame["now"]]
            rows.append(row | {"foreign": 100 * sum(foreign) / len(foreign)})
    columns = ["label", "seed", "task", "last", "last_any_form", "forgotten", "forgotten_any_form", "foreign"]
    return pd.DataFrame(rows, columns=columns)


def right_but_for_form(text: str, prompt: str, expected: str) -> bool:
    """Whether an answer is an expected one (several are joined by `` | ``) but for its form.

    Forms are letter case, punctuation, articles, numerals or words, and an option's letter or its text, if the prompt
    lists its options line by line (``A. red``).
    """
    options = {letter: _word(option) for letter, option in _OPTION.findall(prompt)}
    said, wanted = {_word(text)}, {_word(one) for one in expected.split(" | ")}
    for words in (said, wanted):
        words |= {option for letter, option in options.items() if letter.lower() in words}
    letter = parse_letter(text)
    said |= {options[letter]} if letter in options else set()
    return bool(said & wanted)


def _judged(run: Run, task: str) -> pd.DataFrame:
    """The answers at the end that have a score, and also had one then, if the task was asked then at all."""
    frame = read_answers(run, task)
    if not len(frame):
        return pd.DataFrame(columns=["reference"])
    frame = frame.dropna(subset="now_score")
    return frame.dropna(subset="then_score") if frame["then_score"].notna().any() else frame


def _scores(frame: pd.DataFrame, when: str) -> pd.Series:
    """Percent: score, and any_form, which counts at least 1 where the answer is right but for its form."""
    score = frame[f"{when}_score"].astype(float)
    texts = zip(frame[when], frame["prompt"], frame["reference"], strict=True)
    same = [isinstance(text, str) and right_but_for_form(text, prompt, expected) for text, prompt, expected in texts]
    any_form = score.where(score.isna() | ~pd.Series(same, frame.index), score.clip(lower=1.0))
    return 100 * pd.Series({"score": score.mean(), "any_form": any_form.mean()})


def _word(text: str) -> str:
    """An answer without its form; a text of articles alone stays, since "A" is an option."""
    return normalise(text) or text.strip(" .()\n").lower()


def _kind(text: str) -> str:
    """The same, but all boxes are one word."""
    return _BOX if parse_box(text) else _word(text)
